"""Merges of adapters that are adapters again: those that add up task vectors, each times one number a tensor.

    theta = theta_0 + sum_t c_t (theta_t - theta_0),   theta_t - theta_0 = s_t B_t A_t
          = theta_0 + [c_1 s_1 B_1, ..., c_n s_n B_n] [A_1; ...; A_n]

Methods that drop, trim or choose entries (TIES, DARE, WIDEN, ...) leave the space of such products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from common.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from merging.recipe import MergeRecipe

PLAIN = ("linear", "task_arithmetic", "passthrough")
"""Methods whose coefficients follow from the parameters."""
ANGULAR = ("model_stock", "nuslerp", "multislerp")
"""Methods whose coefficients follow from the inner products of the task vectors, which small matrices give."""


def check_recipe(recipe: MergeRecipe) -> None:
    """Refuse a recipe whose result is no adapter. Raises UsageError that says what works."""
    if recipe.method not in (*PLAIN, *ANGULAR):
        raise UsageError(
            f"--save_as adapter: {recipe.method} changes single entries, and its result is no product of two small "
            f"matrices; use {', '.join((*PLAIN, *ANGULAR))}, or leave --save_as adapter out to save the whole model."
        )
    if recipe.numerics == "reference":
        raise UsageError("--save_as adapter does not work with --numerics reference, which is for whole models.")
    if recipe.pad_to_multiple_of is not None:
        raise UsageError(
            "--save_as adapter: pad_to_multiple_of gives the base more rows, which an adapter over it does not have; "
            "take it away."
        )
    if recipe.tokens:
        raise UsageError("tokenizer.tokens is for merges of models; with --save_as adapter leave it out.")
    if recipe.exclude is not None:
        raise UsageError("--exclude is for merges of models; with --save_as adapter leave it out.")
    if any(output_slice.layers is not None for output_slice in recipe.output_slices):
        raise UsageError("--save_as adapter: slices move layers of the base; leave --save_as adapter out.")
    if recipe.method in ANGULAR and recipe.base_model is None:
        raise UsageError(f"--save_as adapter: {recipe.method} works on task vectors only with --base_model.")


def check_parameters(method: str, parameters: Mapping[str, Any]) -> None:
    """Refuse values by which the base itself would be scaled, or rows get coefficients of their own. UsageError."""
    weights = parameters.get("weights", [1.0])
    if method == "linear" and not parameters["normalize"] and abs(sum(weights) - 1) > 1e-9:
        raise UsageError(
            f"--save_as adapter: linear without normalize scales the base by the sum of the weights, {sum(weights):g}; "
            "use task_arithmetic, or weights that add up to 1."
        )
    if method == "passthrough" and parameters["scale"] != 1:
        raise UsageError(
            "--save_as adapter: the scale of passthrough scales the base too; use task_arithmetic with --weights."
        )
    per_row = {"model_stock": parameters.get("filter_wise"), "nuslerp": parameters.get("nuslerp_flatten") is False}
    if per_row.get(method):
        raise UsageError(
            f"--save_as adapter: {method} is an adapter only with one coefficient for a whole tensor; take "
            f"{'filter_wise' if method == 'model_stock' else 'no-nuslerp_flatten'} away."
        )


def coefficients(
    method: str, name: str, parameters: Mapping[str, Any], count: int, products: Callable[[], Tensor] | None = None
) -> list[float]:
    """Return c_t for each of `count` adapters, for the tensor `name`.

    products: gives the inner products (count, count) fp64 of the task vectors, which the ANGULAR methods ask for.
    Raises CheckpointError where directions cancel (multislerp).
    """
    if method == "passthrough":
        return [1.0]
    if method in PLAIN:
        return _plain(parameters)
    assert products is not None
    if method == "model_stock":
        from merging.methods.model_stock import interpolation

        return [float(interpolation(products()[None], count)) / count] * count
    if method == "nuslerp":
        from merging.methods.nuslerp import arc, arc_position

        g = products()
        return arc(g[0, 0], g[1, 1], g[0, 1], arc_position(parameters["weights"])).tolist()
    from merging.methods.multislerp import barycenter

    settings = parameters["weights"], parameters["normalize_weights"], parameters["eps"]
    return [1.0] if count == 1 else barycenter(name, products(), *settings)


def _plain(parameters: Mapping[str, Any]) -> list[float]:
    from merging.ops.consensus import nonzero_total

    weights: Sequence[float] = parameters["weights"]
    divisor = nonzero_total(weights) if parameters["normalize"] else 1.0
    return [w * parameters.get("scaling", 1.0) / divisor for w in weights]
