"""What it is good for: length control, prediction, training choices."""
