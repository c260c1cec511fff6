"""Whether a result is finite: counted block by block on the CPU, refused at the first entry that is not."""

from __future__ import annotations

import torch
from torch import Tensor

from console.errors import CheckpointError
from merging.native.kernels import KINDS, kernels


class Nonfinite:
    """Counts the entries of a tensor that are NaN or infinite, or refuses the first."""

    def __init__(self, name: str, allowed: bool) -> None:
        self.name, self.allowed, self.count = name, allowed, 0

    def check(self, block: Tensor) -> Tensor:
        """Return the block as it is. Raises CheckpointError naming the tensor where it may not be so."""
        if block.is_floating_point():
            found = _count(block)
            if found and not self.allowed:
                kind = str(block.dtype).removeprefix("torch.")
                raise CheckpointError(
                    f"Tensor {self.name} of the result is not finite: an input or a weight is NaN or infinite, "
                    f"or {kind} cannot hold the result (--allow_nonfinite writes it all the same)."
                )
            self.count += found
        return block


def _count(block: Tensor) -> int:
    compiled = kernels() if block.dtype in KINDS and block.is_contiguous() and block.device.type == "cpu" else None
    return compiled.nonfinite(block) if compiled else block.numel() - int(torch.isfinite(block).sum())
