"""Which files of a model folder are its tokenizer's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "vocab-*.json", "*_vocab.json", "*.tiktoken", "tekken.json",
                "*.spm", "dict.txt", "*.tokenizer")  # fmt: skip
"""Files of which a folder with a tokenizer has at least one, but for those that go by bytes."""
SETTINGS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "merges.txt", "bpe.codes", "normalizer.json",
            "emoji.json", "byte_maps.json", "word_shape.json", "word_pronunciation.json")  # fmt: skip
"""What stands beside a vocabulary."""
BESIDE = ("*.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
          "video_preprocessor_config.json")  # fmt: skip
"""What a tokenizer is used with: chat templates, and what makes tokens of pictures and sound."""


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the tokenizer's files in a model folder and those it is used with, sorted by name."""
    return _found(folder, (*VOCABULARIES, *SETTINGS, *BESIDE))


def vocabulary_files(folder: Path, settings: bool = True) -> list[Path]:
    """Return the files in a model folder that decide which token has which id, sorted by name; without the settings,
    those that hold a vocabulary."""
    return _found(folder, (*VOCABULARIES, *(SETTINGS if settings else ())))


def _found(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
