"""Sparse task vectors: trimming, random masks, sums of masked task vectors. No dense sums (consensus.py)."""
