"""Aligning the rows of embeddings and output heads by token string, never by row number alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console.errors import CheckpointError
from merging.checkpoint import Checkpoint
from merging.names import role_of
from merging.tokenizer_files import SLOW_VOCABULARIES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from merging.rows import Rows


SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
                  "additional_special_tokens", "extra_special_tokens")  # fmt: skip
"""Settings of a tokenizer that name special tokens, in the order that transformers adds them in."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The vocabulary of the result: which token has which row, and whose tokenizer it is.

    tokens: None where nobody has a tokenizer, rows then match by number alone. `given_rows`: the number of rows where
    another model's tokenizer decides it; else the donor's, at least `least_rows`. `added`: tokens that the donor lacks.
    `rowless`: tokens that the chosen tokenizer lists without having a row for them; the result's does not list them.
    """

    folder: Path
    name: str
    tokens: Mapping[str, int] | None
    given_rows: int | None = None
    least_rows: int = 0
    added: tuple[str, ...] = ()
    rowless: tuple[str, ...] = ()

    def rows(self, donor_rows: int) -> int:
        """Return how many rows a tensor of the result has, from the donor's number."""
        return self.given_rows if self.given_rows is not None else max(donor_rows, self.least_rows)


@dataclass(frozen=True)
class Alignment:
    """For each row of the result, the row of a model with the same token, or -1 where it has none.

    `rows` is None where the model's first rows are the result's rows, so that nothing has to be gathered.
    """

    rows: tuple[int, ...] | None
    total: int
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @cached_property
    def index(self) -> torch.Tensor:
        """The rows as an index (total,) int64."""
        import torch

        return torch.arange(self.total) if self.rows is None else torch.tensor(self.rows)


@dataclass(frozen=True)
class AlignedRows:
    """A model's rows in the result's order, in fp32; `fill(row numbers)` gives the rows that the model lacks."""

    own: Rows
    alignment: Alignment
    fill: Callable[[Tensor], Tensor]

    @property
    def shape(self) -> torch.Size:
        """Shape in the result."""
        import torch

        return torch.Size((self.alignment.total, *self.own.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        """Rows are widened, since a filled one may be an average."""
        import torch

        return torch.float32

    def __getitem__(self, rows: slice) -> Tensor:
        if self.alignment.rows is None:
            stop = self.alignment.total if rows.stop is None else min(rows.stop, self.alignment.total)
            return self.own[slice(rows.start or 0, stop)].float()
        index = self.alignment.index[rows]
        found = gather(self.own, index.clamp(min=0))
        absent = (index < 0).nonzero().squeeze(1)
        if len(absent):
            found[absent] = self.fill(absent + (rows.start or 0)).to(found.device)
        return found


def gather(rows: Rows, index: Tensor) -> Tensor:
    """Return the rows of the given numbers (k, ...) in fp32, read in runs of neighbours."""
    import torch

    if isinstance(rows, torch.Tensor):
        return rows[index].float()
    starts = [0, *((index.diff() != 1).nonzero().squeeze(1) + 1).tolist(), len(index)]
    runs = [(int(index[a]), b - a) for a, b in pairwise(starts) if b > a]
    return torch.cat([rows[slice(first, first + count)].float() for first, count in runs])


def is_vocabulary_tensor(name: str, checkpoint: Checkpoint) -> bool:
    """Whether the tensor has one row per entry of the checkpoint's vocabulary (embeddings, output head, its bias)."""
    return role_of(name) is not None and bool(checkpoint.tensors[name].shape)


@lru_cache(maxsize=32)
def token_ids(folder: Path) -> Mapping[str, int] | None:
    """Return {token string: id} of the tokenizer in a model folder, or None where there is no tokenizer.

    Raises CheckpointError for tokenizer files that cannot be read.
    """
    fast = folder / "tokenizer.json"
    try:
        if fast.is_file():
            data = json.loads(fast.read_text(encoding="utf-8"))
            added = {entry["content"]: entry["id"] for entry in data.get("added_tokens", [])}
            return _with_settings({**own_vocabulary(data), **added}, folder)
        if any((folder / name).is_file() for name in SLOW_VOCABULARIES):
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(folder).get_vocab()
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise CheckpointError(f"The tokenizer in {folder} cannot be read ({error!r}).") from error
    return None


def own_vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Return {token: id} of the model in a tokenizer.json, without what was added to it."""
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: a list of [token, score]
        return {entry[0]: i for i, entry in enumerate(vocabulary)}
    return dict(vocabulary)


def _with_settings(tokens: dict[str, int], folder: Path) -> dict[str, int]:
    """The tokens of tokenizer.json and those that transformers adds when it reads the settings beside it.

    Those are the added tokens listed there, and special tokens that are only named, which get the next free ids.
    """
    settings = {name: _json(folder / name) for name in ("added_tokens.json", "tokenizer_config.json")}
    decoder = settings["tokenizer_config.json"].get("added_tokens_decoder", {})
    for token, i in {**settings["added_tokens.json"], **{e["content"]: int(i) for i, e in decoder.items()}}.items():
        tokens.setdefault(token, i)
    named = {**_json(folder / "special_tokens_map.json"), **settings["tokenizer_config.json"]}
    for key in SPECIAL_TOKENS:
        values = named.get(key)
        for value in values if isinstance(values, list) else [values]:
            token = value.get("content") if isinstance(value, dict) else value
            if isinstance(token, str) and token not in tokens:
                tokens[token] = max(tokens.values(), default=-1) + 1
    return tokens


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def align(
    wanted: Mapping[str, int] | None, total: int, tokens: Mapping[str, int] | None, rows: int
) -> Alignment | None:
    """Map the result's `total` rows to a model's rows by token string; None where it cannot be told (no tokenizer).

    A row without a token (padding up to a round size) corresponds to the same row of the other model where that has no
    token either.
    """
    if wanted is None or tokens is None:
        return Alignment(None, total) if total == rows else None
    token_at = {i: token for token, i in wanted.items()}
    taken = set(tokens.values())
    index, missing = [], []
    for row in range(total):
        token = token_at.get(row)
        if token is None:
            index.append(row if row < rows and row not in taken else -1)
            continue
        found = tokens.get(token, rows)
        index.append(found if found < rows else -1)
        if found >= rows:
            missing.append(token)
    extra = tuple(token for token, i in tokens.items() if token not in wanted and i < rows)
    identical = index == list(range(total))
    return Alignment(None if identical else tuple(index), total, tuple(missing), extra)


@lru_cache(maxsize=64)
def alignment_of(vocabulary: Vocabulary, total: int, folder: Path, rows: int) -> Alignment | None:
    """Return `align` for the tokenizer in a folder; embedding and output head of one model ask for the same."""
    return align(vocabulary.tokens, total, token_ids(folder), rows)


def describe(model: str, rows: int, alignment: Alignment) -> str | None:
    """Return the sentence that says what alignment does to a model, or None where it does nothing."""
    parts = []
    if alignment.extra:
        parts.append(f"{listed(alignment.extra)} not in the result's vocabulary left out")
    if alignment.missing:
        parts.append(f"{listed(alignment.missing)} without a row in {model} taken from the models that have it")
    if alignment.rows is not None and not alignment.missing:
        parts.append("rows reordered by token string")
    if not parts and rows != alignment.total:
        parts.append("the rows without a token are padding")
    if not parts:
        return None
    return f"Vocabulary: {model} has {rows} rows, the result {alignment.total}: {'; '.join(parts)}."


def listed(tokens: tuple[str, ...]) -> str:
    """Return "2 tokens ('a', 'b')", naming at most three."""
    shown = ", ".join(repr(token) for token in tokens[:3])
    return f"{len(tokens)} token{'s' if len(tokens) > 1 else ''} ({shown}{', ...' if len(tokens) > 3 else ''})"
