"""Recipes of mergekit's other programs, recognized by their keys, with advice for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import UsageError
from common.files.json_values import JsonValue

PROGRAMS = (
    (
        "mergekit-moe",
        ("experts", "gate_mode", "shared_experts", "experts_per_token"),
        "it makes a mixture of experts with a router, which no merge method here does: run `mergekit-moe FILE OUT`, "
        "and merge or relax OUT here as a model",
    ),
    (
        "mergekit-evolve",
        ("genome", "tasks", "population_size", "reference_score"),
        "it searches for the parameters of a recipe: run `mergekit-evolve`, and give the best recipe that it writes "
        "(best_config.yaml) to --config",
    ),
    (
        "bakllama",
        ("layer_slices",),
        "write its slices as `slices` with `sources`, `layer_range` and `merge_method: passthrough`",
    ),
)
"""Program, keys that only its recipes have, and advice."""


def refuse_other_programs(config: Mapping[str, JsonValue]) -> None:
    """Raise UsageError for a recipe of another mergekit program, with its name and advice."""
    for program, keys, advice in PROGRAMS:
        present = [key for key in keys if key in config]
        if program == "mergekit-moe" and config.get("merge_method") in ("moe", "mixture_of_experts"):
            present = present or ["merge_method: moe"]
        if present:
            raise UsageError(f"This is a recipe of {program} (it has {' and '.join(present)}): {advice}.")


def several_recipes(file: Path, documents: Sequence[JsonValue]) -> str:
    """Return the message for a file of several recipes, with an order in which they can be merged."""
    stages = [document if isinstance(document, Mapping) else {} for document in documents]
    names = [str(stage["name"]) for stage in stages if stage.get("name")]
    remaining, ordered = list(stages), []
    while remaining:
        unmerged = {str(stage.get("name")) for stage in remaining}
        ready = [s for s in remaining if not (_models(s) & (unmerged - {str(s.get("name"))}))] or remaining
        ordered += ready
        remaining = [stage for stage in remaining if not any(stage is done for done in ready)]
    order = ", ".join(str(stage.get("name", "the unnamed one")) for stage in ordered)
    if not names:
        return f"--config {file} holds {len(documents)} recipes; give each a file of its own."
    return (
        f"--config {file} holds {len(documents)} recipes of mergekit-multi: save each as a file of its own and merge "
        f"them in this order: {order}; where a recipe names an earlier one, write the folder of that result."
    )


def _models(value: object) -> set[str]:
    """Return all model names in a recipe."""
    if isinstance(value, Mapping):
        return {str(v) for k, v in value.items() if k in ("model", "base_model")}.union(*map(_models, value.values()))
    return set().union(*map(_models, value)) if isinstance(value, list) else set()
