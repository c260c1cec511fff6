"""Merging: a merge is a function of tensors, streamed by name."""
