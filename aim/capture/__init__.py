"""Capture of activations: hooks, forward passes over the whole model or layer by layer, resume. No text sources."""
