"""Merge methods, one paper per file, and their contract; configs/methods/NAME.yaml holds the parameters of each."""
