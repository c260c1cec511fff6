"""Tokenizers of results: loading, alignment of vocabularies, chat templates, writing. No tensor is computed here."""
