"""Activation-Informed Merging: calibration text, activation importance, relaxation."""
