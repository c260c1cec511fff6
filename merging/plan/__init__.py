"""Checks and rules of a merge plan: config comparison, layer kinds, extra tensors. No reading or writing."""
