"""What it is good for: length control, prediction, training choices.

The columns of their tables: lifebench_figures.py; tradeoff_figures.py; prediction.py, which are
also those of scaling, ablations and censoring (grid.py); units.py.
"""
