"""Vocabulary alignment of embedding and output-head rows by token string."""

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

    from merging.checkpoints.storage import Rows


@dataclass(frozen=True, eq=False)
class ChosenRow:
    """Row of a token that a recipe's `tokenizer.tokens` names.

    Attributes:
        checkpoint: The checkpoint with the row; None for zeros.
        row: Row number in that checkpoint.
        force: Replace the rows of models that have the token, too.
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
        """Return the number of rows of a tensor of the result.

        Args:
            template_rows: Rows of the template model's tensor.
        """
        rows = self.fixed_rows if self.fixed_rows is not None else max(template_rows, self.min_rows)
        return -(-rows // self.multiple) * self.multiple


@dataclass(frozen=True)
class Alignment:
    """Map from the result's rows to one model's rows by token.

    Attributes:
        rows: For each row of the result the model's row, -1 where the model lacks the token; None for the identity.
        total: Number of rows of the result.
        missing: Tokens of the result that the model lacks.
        extra: Tokens of the model that the result lacks.
        chosen: {row of the result: source}, for missing rows that the recipe names.
    """

    rows: tuple[int, ...] | None
    total: int
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    chosen: Mapping[int, ChosenRow] = field(default_factory=dict, compare=False)

    @cached_property
    def index(self) -> torch.Tensor:
        """Index (total,) int64 of the model's rows."""
        import torch

        return torch.arange(self.total) if self.rows is None else torch.tensor(self.rows)


@dataclass(frozen=True)
class AlignedRows:
    """Rows of a model in the result's order, in fp32.

    Attributes:
        source: The model's tensor.
        alignment: Map of the rows.
        fill: Function from row numbers of the result (k,) to the rows (k, ...) that the model lacks.
    """

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
        """fp32, since a filled row may be an average."""
        import torch

        return torch.float32

    def __getitem__(self, rows: slice) -> Tensor:
        if self.alignment.rows is None:
            stop = self.alignment.total if rows.stop is None else min(rows.stop, self.alignment.total)
            return self.source[slice(rows.start or 0, stop)].float()
        index = self.alignment.index[rows]
        block = gather(self.source, index.clamp(min=0))
        absent = (index < 0).nonzero().squeeze(1)
        if len(absent):
            block[absent] = self.fill(absent + (rows.start or 0)).to(block.device)
        return block


def gather(rows: Rows, index: Tensor) -> Tensor:
    """Return rows by index in fp32; consecutive rows are read together.

    Args:
        rows: The tensor.
        index: (k,) row numbers.

    Returns:
        (k, ...) fp32.
    """
    import torch

    if isinstance(rows, torch.Tensor):
        return rows[index].float()
    starts = [0, *((index.diff() != 1).nonzero().squeeze(1) + 1).tolist(), len(index)]
    runs = [(int(index[a]), b - a) for a, b in pairwise(starts) if b > a]
    return torch.cat([rows[slice(first, first + count)].float() for first, count in runs])


def is_vocabulary_tensor(name: str, checkpoint: Checkpoint) -> bool:
    """Return True for tensors with one row per token: input embedding, output head and its bias."""
    return role_of(name) is not None and bool(checkpoint.tensors[name].shape)


def align(
    result_tokens: Mapping[str, int] | None,
    total: int,
    tokens: Mapping[str, int] | None,
    rows: int,
    chosen: Mapping[int, ChosenRow] | None = None,
) -> Alignment | None:
    """Map the result's rows to a model's rows by token string.

    A row without a token (padding) corresponds to the same row of the model where that has no token either.

    Args:
        result_tokens: {token: row} of the result; None where there is no tokenizer.
        total: Number of rows of the result.
        tokens: {token: row} of the model; None where there is no tokenizer.
        rows: Number of rows of the model.
        chosen: {row of the result: source} of rows that the recipe names.

    Returns:
        The alignment; None where a tokenizer is missing and the numbers of rows differ.
    """
    if result_tokens is None or tokens is None:
        return Alignment(None, total) if total == rows else None
    tokens_by_row = {i: token for token, i in result_tokens.items()}
    used_rows = set(tokens.values())
    index, missing = [], []
    for row in range(total):
        token = tokens_by_row.get(row)
        if token is None:
            index.append(row if row < rows and row not in used_rows else -1)
            continue
        row_of_token = tokens.get(token, rows)
        choice = (chosen or {}).get(row)
        index.append(row_of_token if row_of_token < rows and not (choice and choice.force) else -1)
        if row_of_token >= rows and choice is None:
            missing.append(token)
    extra = tuple(token for token, i in tokens.items() if token not in result_tokens and i < rows)
    identical = index == list(range(total))
    return Alignment(None if identical else tuple(index), total, tuple(missing), extra, chosen or {})


@lru_cache(maxsize=64)
def alignment_of(vocabulary: Vocabulary, total: int, folder: Path, rows: int) -> Alignment | None:
    """Return `align` for the tokenizer of a folder, cached for embedding and output head of a model.

    Rows match by number where a tokenizer is missing, or where both tokenizers have the same custom code and files.

    Args:
        vocabulary: The vocabulary of the result.
        total: Number of rows of the result.
        folder: Folder of the model.
        rows: Number of rows of the model.
    """
    tokens = token_ids(folder)
    if vocabulary.tokens is None or tokens is None:
        folders = [place for place in (vocabulary.folder, folder) if read_tokenizer(place) is not None]
        if len({tokenizer_digest(place) for place in folders}) > 1:
            return None
    return align(vocabulary.tokens, total, tokens, rows, vocabulary.chosen)


def describe(model: str, rows: int, alignment: Alignment) -> str | None:
    """Return the note on the effect of an alignment on a model; None where it has none."""
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
    names = ", ".join(quoted(token, 60) for token in tokens[:3])
    return f"{len(tokens)} token{'s' if len(tokens) > 1 else ''} ({names}{', ...' if len(tokens) > 3 else ''})"
