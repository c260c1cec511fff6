"""Finite check of output blocks: counts NaN and infinity, or raises at the first one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from common.errors import CheckpointError, NotANumberError
from merging.ops.kernels.kernels import KINDS, kernels
from merging.ops.tensor_blocks import BLOCK_ELEMENTS, cut
from merging.plan.types import Source, TensorPlan


class FiniteBlocks(tuple[Tensor, ...]):
    """Results of a block that a kernel has already checked for NaN and infinity."""


class FiniteCheck:
    """Counts the entries of a tensor that are NaN or infinite, or refuses the first.

    sources: the input tensors of the result, to name the one that is not finite.
    """

    def __init__(self, name: str, allowed: bool, sources: Callable[[], Iterable[Source]] = tuple) -> None:
        self.name, self.allowed, self.count = name, allowed, 0
        self._sources = sources

    def check(self, block: Tensor) -> Tensor:
        """Return the block unchanged. Raises CheckpointError naming tensor and input where it is not finite."""
        count = _count(block)
        if count and not self.allowed:
            raise CheckpointError(self._sentence(str(block.dtype).removeprefix("torch.")))
        self.count += count
        return block

    def _sentence(self, kind: str) -> str:
        sentence = f"Tensor {self.name} of the result is not finite"
        if reason := nonfinite_input(self._sources()):
            return f"{sentence}: {reason} (--allow_nonfinite merges it all the same)."
        return (
            f"{sentence}, while the inputs are: {kind} cannot hold it, or a weight is NaN or too large; take a wider "
            "--dtype or smaller weights (--allow_nonfinite writes it all the same)."
        )


def sources_of(tensor: TensorPlan) -> list[Source]:
    """Return the inputs of a tensor of the plan, the fine-tuned models first."""
    return [*tensor.models, *([tensor.base] if tensor.base else []), tensor.source]


def nonfinite_input(sources: Iterable[Source]) -> str | None:
    """Return a phrase that names the first input that is not finite; None if all are."""
    for source in sources:
        if count := nonfinite_entries(source):
            entries = "1 entry is" if count == 1 else f"{count:,} entries are"
            return (
                f"{entries} NaN or infinite in {source.name} of {source.checkpoint.name}; download that model again "
                "or leave it out"
            )
    return None


@contextmanager
def name_nan_input(sources: Callable[[], Iterable[Source]]) -> Iterator[None]:
    """Add the input's name to an error about NaN in an input. Raises CheckpointError."""
    try:
        yield
    except NotANumberError as error:
        reason = nonfinite_input(sources())
        raise CheckpointError(f"{error}: {reason}." if reason else f"{error}.") from None


def nonfinite_entries(source: Source) -> int:
    """Return the number of NaN and infinite entries of an input. Raises CheckpointError if it cannot be read."""
    rows = source.checkpoint.rows(source.name)
    if not rows.shape:
        return _count(source.checkpoint.read(source.name))
    return sum(_count(rows[block.rows]) for block in cut(rows.shape, BLOCK_ELEMENTS))


def _count(block: Tensor) -> int:
    if not block.is_floating_point():
        return 0
    compiled = kernels() if block.dtype in KINDS and block.is_contiguous() and block.device.type == "cpu" else None
    return compiled.nonfinite(block) if compiled else block.numel() - int(torch.isfinite(block).sum())
