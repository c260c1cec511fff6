"""Which files of a model folder are its tokenizer's."""

from __future__ import annotations

from pathlib import Path

TOKENIZER_FILES = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
                   "*.model", "*.tiktoken", "preprocessor_config.json", "processor_config.json",
                   "video_preprocessor_config.json")  # fmt: skip
SLOW_VOCABULARIES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
VOCABULARIES = ("tokenizer.json", *SLOW_VOCABULARIES)
"""Files of which a folder with a tokenizer has at least one."""


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the tokenizer's files in a model folder, sorted by name."""
    return sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})
