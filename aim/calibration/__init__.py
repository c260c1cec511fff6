"""Calibration text: sources, sampling, blocks of token ids. No model is run here."""
