"""One relaxation from importance to finished folder, alone (performAIM.py) or inside a merge (merge.py --omega)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aim.config import Aim
from aim.measure import Settings, check_measured, importance_of
from aim.omegas import omega_text
from aim.relaxer import Relaxer
from common.device import resolve_device
from common.errors import UsageError
from common.logging import logger
from merging.checkpoints.checkpoint import Checkpoint, open_all
from merging.checkpoints.text_part import with_text_parts
from merging.lora.either import Either, make
from merging.output.records.run_record import read_lineage, read_merge_recipe
from merging.pipeline import check_asked
from merging.plan.merge_plan import Output, Relaxing, Variant, Work
from merging.plan.planner import plan
from merging.plan.slices import Inputs
from merging.plan.types import Plan
from merging.planning import copied
from merging.recipe import MergeRecipe
from merging.recipe.options import DEFAULTS, PlanOptions
from merging.recipe.schedules import OutputSlice
from merging.tokenizers.chat_template import choose_template
from merging.tokenizers.choice import choose_vocabulary
from merging.tokenizers.token_ids import read_tokenizers, token_ids

if TYPE_CHECKING:
    from torch import Tensor

    from aim.capture.state import Progress
    from merging.engine.execution import ExecutionConfig
    from merging.methods.contract import Method
    from merging.ops.kernel_spec import WeightedSum

PAPER = "https://arxiv.org/abs/2502.02421"


def folder_of(omega: float) -> str:
    """Return the folder of one omega of several: omega-0.4, with all the digits that tell it from others."""
    return f"omega-{omega_text(omega)}"


def state_file(save_path: Path, settings: Settings) -> Path:
    """Return where an interrupted calibration leaves what it has: beside the importance file, else the output."""
    kept = settings.importance_file or save_path.absolute()
    return kept.with_name(f".{kept.name}.calibration")


class _Relaxation:
    """Makes the relaxer of a run when its base and plan are known, and tells of it afterwards."""

    def __init__(self, aim: Aim, output: Output) -> None:
        self.aim, self.output = aim, output
        self.made: Relaxer | None = None
        self.progress: Progress | None = None

    def make(self, base: Checkpoint, relax_plan: Plan) -> Relaxer:
        """Decide what is relaxed by the importance, which is loaded, or measured by all ranks."""
        settings, output = self.aim.settings, self.output
        device, state = resolve_device(output.device, output.process_group), state_file(output.save_path, settings)
        importance = importance_of(base, settings, device, state, output.process_group, self._keep)
        self.made = Relaxer(importance, self.aim.omegas, self.aim.rule, self.aim.scaling)
        self.made.check(relax_plan)
        logger.info(self.made.sentence())
        return self.made

    def _keep(self, progress: Progress) -> None:
        self.progress = progress

    def finished(self, error: BaseException | None) -> None:
        """Remove the state of a calibration that no importance file holds, once the result stands; else keep it."""
        if self.progress is None:
            return
        if error is None:
            self.progress.clear()
        else:
            self.progress.stop(error)

    def preview(self, base: Checkpoint, relax_plan: Plan) -> list[str]:
        """Say what will be relaxed, where the importance file stands; whose it is, the run finds out from weights."""
        settings = self.aim.settings
        file = settings.importance_file
        if file is None or not file.exists():
            text = ", ".join(settings.calibration.names)
            return [f"AIM: the importance of {base.name} is measured first, on {text}."]
        from aim.importance import Importance  # loads torch

        importance = Importance.load(file)
        check_measured(file, importance.statistic, settings.statistic, importance.numerics)
        relaxer = Relaxer(importance, self.aim.omegas, self.aim.rule, self.aim.scaling)
        relaxer.check(relax_plan)
        return [relaxer.sentence()]

    def details(self, omega: float) -> Mapping[str, Any]:
        """Return what the run record says of one result."""
        assert self.made is not None
        return {"relaxation": self.made.details(omega)}

    def variants(self) -> tuple[Variant, ...]:
        """Return the results: one in the output itself, several in folders of it."""
        omegas = self.aim.omegas
        return tuple(self._variant(omega, folder_of(omega) if len(omegas) > 1 else ".") for omega in omegas)

    def _variant(self, omega: float, folder: str) -> Variant:
        lineage = {"omega": omega, **self.aim.label()}
        return Variant(folder, recipe={"omega": omega}, lineage=lineage, details=lambda: self.details(omega))

    def relaxing(self) -> Relaxing:
        """Return it as what relaxes task vectors in whatever makes them."""
        aim = self.aim
        if self.output.save_as == "adapter" and aim.scaling.needs_whole_tensors:
            raise UsageError(
                f"--control {aim.scaling.control} needs whole tensors, which an adapter does not hold; leave out "
                "--save_as adapter, or give another control."
            )
        return Relaxing(aim.as_recipe(), aim.files, aim.kept, self.make, self.variants(), self.preview, self.finished)


def relaxing_of(recipe: MergeRecipe, aim: Aim, output: Output) -> Relaxing:
    """Return AIM for the loop of a merge. Raises UsageError where the method has no base, or values cannot be.

    Adapters have a base by whatever method.
    """
    if not recipe.uses_base and output.save_as == "model":
        raise UsageError(f"AIM in one pass needs a method with a base; {recipe.method} has none: use performAIM.py.")
    return relaxing_by(aim, output)


def relaxing_by(aim: Aim, output: Output) -> Relaxing:
    """Return AIM for whatever relaxes task vectors. Raises UsageError where values cannot be."""
    aim.check()
    return _Relaxation(aim, output).relaxing()


def perform(
    merged_name: str, base_name: str, aim: Aim, output: Output, dtype: str | None, options: PlanOptions = DEFAULTS
) -> Path:
    """Relax a merged checkpoint or an adapter towards its base and return the folder; several omegas are folders in it.

    dtype of the output: None keeps that of what is relaxed. Raises UsageError, CheckpointError, CalibrationError.
    """
    aim.check()
    check_asked(output, aim.kept)
    with output.process_group.main_process_first():
        work = planned_relaxation(merged_name, base_name, aim, output, dtype, options=options)
    return make(work, output)


def planned_relaxation(
    merged_name: str,
    base_name: str,
    aim: Aim,
    output: Output,
    dtype: str | None,
    headers_only: bool = False,
    options: PlanOptions = DEFAULTS,
) -> Either:
    """Decide everything about a relaxation of a model or an adapter; headers_only: for a look at the plan alone."""
    aim.check()
    relaxation = _Relaxation(aim, output)
    if output.save_as == "adapter":
        from aim.adapters import plan_adapter_relaxation

        return plan_adapter_relaxation(merged_name, base_name, aim, dtype, relaxation.relaxing(), options)
    return plan_relaxation(merged_name, base_name, aim, output, dtype, relaxation, headers_only, options)


def plan_relaxation(
    merged_name: str,
    base_name: str,
    aim: Aim,
    output: Output,
    dtype: str | None,
    relaxation: _Relaxation | None = None,
    headers_only: bool = False,
    options: PlanOptions = DEFAULTS,
) -> Work:
    """Open the two checkpoints and decide everything about the relaxation; the importance is read or measured later.

    headers_only: download no weights, and compare none; such a work can be described and not produced.
    """
    aim.check()
    merged, base = open_all([merged_name, base_name], headers_only=headers_only)
    if merged.exact_name == base.exact_name:
        raise UsageError(f"--merged_model and --pretrained_model_name are both {merged.name}: nothing to relax.")
    if not headers_only and _same_weights(merged, base):
        raise UsageError(
            f"--merged_model {merged.name} and --pretrained_model_name {base.name} hold the same weights: nothing to "
            "relax."
        )
    lineage: Mapping[str, Any] = read_lineage(merged)
    if lineage["base_model"] is None:
        lineage = {**lineage, "base_model": base.ref.full_name}
    (base,) = with_text_parts(merged, [base])
    inputs = Inputs(merged, (merged,), base)
    read_tokenizers([merged.folder, base.folder], in_subprocess=not output.tries_loading)
    owner = merged if token_ids(merged.folder) is not None else base
    vocabulary = choose_vocabulary("base", owner, [])
    reference = aim.settings.reference
    wanted = "bfloat16" if reference and dtype is None else dtype
    relax_plan = plan(inputs, [OutputSlice((0,), {})], wanted, vocabulary, options=options)
    relaxation = relaxation or _Relaxation(aim, output)

    def make_job() -> ExecutionConfig:
        from merging.engine.execution import ExecutionConfig  # loads torch

        device = resolve_device(output.device, output.process_group)
        relaxer = relaxation.make(base, relax_plan)
        return ExecutionConfig(merged_alone(), device, reference=reference, relaxation=relaxer)

    notes = [*relax_plan.notes, *copied(relax_plan)]
    if aim.omegas == (1.0,) and not reference:
        notes.append("omega 1: the merged model is left as it is.")
    if owner is base and vocabulary.tokens is not None:
        notes.append(f"{merged.name} has no tokenizer; the base's is saved.")
    recipe = {
        "merged_model": merged_name,
        "pretrained_model_name": base_name,
        "omega": list(aim.omegas),
        "numerics": "reference" if reference else "float32",
        "dtype": dtype,
        **options.as_yaml_dict(),
        **aim.as_recipe(),
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
        variants=relaxation.variants(),
        files=aim.files,
        merge_recipe=read_merge_recipe(merged),
        preview=lambda: relaxation.preview(base, relax_plan),
        finished=relaxation.finished,
    )


def _same_weights(merged: Checkpoint, base: Checkpoint) -> bool:
    """True where two checkpoints have equal tensors: the first values of each, and where all agree every value."""
    import torch

    from merging.ops.tensor_blocks import BLOCK_ELEMENTS, cut

    if {n: i.shape for n, i in merged.tensors.items()} != {n: i.shape for n, i in base.tensors.items()}:
        return False
    shaped = [name for name, info in merged.tensors.items() if info.shape and 0 not in info.shape]
    if not all(
        torch.equal(merged.rows(name)[:1].flatten()[:256], base.rows(name)[:1].flatten()[:256]) for name in shaped
    ):
        return False
    numbers = [name for name, info in merged.tensors.items() if not info.shape]
    return all(torch.equal(merged.read(name), base.read(name)) for name in numbers) and all(
        torch.equal(merged.rows(name)[block.rows], base.rows(name)[block.rows])
        for name in shaped
        for block in cut(torch.Size(merged.tensors[name].shape), BLOCK_ELEMENTS)
    )


def merged_alone() -> Method:
    """Return the method that gives the merged model unchanged: the start of a relaxation."""
    from merging.methods.contract import Method  # loads torch

    return Method(merge_block=_merged, kernel_spec=_merged_spec, reference=_merged, elementwise=True)


def _merged(base: Tensor | None, finetuned: Tensor) -> Tensor:
    return finetuned[0]


def _merged_spec() -> WeightedSum:
    """Describe `_merged` to the compiled kernel."""
    from merging.ops.kernel_spec import WeightedSum

    return WeightedSum([1.0], anchor="nothing")
