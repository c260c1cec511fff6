"""Aligning the rows of embeddings and output heads by token string, never by row number alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from common.terminal_text import quoted
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.tensor_names import role_of
from merging.tokenizers.token_ids import read_tokenizer, token_ids, tokenizer_digest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from merging.checkpoints.row_source import Rows


@dataclass(frozen=True, eq=False)
class ChosenRow:
    """A row that a recipe asks for by token: a row of a checkpoint, or zeros (None), in models that lack the token.

    force: also in those that have it.
    """

    checkpoint: Checkpoint | None
    row: int = 0
    force: bool = False


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Vocabulary of the result: the row of each token, and the tokenizer that lists them.

    Attributes:
        folder: Folder of the tokenizer's files.
        name: Name of the tokenizer's model in messages.
        tokens: {token string: row}; None where transformers reads no tokenizer, rows then match by number.
        fixed_rows: Number of rows where a named tokenizer decides it; None takes the template model's number.
        min_rows: Lower bound of the number of rows where `fixed_rows` is None.
        added: Tokens that the template model lacks.
        tokens_without_rows: Tokens that the chosen tokenizer lists without a row; the result's does not list them.
        multiple: The number of rows is rounded up to a multiple of this.
        chosen: {row: source of that row}, for rows that the recipe names by token.
    """

    folder: Path
    name: str
    tokens: Mapping[str, int] | None
    fixed_rows: int | None = None
    min_rows: int = 0
    added: tuple[str, ...] = ()
    tokens_without_rows: tuple[str, ...] = ()
    multiple: int = 1
    chosen: Mapping[int, ChosenRow] = field(default_factory=dict)

    def rows(self, template_rows: int) -> int:
        """Return how many rows a tensor of the result has, from the template model's number."""
        rows = self.fixed_rows if self.fixed_rows is not None else max(template_rows, self.min_rows)
        return -(-rows // self.multiple) * self.multiple


@dataclass(frozen=True)
class Alignment:
    """For each row of the result, the row of a model with the same token, or -1 where it has none.

    `rows` is None where the model's first rows are the result's rows, so that nothing has to be gathered. `chosen`:
    where rows that it lacks are taken from instead of the other models.
    """

    rows: tuple[int, ...] | None
    total: int
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    chosen: Mapping[int, ChosenRow] = field(default_factory=dict, compare=False)

    @cached_property
    def index(self) -> torch.Tensor:
        """The rows as an index (total,) int64."""
        import torch

        return torch.arange(self.total) if self.rows is None else torch.tensor(self.rows)


@dataclass(frozen=True)
class AlignedRows:
    """A model's rows in the result's order, in fp32; `fill(row numbers)` gives the rows that the model lacks."""

    source: Rows
    alignment: Alignment
    fill: Callable[[Tensor], Tensor]

    @property
    def shape(self) -> torch.Size:
        """Shape in the result."""
        import torch

        return torch.Size((self.alignment.total, *self.source.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        """Rows are widened, since a filled one may be an average."""
        import torch

        return torch.float32

    def __getitem__(self, rows: slice) -> Tensor:
        if self.alignment.rows is None:
            stop = self.alignment.total if rows.stop is None else min(rows.stop, self.alignment.total)
            return self.source[slice(rows.start or 0, stop)].float()
        index = self.alignment.index[rows]
        found = gather(self.source, index.clamp(min=0))
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


def align(
    wanted: Mapping[str, int] | None,
    total: int,
    tokens: Mapping[str, int] | None,
    rows: int,
    chosen: Mapping[int, ChosenRow] | None = None,
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
        wish = (chosen or {}).get(row)
        index.append(found if found < rows and not (wish and wish.force) else -1)
        if found >= rows and wish is None:
            missing.append(token)
    extra = tuple(token for token, i in tokens.items() if token not in wanted and i < rows)
    identical = index == list(range(total))
    return Alignment(None if identical else tuple(index), total, tuple(missing), extra, chosen or {})


@lru_cache(maxsize=64)
def alignment_of(vocabulary: Vocabulary, total: int, folder: Path, rows: int) -> Alignment | None:
    """Return `align` for the tokenizer in a folder; embedding and output head of one model ask for the same.

    Rows match by number where a tokenizer is lacking, or where both are of the same code and files.
    """
    tokens = token_ids(folder)
    if vocabulary.tokens is None or tokens is None:
        there = [place for place in (vocabulary.folder, folder) if read_tokenizer(place) is not None]
        if len({tokenizer_digest(place) for place in there}) > 1:
            return None
    return align(vocabulary.tokens, total, tokens, rows, vocabulary.chosen)


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
    shown = ", ".join(quoted(token, 60) for token in tokens[:3])
    return f"{len(tokens)} token{'s' if len(tokens) > 1 else ''} ({shown}{', ...' if len(tokens) > 3 else ''})"
