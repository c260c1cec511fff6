"""One relaxation from importance to finished folder, alone (performAIM.py) or inside a merge (merge.py --omega)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aim.measure import Settings, importance_of, load_importance
from aim.relaxer import Relaxer, check_omega
from console.cli import say
from console.errors import UsageError
from merging.checkpoint import Checkpoint, open_all
from merging.preflight import Plan, check_space, plan
from merging.recipe import MergeRecipe
from merging.registry import Implementation, find_method
from merging.run import Output, Relaxing, copied
from merging.sidefiles import (
    copy_tokenizer,
    describe_inputs,
    make_configs,
    read_lineage,
    write_card,
    write_configs,
    write_record,
)
from merging.writer import ShardedWriter, check_target, parse_size, staged

PAPER = "https://arxiv.org/abs/2502.02421"


def relaxing_of(
    recipe: MergeRecipe, omega: float | None, importance_file: Path | None, quiet: bool = False
) -> Relaxing:
    """Return AIM for the loop of a merge. Raises UsageError where omega, importance or base is missing."""
    if omega is None or importance_file is None:
        raise UsageError("AIM in one pass needs both --omega and --importance FILE (performAIM.py makes such a file).")
    check_omega(omega)
    if recipe.base_model is None or find_method(recipe.method).base == "donor":
        raise UsageError(f"AIM in one pass needs a method with a base; {recipe.method} has none: use performAIM.py.")
    file = importance_file
    if not file.is_file():
        raise UsageError(
            f"--importance {file} does not exist; performAIM.py --importance {file} computes and saves it."
        )
    made: list[Relaxer] = []

    def make(base: Checkpoint, merge_plan: Plan) -> Relaxer:
        reference = recipe.numerics == "reference"
        made.append(Relaxer(load_importance(file, base, reference), omega, relax_tied=reference))
        made[0].check(merge_plan)
        say(made[0].sentence(), quiet)
        return made[0]

    return Relaxing(omega=omega, importance_file=file, make=make, details=lambda: made[0].details())


def perform(
    merged_name: str, base_name: str, omega: float, settings: Settings, output: Output, dtype: str | None
) -> Path:
    """Relax a merged checkpoint towards its base and return the folder.

    dtype of the output: None keeps the merged checkpoint's. Raises UsageError, CheckpointError, CalibrationError.
    """
    started = time.perf_counter()
    check_omega(omega)
    settings.calibration.check()
    kept = [settings.importance_file] if settings.importance_file else []
    kept += [Path(settings.calibration.source)] if settings.calibration.source != "pile" else []
    check_target(output.save_path, output.overwrite, kept)
    max_shard_bytes = parse_size(output.max_shard_size)
    merged, base = open_all([merged_name, base_name])
    if merged.folder.resolve() == base.folder.resolve():
        raise UsageError(f"--merged_model and --pretrained_model_name are both {merged.name}: nothing to relax.")
    check_target(output.save_path, output.overwrite, [merged.folder, base.folder])
    lineage: Mapping[str, Any] = {**read_lineage(merged), "omega": omega}
    if lineage["base_model"] is None:
        lineage = {**lineage, "base_model": base.ref.full_name}
    relax_plan = plan(merged, [merged, base], "bfloat16" if settings.reference and dtype is None else dtype)
    configs = make_configs(merged, [base], relax_plan)
    for note in (*relax_plan.notes, *copied(relax_plan)):
        say(note, output.quiet)
    if omega == 1 and not settings.reference:
        say("omega 1: the merged model is left as it is.", output.quiet)
    check_space(output.save_path, relax_plan.bytes)
    from merging import stream  # loads torch

    device = stream.resolve_device(output.device)
    relaxer = Relaxer(importance_of(base, settings, device, output.quiet), omega, settings.relax_tied)
    relaxer.check(relax_plan)
    say(relaxer.sentence(), output.quiet)
    identity = Implementation(lambda base, finetuned: finetuned[0], None, lambda base, finetuned: finetuned[0])
    job = stream.Job(identity, {}, device, reference=settings.reference, relaxation=relaxer)
    recipe = {
        "merged_model": merged_name,
        "pretrained_model_name": base_name,
        "omega": omega,
        "numerics": "reference" if settings.reference else "float32",
    }
    with staged(output.save_path, output.overwrite) as folder:
        writer = ShardedWriter(folder, relax_plan.tensors, max_shard_bytes)
        stream.run(relax_plan, job, base, [merged], merged, writer, output.quiet, label="relaxing")
        writer.close()
        donor = merged if copy_tokenizer(merged, folder) else base
        if donor is base:
            copy_tokenizer(base, folder)
            say(f"{merged.name} has no tokenizer; the base's was saved.", output.quiet)
        write_configs(folder, configs)
        write_card(folder, output.save_path.name, lineage, recipe, PAPER)
        details = {
            "recipe": recipe,
            "inputs": describe_inputs([base, merged]),
            "notes": list(relax_plan.notes),
            "relaxation": relaxer.details(),
            "tokenizer": {"from": donor.name},
            "device": str(device),
            "seconds": round(time.perf_counter() - started, 3),
        }
        write_record(folder, lineage, details)
    return output.save_path
