"""One relaxation from importance to finished folder, alone (performAIM.py) or inside a merge (merge.py --omega)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aim.measure import Settings, importance_of, load_importance
from aim.relaxer import Relaxer, check_omega
from console.cli import say
from console.errors import UsageError
from merging.chat_template import choose_template
from merging.checkpoint import Checkpoint, open_all
from merging.layout import Inputs
from merging.planned import Plan
from merging.preflight import plan
from merging.produce import Output, Relaxing, Work, produce
from merging.recipe import MergeRecipe
from merging.registry import Implementation
from merging.run import copied
from merging.settings import Section
from merging.sidefiles import read_lineage
from merging.stage import check_target
from merging.tokenizer import choose_vocabulary
from merging.vocabulary import token_ids
from merging.writer import parse_size

if TYPE_CHECKING:
    from merging.stream import Job

PAPER = "https://arxiv.org/abs/2502.02421"


def relaxing_of(
    recipe: MergeRecipe, omega: float | None, importance_file: Path | None, quiet: bool = False
) -> Relaxing:
    """Return AIM for the loop of a merge. Raises UsageError where omega, importance or base is missing."""
    if omega is None or importance_file is None:
        raise UsageError("AIM in one pass needs both --omega and --importance FILE (performAIM.py makes such a file).")
    check_omega(omega)
    if not recipe.uses_base:
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

    return Relaxing(omega, file, make, details=lambda: {"relaxation": made[0].details()})


def perform(
    merged_name: str, base_name: str, omega: float, settings: Settings, output: Output, dtype: str | None
) -> Path:
    """Relax a merged checkpoint towards its base and return the folder.

    dtype of the output: None keeps the merged checkpoint's. Raises UsageError, CheckpointError, CalibrationError.
    """
    kept = [settings.importance_file] if settings.importance_file else []
    kept += [Path(settings.calibration.source)] if settings.calibration.source != "pile" else []
    check_target(output.save_path, output.overwrite, kept)
    parse_size(output.max_shard_size)
    return produce(plan_relaxation(merged_name, base_name, omega, settings, output, dtype), output)


def _lasting(source: str) -> str:
    """The calibration source as it is found from any folder."""
    return source if source == "pile" else str(Path(source).resolve())


def plan_relaxation(
    merged_name: str, base_name: str, omega: float, settings: Settings, output: Output, dtype: str | None
) -> Work:
    """Open the two checkpoints and decide everything about the relaxation; the importance is read or measured later."""
    check_omega(omega)
    settings.calibration.check()
    merged, base = open_all([merged_name, base_name])
    if merged.exact_name == base.exact_name:
        raise UsageError(f"--merged_model and --pretrained_model_name are both {merged.name}: nothing to relax.")
    lineage: Mapping[str, Any] = {**read_lineage(merged), "omega": omega}
    if lineage["base_model"] is None:
        lineage = {**lineage, "base_model": base.ref.full_name}
    inputs = Inputs(merged, (merged,), base)
    owner = merged if token_ids(merged.folder) is not None else base
    vocabulary = choose_vocabulary("base", owner, [])
    wanted = "bfloat16" if settings.reference and dtype is None else dtype
    relax_plan = plan(inputs, [Section((0,), {})], wanted, vocabulary)
    made: list[Relaxer] = []

    def make_job() -> Job:
        from merging import stream  # loads torch

        device = stream.resolve_device(output.device)
        relaxer = Relaxer(importance_of(base, settings, device, output.quiet), omega, settings.relax_tied)
        relaxer.check(relax_plan)
        say(relaxer.sentence(), output.quiet)
        made.append(relaxer)
        identity = Implementation(lambda base, finetuned: finetuned[0], None, lambda base, finetuned: finetuned[0])
        return stream.Job(identity, device, reference=settings.reference, relaxation=relaxer)

    notes = [*relax_plan.notes, *copied(relax_plan)]
    if omega == 1 and not settings.reference:
        notes.append("omega 1: the merged model is left as it is.")
    if owner is base and vocabulary.tokens is not None:
        notes.append(f"{merged.name} has no tokenizer; the base's is saved.")
    recipe = {
        "merged_model": merged_name,
        "pretrained_model_name": base_name,
        "omega": omega,
        "numerics": "reference" if settings.reference else "float32",
        "relax_tied": settings.relax_tied,
        "dtype": dtype,
        "importance": str(settings.importance_file.resolve()) if settings.importance_file else None,
        "calibration": {**asdict(settings.calibration), "source": _lasting(settings.calibration.source)},
        "calibration_dtype": settings.calibration_dtype,
        "batch_size": settings.batch_size,
    }
    return Work(
        program="performAIM.py",
        label="relaxing",
        paper=PAPER,
        inputs=inputs,
        plan=relax_plan,
        template=choose_template("base", vocabulary.folder, merged, [base]),
        recipe=recipe,
        sources={},
        lineage=lineage,
        notes=tuple(notes),
        make_job=make_job,
        details=lambda: {"relaxation": made[0].details()},
        files={"importance": settings.importance_file} if settings.importance_file else {},
    )
