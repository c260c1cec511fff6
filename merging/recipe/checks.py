"""Checks of a recipe: parameters that exclude each other, and settings without effect."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import product
from typing import Any

from common.errors import UsageError
from common.terminal_text import quoted
from merging.recipe.merge_recipe import MergeRecipe
from merging.recipe.method_registry import MergeMethod, find_method
from merging.recipe.schedules import ParameterSchedule


def check(recipe: MergeRecipe, method: MergeMethod) -> None:
    """Raise UsageError where the settings of a recipe exclude each other."""
    if recipe.numerics == "reference" and not method.has_reference:
        raise UsageError(f"--numerics reference repeats the original program, which had no {method.name}.")
    if recipe.numerics == "reference" and not recipe.is_plain:
        raise UsageError(
            "--numerics reference repeats the original program, which merged whole models with one value of each "
            "parameter; leave out slices, modules, filters and lists over the layers."
        )
    if recipe.numerics == "reference" and any(float(density) < 1 for s in _densities(recipe) for density in s.values):
        raise UsageError(
            "--numerics reference reproduces the original program, which merged at density 1; add --density 1."
        )
    switches = {name: recipe.parameters.get(name) for name in ("zero_sum", "trim_scope")}
    if recipe.numerics == "reference" and switches["zero_sum"] == "majority":
        raise UsageError("--numerics reference repeats the original program, where zero_sum is positive; leave it out.")
    if switches["trim_scope"] == "model" and any(schedule.constant is None for schedule in _densities(recipe)):
        raise UsageError(
            "trim_scope model ranks all tensors of a model together, and needs one density for each model; leave out "
            "filters and lists over the layers."
        )
    if switches["zero_sum"] == "majority" and recipe.parameters.get("rescale") == "l1":
        raise UsageError(f"{method.name}: zero_sum majority counts signs before rescaling; leave out rescale l1.")
    for output_slice in recipe.output_slices:
        if not output_slice.models:  # the base is copied
            continue
        schedules = [schedule for name in output_slice.parameters for schedule in output_slice.schedules(name)]
        if all(schedule.is_complete for schedule in schedules):
            names = {"", *(part for s in schedules for part, _ in s.rules if part)}
            turns = {len(values) - 1 for s in schedules for _, values in s.rules}
            depths = {0.0, 1.0, *(i / turn for turn in turns for i in range(turn))}
            for name, depth in product(sorted(names), sorted(depths)):
                check_values(method, output_slice.at(name, depth))


def check_values(method: MergeMethod, values: Mapping[str, Any]) -> None:
    """Raise UsageError where values of parameters exclude each other.

    Args:
        method: The merge method.
        values: {parameter: value} of one tensor.
    """
    pairs = zip(values["density"], values["epsilon"], strict=True) if {"density", "epsilon"} <= values.keys() else ()
    for density, epsilon in pairs:
        if density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            raise UsageError(
                f"{method.name} keeps entries with probability density - epsilon to density + epsilon, which must "
                f"lie between 0 and 1; found {density:g} and {epsilon:g}."
            )
    divides = values.get("normalize_weights") or (method.base == "template" and values.get("normalize"))
    if divides and abs(sum(values.get("weights", [1.0]))) < 1e-8:
        raise UsageError(f"{method.name} divides by the sum of the weights, which is 0; change --weights.")


def remarks(recipe: MergeRecipe) -> list[str]:
    """Return the notes of a recipe: settings without effect, and differences from the program of its file."""
    notes = list(recipe.notes)
    densities = _densities(recipe)
    if densities and all(float(density) >= 1 for schedule in densities for density in schedule.values):
        what = "trims" if recipe.method == "ties" else "drops"
        notes.append(f"density 1: {recipe.method} {what} nothing.")
    if recipe.parameters.get("solver") == "closed_form":
        notes.append("solver closed_form: iterations and learning_rate have no effect.")
    if len(recipe.models) == 1 and find_method(recipe.method).max_models > 1:
        notes.append("One model: there is nothing to reconcile.")
    return notes


def idle_filters(recipe: MergeRecipe, names: Collection[str]) -> list[str]:
    """Return a note for each filter of a parameter that matches no tensor.

    Args:
        recipe: The recipe.
        names: Names of the result's tensors, and of the models' where slices move layers.
    """
    method = find_method(recipe.method)
    filters = {
        (method.parameters[name].mergekit.name or name, part): None
        for output_slice in recipe.output_slices
        for name in output_slice.parameters
        for schedule in output_slice.schedules(name)
        for part, _ in schedule.rules
        if part is not None
    }
    return [
        f"The filter {quoted(part)} of {name} matches no tensor."
        for name, part in filters
        if not any(part in tensor for tensor in names)
    ]


def _densities(recipe: MergeRecipe) -> list[ParameterSchedule]:
    return [
        s
        for output_slice in recipe.output_slices
        if "density" in output_slice.parameters
        for s in output_slice.schedules("density")
    ]
