"""Reading of checkpoints: formats of weight files. No merging and no writing."""
