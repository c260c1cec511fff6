"""Whether a result is finite: counted block by block on the CPU, refused at the first entry that is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from common.errors import CheckpointError, NotANumberError
from merging.ops.kernels.kernels import KINDS, kernels
from merging.ops.tensor_blocks import BLOCK_ELEMENTS, cut
from merging.plan.types import Source, TensorPlan


class Finite(tuple[Tensor, ...]):
    """The results of a block that are known to have neither NaN nor infinity: a kernel has looked."""


class Nonfinite:
    """Counts the entries of a tensor that are NaN or infinite, or refuses the first.

    sources: the input tensors that the result is made of, to find the one that is to blame.
    """

    def __init__(self, name: str, allowed: bool, sources: Callable[[], Iterable[Source]] = tuple) -> None:
        self.name, self.allowed, self.count = name, allowed, 0
        self._sources = sources

    def check(self, block: Tensor) -> Tensor:
        """Return the block as it is. Raises CheckpointError naming the tensor, and the input, where it may not be."""
        found = _count(block)
        if found and not self.allowed:
            raise CheckpointError(self._sentence(str(block.dtype).removeprefix("torch.")))
        self.count += found
        return block

    def _sentence(self, kind: str) -> str:
        said = f"Tensor {self.name} of the result is not finite"
        if found := blame(self._sources()):
            return f"{said}: {found} (--allow_nonfinite merges it all the same)."
        return (
            f"{said}, while the inputs are: {kind} cannot hold it, or a weight is NaN or too large; take a wider "
            "--dtype or smaller weights (--allow_nonfinite writes it all the same)."
        )


def sources_of(tensor: TensorPlan) -> list[Source]:
    """Return the inputs of a tensor of the plan, the fine-tuned models first."""
    return [*tensor.models, *([tensor.base] if tensor.base else []), tensor.source]


def blame(sources: Iterable[Source]) -> str | None:
    """Say which of the inputs is the first that is not finite, where any is."""
    for source in sources:
        if count := nonfinite_entries(source):
            entries = "1 entry is" if count == 1 else f"{count:,} entries are"
            return (
                f"{entries} NaN or infinite in {source.name} of {source.checkpoint.name}; download that model again "
                "or leave it out"
            )
    return None


@contextmanager
def blamed(sources: Callable[[], Iterable[Source]]) -> Iterator[None]:
    """Add to an error about NaN in an input which input that is. Raises CheckpointError."""
    try:
        yield
    except NotANumberError as error:
        found = blame(sources())
        raise CheckpointError(f"{error}: {found}." if found else f"{error}.") from None


def nonfinite_entries(source: Source) -> int:
    """Return how many entries of an input are NaN or infinite. Raises CheckpointError where it cannot be read."""
    rows = source.checkpoint.rows(source.name)
    if not rows.shape:
        return _count(source.checkpoint.read(source.name))
    return sum(_count(rows[block.rows]) for block in cut(rows.shape, BLOCK_ELEMENTS))


def _count(block: Tensor) -> int:
    if not block.is_floating_point():
        return 0
    compiled = kernels() if block.dtype in KINDS and block.is_contiguous() and block.device.type == "cpu" else None
    return compiled.nonfinite(block) if compiled else block.numel() - int(torch.isfinite(block).sum())
