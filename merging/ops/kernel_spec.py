"""Descriptions of a block's computation as data, so that a compiled kernel can do it in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from merging.ops.order_statistics import Threshold

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RandomMask:
    """A random mask: an entry is kept where its word of the Philox stream of the 128-bit `key` is below `limit`."""

    key: int
    limit: int


@dataclass(frozen=True)
class WeightedSum:
    """theta = theta_0 + scaling * sum_t w_t m_t(tau_t) f_t [/ total], over all entries or those that agree in sign.

    Attributes:
        weights: w, n numbers.
        scaling: lambda.
        normalize: divide the sum by `total` or, with elect, by the weight of the entries that agree.
        total: the sum of the weights.
        elect: add only the entries that have the elected sign (TIES).
        zero_sign: the elected sign where the weighted task vectors add up to zero.
        anchor: the tensor that task vectors are differences from and that their sum is added to: the base, the first
            model, or nothing.
        thresholds: of each model, the trim threshold; None where nothing is trimmed.
        masks: of each model, m: a random mask, a bool tensor (rows, ...), or None.
        factors: of each model, f: a number, or a tensor (rows, ...) with one for each entry.
    """

    weights: Sequence[float]
    scaling: float = 1.0
    normalize: bool = False
    total: float = 1.0
    elect: bool = False
    zero_sign: int = 1
    anchor: Literal["base", "first", "nothing"] = "base"
    thresholds: Sequence[Threshold | None] = ()
    masks: Sequence[RandomMask | Tensor | None] = ()
    factors: Sequence[float | Tensor] = ()


@dataclass(frozen=True)
class ColumnWeights:
    """theta = theta_0 + sum_t c_t tau_t with a coefficient per model and column, (n, columns) fp32."""

    coefficients: Tensor


KernelSpec: TypeAlias = WeightedSum | ColumnWeights
