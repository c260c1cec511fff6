"""Reading of checkpoints: weight files, configs, hub downloads, adapters. No merging and no writing."""
