"""The work that a lock tells of, planned again: a merge, a merge with AIM in one pass, or a relaxation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from aim.adapters import plan_adapter_relaxation
from aim.asked import KEYS as AIM_KEYS
from aim.asked import aim_of
from aim.run import plan_relaxation, relaxing_by, relaxing_of
from console.errors import UsageError
from merging.lock import pinned
from merging.lora.either import Either, planned
from merging.recipe import make_recipe
from merging.work import Output


def work_of(
    lock: Mapping[str, Any], output: Output, models: Sequence[str] = (), base_model: str | None = None
) -> Either:
    """Plan what the lock tells of, from its inputs by their exact names, or from these where they lie elsewhere now.

    Raises UsageError for another number of models than the lock's.
    """
    recipe = dict(lock["recipe"])
    output = replace(output, save_as=recipe.pop("save_as", "model"))
    if "threads" in lock:
        import torch

        torch.set_num_threads(lock["threads"])
    if lock["program"] == "performAIM.py":
        exact: dict[str, str] = {entry["name"]: entry["exact"] for entry in lock["inputs"]}
        merged, base = str(recipe["merged_model"]), str(recipe["pretrained_model_name"])
        aim = aim_of(recipe, reference=recipe["numerics"] == "reference")
        if len(models) > 1:
            raise UsageError(f"The lock relaxes one merged model, {len(models)} given.")
        first = models[0] if models else exact.get(merged, merged)
        second = base_model or exact.get(base, base)
        if output.save_as == "adapter":
            return plan_adapter_relaxation(first, second, aim, recipe["dtype"], relaxing_by(aim, output))
        return plan_relaxation(first, second, aim, output, recipe["dtype"])
    given = {key: recipe.pop(key) for key in AIM_KEYS if key in recipe}
    asked = pinned(make_recipe({}, recipe), lock)
    if models and len(models) != len(asked.models):
        raise UsageError(f"The lock merges {len(asked.models)} models, {len(models)} given.")
    moved = dict(zip(asked.models, models, strict=False)) | ({asked.base_model: base_model} if base_model else {})
    asked = replace(
        asked,
        models=tuple(models) or asked.models,
        base_model=base_model or asked.base_model,
        tokenizer=moved.get(asked.tokenizer, asked.tokenizer),
        chat_template=moved.get(asked.chat_template, asked.chat_template),
        exclude_from=moved.get(asked.exclude_from, asked.exclude_from),
    )
    reference = asked.numerics == "reference"
    relaxing = relaxing_of(asked, aim_of(given, reference=reference), output) if given else None
    return planned(asked, output, relaxing)
