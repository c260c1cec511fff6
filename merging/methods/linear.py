"""Linear average of models (model soups). Wortsman et al. 2022, arXiv:2203.05482."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from merging.ops.combination import Combination
from merging.ops.consensus import add_to, divided, nonzero_total, weighted_sum
from merging.ops.reference import linear_reference
from merging.ops.tensor_blocks import Block, PerBlock
from merging.recipe.method_registry import merge_method


def linear(base: Tensor | None, finetuned: Tensor, *, weights: Sequence[float], normalize: bool) -> Tensor:
    """theta = sum_t w_t theta_t [ / sum_t w_t, if normalize ]

    finetuned (n, rows, ...), weights n floats -> (rows, ...); the base does not enter. The average is taken around
    the first model, so that equal models give that model exactly, for any number of them.
    """
    if not normalize:
        return weighted_sum(finetuned, weights)
    anchor = finetuned[0]
    return add_to(anchor, divided(weighted_sum(finetuned - anchor, weights), nonzero_total(weights)))


def reference(base: Tensor | None, finetuned: Sequence[Tensor], *, weights: Sequence[float], normalize: bool) -> Tensor:
    """The original's arithmetic on whole bf16 tensors."""
    return linear_reference(finetuned, weights=weights, normalize=normalize)


def fused(block: Block, arguments: Mapping[str, Any], per_block: PerBlock | None) -> Combination:
    """Say `linear` to the kernel."""
    weights, normalize = arguments["weights"], arguments["normalize"]
    around: Literal["first", "nothing"] = "first" if normalize else "nothing"
    return Combination(weights, normalize=normalize, total=nonzero_total(weights), around=around)


METHOD = merge_method(by_entry=True, reference=reference, fused=fused)(linear)
