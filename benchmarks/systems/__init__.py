"""What it costs, and whether it holds: speed, load, faults, limits."""
