"""What it is good for: length control, prediction, training choices.

The columns of their tables: lifebench_table.py; tradeoff_table.py; prediction.py, which are
also those of scaling, ablations and censoring (grid.py); units.py. What prediction.py tells
beside forecasts: positions.py, inversion.py, tokens.py.
"""
