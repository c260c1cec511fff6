"""The work that a lock tells of, planned again: a merge, a merge with AIM in one pass, or a relaxation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aim.adapters import plan_adapter_relaxation
from aim.config import KEYS as AIM_KEYS
from aim.config import aim_of
from aim.pipeline import plan_relaxation, relaxing_by, relaxing_of
from common.distributed import ProcessGroup
from common.errors import UsageError, nearest
from common.logging import logger
from common.terminal_text import quoted
from merging.lora.either import Either, check_plan_of, make, planned, shown
from merging.output.hub_upload import Push
from merging.output.records.lock import pinned, read_lock
from merging.output.records.next_steps import finish
from merging.plan.merge_plan import Output
from merging.recipe import make_recipe
from merging.recipe.flags import OUTPUT_KEYS
from merging.recipe.options import PLAN_KEYS, PlanOptions

OTHER_VERSION = "Repeat the lock with the version that wrote it, or rename the key in it as CHANGELOG.md says."
RELAXATION_KEYS = (
    "merged_model", "pretrained_model_name", "omega", "numerics", "dtype", "save_as", *PLAN_KEYS, *AIM_KEYS,
)  # fmt: skip
"""Keys that the recipe of a relaxation may have."""


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
        _check_keys(recipe)
        exact: dict[str, str] = {entry["name"]: entry["exact"] for entry in lock["inputs"]}
        merged, base = str(recipe["merged_model"]), str(recipe["pretrained_model_name"])
        options = PlanOptions(**{key: recipe[key] for key in PLAN_KEYS if key in recipe})
        aim = aim_of(recipe, reference=recipe["numerics"] == "reference")
        if len(models) > 1:
            raise UsageError(f"The lock relaxes one merged model, {len(models)} given.")
        first = models[0] if models else exact.get(merged, merged)
        second = base_model or exact.get(base, base)
        if output.save_as == "adapter":
            return plan_adapter_relaxation(first, second, aim, recipe["dtype"], relaxing_by(aim, output), options)
        return plan_relaxation(first, second, aim, output, recipe["dtype"], options=options)
    given = {key: recipe.pop(key) for key in AIM_KEYS if key in recipe}
    try:
        asked = pinned(make_recipe({}, recipe), lock)
    except UsageError as error:
        raise UsageError(f"The recipe of the lock is not one of this version: {error} {OTHER_VERSION}") from error
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
        tokens=tuple(request.renamed(lambda name: moved.get(name, name)) for request in asked.tokens),
    )
    reference = asked.numerics == "reference"
    relaxing = relaxing_of(asked, aim_of(given, reference=reference), output) if given else None
    return planned(asked, output, relaxing)


def _check_keys(recipe: Mapping[str, Any]) -> None:
    """Raise UsageError for a key that a relaxation does not have, such as one of another version."""
    for key in recipe:
        if key not in RELAXATION_KEYS:
            raise UsageError(
                f"The recipe of the lock is not one of this version: performAIM.py has no parameter {quoted(key)}."
                f"{nearest(key, RELAXATION_KEYS)} {OTHER_VERSION}"
            )


def repeat(
    flags: dict[str, Any],
    dry_run: bool,
    as_json: bool,
    process_group: ProcessGroup,
    program: str | None = None,
    push: Push | None = None,
) -> int:
    """Repeat the run of a lock, or print its plan, and return the exit code.

    Args:
        flags: from_lock, flags of the output, and base_model and models_to_merge where the inputs lie elsewhere now.
        dry_run: whether the plan alone is printed, as JSON if `as_json`.
        process_group: the ranks of the run.
        program: the script whose locks alone are repeated; None for any.
        push: where the result is uploaded.

    Raises:
        UsageError: for flags that would change the result, a missing --save_path, or another script's lock.
    """
    lock = read_lock(flags.pop("from_lock"))
    if program is not None and lock["program"] != program:
        raise UsageError(f"The lock is of {lock['program']}; repeat it by `python merge.py --from_lock`.")
    where = {key: flags.pop(key) for key in OUTPUT_KEYS if key in flags and key != "save_as"}
    models, base = flags.pop("models_to_merge", ""), flags.pop("base_model", None)
    if flags:
        raise UsageError(f"--from_lock repeats a recipe as it is; leave out --{next(iter(flags))}.")
    if "save_path" not in where and not dry_run:
        raise UsageError("--save_path is missing: the folder for the repeated checkpoint.")
    given = {"save_path": Path(), "max_shard_size": lock["max_shard_size"], "device": lock["device"], **where}
    load_check = {"load_check": False} if dry_run else {}
    output = Output(**given | load_check, expected=lock, process_group=process_group)
    with process_group.main_process_first():
        work = work_of(lock, output, models.split(",") if models else (), base)
        check_plan_of(work, lock)
    if dry_run:
        print(shown(work, output, as_json))
        return 0
    folder = make(work, output)
    logger.info(f"{folder} repeats the lock: every tensor has its digest.")
    finish(folder, replace(output, save_as=lock["recipe"].get("save_as", "model")), push)
    return 0
