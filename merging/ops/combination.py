"""What many methods do with a block, said as data, so that a compiled kernel can do it in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from merging.ops.kernels.kernels import Kernels
    from merging.ops.selection import Threshold
    from merging.ops.tensor_blocks import Block


@dataclass(frozen=True)
class Draw:
    """A random mask: an entry is kept where its word of the Philox stream of the 128-bit `key` is below `limit`."""

    key: int
    limit: int


@dataclass(frozen=True)
class Combination:
    """theta = theta_0 + scaling * sum_t w_t kept_t(tau_t) [/ total], over all entries or those that agree in sign.

    around: what task vectors are taken from and added to: the base, the first model, or nothing. normalize: whether
    the sum is divided by `total` or, with elect, by the weight of what agrees. What is kept of each model's task
    vector: above its threshold, and under its mask, times its factor (a number, or one for each entry).
    """

    weights: Sequence[float]
    scaling: float = 1.0
    normalize: bool = False
    total: float = 1.0
    elect: bool = False
    zero_sign: int = 1
    around: Literal["base", "first", "nothing"] = "base"
    thresholds: Sequence[Threshold | None] = ()
    masks: Sequence[Draw | Tensor | None] = ()
    factors: Sequence[float | Tensor] = ()

    def into(self, kernels: Kernels, base: Tensor | None, models: Sequence[Tensor], block: Block, out: Tensor) -> bool:
        """Compute a block into out (rows, ...), fp32 or bf16; False where something is not finite."""
        return kernels.combine(base, models, self, block, out)


@dataclass(frozen=True)
class ByColumn:
    """theta = theta_0 + sum_t c_t tau_t with a coefficient per model and column, (n, columns) fp32."""

    coefficients: Tensor

    def into(self, kernels: Kernels, base: Tensor, models: Sequence[Tensor], block: Block, out: Tensor) -> bool:
        """Compute a block into out (rows, columns), fp32 or bf16; False where it is not finite, or of other width."""
        if self.coefficients.shape[1] * out.shape[0] != out.numel():
            return False
        return kernels.by_column(base, models, self.coefficients, out)
