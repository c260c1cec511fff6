"""One merge from recipe to finished folder: open, plan, stage, stream, describe."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from console.cli import say
from merging.checkpoint import Checkpoint, open_all
from merging.preflight import Plan, check_distinct, check_space, plan
from merging.recipe import MergeRecipe, remarks
from merging.registry import find_method
from merging.sidefiles import copy_tokenizer, describe_inputs, make_configs, write_card, write_configs, write_record
from merging.writer import ShardedWriter, check_target, parse_size, staged


@dataclass(frozen=True)
class Output:
    """Where and how the merged checkpoint is written."""

    save_path: Path
    max_shard_size: str = "5GB"
    overwrite: bool = False
    device: str = "auto"
    quiet: bool = False


@dataclass(frozen=True)
class Relaxing:
    """AIM applied in the same pass: made by the caller from the base, since merging knows no activations.

    `make(base, plan)` returns the relaxation of the loop; `details` is called after it for the run record.
    """

    omega: float
    importance_file: Path
    make: Callable[[Checkpoint, Plan], Any]
    details: Callable[[], Mapping[str, Any]]


def merge(recipe: MergeRecipe, output: Output, relaxing: Relaxing | None = None) -> Path:
    """Merge as the recipe says and return the folder. Raises UsageError, CheckpointError or FailureError."""
    started = time.perf_counter()
    check_target(output.save_path, output.overwrite, [relaxing.importance_file] if relaxing else [])
    max_shard_bytes = parse_size(output.max_shard_size)
    method = find_method(recipe.method)
    opened = open_all([*recipe.models, *([recipe.base_model] if recipe.base_model else [])])
    models, donor = opened[: len(recipe.models)], opened[-1] if recipe.base_model else opened[0]
    base = donor if method.base == "required" or (method.base == "optional" and recipe.base_model) else None
    check_distinct(donor if recipe.base_model else None, models)
    check_target(output.save_path, output.overwrite, [checkpoint.folder for checkpoint in opened])
    merge_plan = plan(donor, [*models, base] if base else models, recipe.dtype)
    configs = make_configs(donor, models, merge_plan)
    for note in (*remarks(recipe), *merge_plan.notes, *copied(merge_plan)):
        say(note, output.quiet)
    check_space(output.save_path, merge_plan.bytes)
    relaxation = relaxing.make(donor, merge_plan) if relaxing else None
    from merging import stream  # loads torch

    job = stream.Job(
        implementation=method.implementation(),
        parameters=recipe.parameters,
        device=stream.resolve_device("cpu" if recipe.numerics == "reference" else output.device),
        seed=recipe.seed,
        reference=recipe.numerics == "reference",
        relaxation=relaxation,
    )
    lineage = {
        "method": recipe.method,
        "base_model": donor.ref.full_name if recipe.base_model else None,
        "models": [model.ref.full_name for model in models],
        "omega": relaxing.omega if relaxing else None,
    }
    asked = recipe.as_yaml_dict()
    if relaxing:
        asked |= {"omega": relaxing.omega, "importance": str(relaxing.importance_file)}
    with staged(output.save_path, output.overwrite) as folder:
        writer = ShardedWriter(folder, merge_plan.tensors, max_shard_bytes)
        stream.run(merge_plan, job, base, models, donor, writer, output.quiet)
        writer.close()
        tokenizer_files = copy_tokenizer(donor, folder)
        write_configs(folder, configs)
        write_card(folder, output.save_path.name, lineage, asked, method.paper)
        details = {
            "recipe": asked,
            "sources": dict(recipe.sources),
            "inputs": describe_inputs(_unique(donor, models)),
            "tensors": {
                "merged": sum(t.is_float for t in merge_plan.tensors),
                "copied": sum(not t.is_float for t in merge_plan.tensors),
                "aligned": [t.name for t in merge_plan.tensors if any(t.alignments)],
                "left_out": dict(merge_plan.left_out),
            },
            "notes": list(merge_plan.notes),
            "tokenizer": {"from": donor.name, "files": tokenizer_files},
            "device": str(job.device),
            **({"relaxation": relaxing.details()} if relaxing else {}),
            "seconds": round(time.perf_counter() - started, 3),
        }
        write_record(folder, lineage, details)
    if not tokenizer_files:
        say(f"{donor.name} has no tokenizer files; the result has none.", output.quiet)
    return output.save_path


def copied(merge_plan: Plan) -> list[str]:
    """Return the sentence on tensors that are copied from the donor because they hold no floating-point numbers."""
    names = [tensor.name for tensor in merge_plan.tensors if not tensor.is_float]
    return [f"Copied, not merged: {', '.join(names[:3])} ({len(names)} tensors of whole numbers)."] if names else []


def _unique(donor: Checkpoint, models: list[Checkpoint]) -> list[Checkpoint]:
    return models if any(model is donor for model in models) else [donor, *models]
