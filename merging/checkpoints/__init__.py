"""Reading of checkpoints: formats of weight files, configs as transformers reads them. No merging and no writing."""
