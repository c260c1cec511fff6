"""Aligning the rows of embeddings and output heads by token string, never by row number alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from console.errors import CheckpointError
from merging.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY_TENSOR = re.compile(r"(embed|wte|word_embeddings|lm_head|shared|output)[\w.]*\.?(weight|bias)$")
INPUT_EMBEDDING = re.compile(r"(embed_tokens|embed_in|wte|word_embeddings|shared)\.weight$")


@dataclass(frozen=True)
class Alignment:
    """For each row of the donor's vocabulary, the row of another model with the same token, or -1 where it has none.

    `rows` is None where the model's first rows are the donor's rows, so that nothing has to be gathered.
    """

    rows: tuple[int, ...] | None
    donor_rows: int
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    def apply(self, tensor: Tensor, fill: Tensor) -> Tensor:
        """Return tensor's rows in the donor's order (donor_rows, ...), taking a row of `fill` where it has none."""
        import torch

        if self.rows is None:
            return tensor[: self.donor_rows]
        index = torch.tensor(self.rows)
        aligned = tensor[index.clamp(min=0)]
        absent = (index < 0).nonzero().squeeze(1)
        aligned[absent] = fill[absent].to(tensor.dtype)
        return aligned


def is_vocabulary_tensor(name: str, checkpoint: Checkpoint) -> bool:
    """Whether the tensor has one row per entry of the checkpoint's vocabulary (embeddings, output head)."""
    rows = checkpoint.text_config.get("vocab_size", checkpoint.config.get("vocab_size"))
    shape = checkpoint.tensors[name].shape
    if not VOCABULARY_TENSOR.search(name) or not shape:
        return False
    return shape[0] == rows or bool(re.search(r"(embed_tokens|lm_head|wte|embed_in|embed_out)\.weight$", name))


@lru_cache(maxsize=32)
def token_ids(folder: Path) -> Mapping[str, int] | None:
    """Return {token string: id} of the tokenizer in a model folder, or None where there is no tokenizer.

    Raises CheckpointError for tokenizer files that cannot be read.
    """
    fast = folder / "tokenizer.json"
    try:
        if fast.is_file():
            data = json.loads(fast.read_text(encoding="utf-8"))
            vocabulary = data["model"]["vocab"]
            if isinstance(vocabulary, list):  # Unigram: a list of [token, score]
                vocabulary = {entry[0]: i for i, entry in enumerate(vocabulary)}
            return {**vocabulary, **{added["content"]: added["id"] for added in data.get("added_tokens", [])}}
        if any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")):
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(folder).get_vocab()
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise CheckpointError(f"The tokenizer in {folder} cannot be read ({error!r}).") from error
    return None


def align(
    donor_tokens: Mapping[str, int] | None, donor_rows: int, tokens: Mapping[str, int] | None, rows: int
) -> Alignment | None:
    """Map the donor's rows to a model's rows by token string; None where it cannot be told (no tokenizer).

    A row without a token (padding up to a round size) corresponds to the same row of the other model where that has no
    token either.
    """
    if donor_tokens is None or tokens is None:
        return Alignment(None, donor_rows) if donor_rows == rows else None
    token_at = {i: token for token, i in donor_tokens.items()}
    taken = set(tokens.values())
    index, missing = [], []
    for row in range(donor_rows):
        token = token_at.get(row)
        if token is None:
            index.append(row if row < rows and row not in taken else -1)
            continue
        found = tokens.get(token, rows)
        index.append(found if found < rows else -1)
        if found >= rows:
            missing.append(token)
    extra = tuple(token for token, i in tokens.items() if token not in donor_tokens and i < rows)
    identical = index == list(range(donor_rows))
    return Alignment(None if identical else tuple(index), donor_rows, tuple(missing), extra)


@lru_cache(maxsize=32)
def alignment_of(donor: Path, donor_rows: int, folder: Path, rows: int) -> Alignment | None:
    """Return `align` for the tokenizers in two folders; embedding and output head of one model ask for the same."""
    return align(token_ids(donor), donor_rows, token_ids(folder), rows)


def describe(model: str, donor: str, rows: int, alignment: Alignment) -> str | None:
    """Return the sentence that says what alignment does to a model, or None where it does nothing."""
    parts = []
    if alignment.extra:
        parts.append(f"{_listed(alignment.extra)} not in {donor}'s vocabulary left out")
    if alignment.missing:
        parts.append(f"{_listed(alignment.missing)} without a row in {model} taken from {donor}")
    if alignment.rows is not None and not alignment.missing:
        parts.append("rows reordered by token string")
    if not parts and rows != alignment.donor_rows:
        parts.append("the rows without a token are padding")
    if not parts:
        return None
    return f"Vocabulary: {model} has {rows} rows, {donor} {alignment.donor_rows}: {'; '.join(parts)}."


def _listed(tokens: tuple[str, ...]) -> str:
    shown = ", ".join(repr(token) for token in tokens[:3])
    return f"{len(tokens)} token{'s' if len(tokens) > 1 else ''} ({shown}{', ...' if len(tokens) > 3 else ''})"
