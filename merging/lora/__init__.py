"""Adapters as results: what a merge or a relaxation of LoRA adapters is, without the model that they belong to."""
