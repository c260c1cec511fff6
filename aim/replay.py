"""Replay: from a lock to the plan that repeats its run, a merge, a merge with AIM in one pass, or a relaxation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from aim.config import KEYS as AIM_KEYS
from aim.config import AimConfig
from aim.pipeline import plan_relaxation, relaxation_spec
from common.errors import UsageError, nearest
from common.files.json_values import JsonValue
from common.terminal_text import quoted
from merging.output.records.lock import pinned
from merging.plan.merge_plan import MergePlan, OutputConfig
from merging.planning import plan_merge
from merging.recipe import make_recipe
from merging.recipe.merge_recipe import PLAN_KEYS, PlanOptions

OTHER_VERSION = "Repeat the lock with the version that wrote it, or rename the key in it as CHANGELOG.md says."
RELAXATION_KEYS = (
    "merged_model", "pretrained_model_name", "omega", "numerics", "dtype", "save_as", *PLAN_KEYS, *AIM_KEYS,
)  # fmt: skip
"""Keys that the recipe of a relaxation may have."""


def plan_from_lock(
    lock: Mapping[str, JsonValue], output: OutputConfig, models: Sequence[str] = (), base_model: str | None = None
) -> MergePlan:
    """Plan the run of a lock.

    Args:
        lock: as `read_lock` returns it.
        output: of the run; its kind of result is the lock's.
        models: present names of the models, where they are not at the lock's exact names.
        base_model: the same of the base.

    Raises:
        UsageError: for another number of models than the lock's, or a recipe of another version.
        CheckpointError: for inputs that are broken or do not fit together.
    """
    recipe = dict(lock["recipe"])
    output = replace(output, save_as=recipe.pop("save_as", "model"))
    if "threads" in lock:
        import torch

        torch.set_num_threads(lock["threads"])
    if lock["program"] == "performAIM.py":
        return _plan_relaxation(recipe, lock, output, models, base_model)
    aim = {key: recipe.pop(key) for key in AIM_KEYS if key in recipe}
    try:
        merge = pinned(make_recipe({}, recipe), lock)
    except UsageError as error:
        raise UsageError(f"The recipe of the lock is not one of this version: {error} {OTHER_VERSION}") from error
    if models and len(models) != len(merge.models):
        raise UsageError(f"The lock merges {len(merge.models)} models, {len(models)} given.")
    names = dict(zip(merge.models, models, strict=False)) | ({merge.base_model: base_model} if base_model else {})
    merge = replace(
        merge,
        models=tuple(models) or merge.models,
        base_model=base_model or merge.base_model,
        tokenizer=names.get(merge.tokenizer, merge.tokenizer),
        chat_template=names.get(merge.chat_template, merge.chat_template),
        exclude_from=names.get(merge.exclude_from, merge.exclude_from),
        tokens=tuple(request.renamed(lambda name: names.get(name, name)) for request in merge.tokens),
    )
    if not aim:
        return plan_merge(merge, output)
    config = AimConfig.from_mapping(aim, reference=merge.numerics == "reference")
    return plan_merge(merge, output, relaxation_spec(config, output, merge))


def _plan_relaxation(
    recipe: Mapping[str, JsonValue],
    lock: Mapping[str, JsonValue],
    output: OutputConfig,
    models: Sequence[str],
    base_model: str | None,
) -> MergePlan:
    """Plan the relaxation of a lock; models: at most the merged model."""
    for key in recipe:
        if key not in RELAXATION_KEYS:
            raise UsageError(
                f"The recipe of the lock is not one of this version: performAIM.py has no parameter {quoted(key)}."
                f"{nearest(key, RELAXATION_KEYS)} {OTHER_VERSION}"
            )
    if len(models) > 1:
        raise UsageError(f"The lock relaxes one merged model, {len(models)} given.")
    exact: dict[str, str] = {entry["name"]: entry["exact"] for entry in lock["inputs"]}
    merged, base = str(recipe["merged_model"]), str(recipe["pretrained_model_name"])
    return plan_relaxation(
        models[0] if models else exact.get(merged, merged),
        base_model or exact.get(base, base),
        AimConfig.from_mapping(recipe, reference=recipe["numerics"] == "reference"),
        output,
        recipe["dtype"],
        PlanOptions(**{key: recipe[key] for key in PLAN_KEYS if key in recipe}),
    )
