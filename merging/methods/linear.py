"""Linear average of models (model soups). Wortsman et al. 2022, arXiv:2203.05482."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from merging.methods.contract import Method
from merging.ops.consensus import add_to, divided, nonzero_total, weighted_sum
from merging.ops.kernel_spec import WeightedSum
from merging.ops.reference import linear_reference


def linear(base: Tensor | None, finetuned: Tensor, *, weights: Sequence[float], normalize: bool) -> Tensor:
    """Return sum_t w_t theta_t [ / sum_t w_t, if normalize ].

    finetuned (n, rows, ...), weights w (n,) -> (rows, ...); the base has no effect. The average is taken of differences
    from the first model, so that equal models give that model exactly, for any number of them.
    """
    if not normalize:
        return weighted_sum(finetuned, weights)
    anchor = finetuned[0]
    return add_to(anchor, divided(weighted_sum(finetuned - anchor, weights), nonzero_total(weights)))


def reference(base: Tensor | None, finetuned: Sequence[Tensor], *, weights: Sequence[float], normalize: bool) -> Tensor:
    """Return the original's result on whole bf16 tensors."""
    return linear_reference(finetuned, weights=weights, normalize=normalize)


def kernel_spec(*, weights: Sequence[float], normalize: bool) -> WeightedSum:
    """Describe the weighted sum to the compiled kernel."""
    total = nonzero_total(weights)
    return WeightedSum(weights, normalize=normalize, total=total, anchor="first" if normalize else "nothing")


METHOD = Method(merge_block=linear, kernel_spec=kernel_spec, reference=reference, elementwise=True)
