"""The work that a lock tells of, planned again: a merge, a merge with AIM in one pass, or a relaxation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aim.calibration import Calibration
from aim.measure import Settings
from aim.run import plan_relaxation, relaxing_of
from console.errors import UsageError
from merging.lock import pinned
from merging.produce import Output, Work
from merging.recipe import make_recipe
from merging.run import plan_merge


def work_of(lock: Mapping[str, Any], output: Output, models: Sequence[str] = (), base_model: str | None = None) -> Work:
    """Plan what the lock tells of, from its inputs by their exact names, or from these where they lie elsewhere now.

    Raises UsageError for another number of models than the lock's.
    """
    recipe = dict(lock["recipe"])
    if "threads" in lock:
        import torch

        torch.set_num_threads(lock["threads"])
    if lock["program"] == "performAIM.py":
        exact: dict[str, str] = {entry["name"]: entry["exact"] for entry in lock["inputs"]}
        merged, base = str(recipe["merged_model"]), str(recipe["pretrained_model_name"])
        importance = recipe["importance"]
        settings = Settings(
            calibration=Calibration(**recipe["calibration"]),
            importance_file=Path(importance) if importance else None,
            reference=recipe["numerics"] == "reference",
            relax_tied=recipe["relax_tied"],
            calibration_dtype=recipe["calibration_dtype"],
            batch_size=recipe["batch_size"],
        )
        if len(models) > 1:
            raise UsageError(f"The lock relaxes one merged model, {len(models)} given.")
        first = models[0] if models else exact.get(merged, merged)
        second = base_model or exact.get(base, base)
        return plan_relaxation(first, second, recipe["omega"], settings, output, recipe["dtype"])
    omega, importance = recipe.pop("omega", None), recipe.pop("importance", None)
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
    )
    relaxing = None
    if omega is not None or importance is not None:
        relaxing = relaxing_of(asked, omega, None if importance is None else Path(importance), output.quiet)
    return plan_merge(asked, output, relaxing)
