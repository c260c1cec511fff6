"""AIM on the pipeline of `merging`: alone on a merged checkpoint or adapter (performAIM.py), or inside a merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from aim.config import AimConfig
from aim.measure import Settings, check_measured, importance_of
from aim.omegas import omega_folder
from aim.relaxer import Relaxer
from common.device import resolve_device
from common.errors import UsageError
from common.files.json_values import JsonObject, JsonValue
from common.logging import logger
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.hub import local_paths
from merging.pipeline import run
from merging.plan.merge_plan import MergePlan, OutputConfig, RelaxationLineage, RelaxationSpec, Variant
from merging.plan.types import Plan
from merging.planning import plan_merge
from merging.recipe import MergeRecipe
from merging.recipe.merge_recipe import DEFAULTS, PlanOptions
from merging.recipe.schedules import OutputSlice, ParameterSchedule

if TYPE_CHECKING:
    from torch import Tensor

    from aim.capture.state import Progress
    from merging.methods.contract import Method
    from merging.ops.kernel_spec import WeightedSum


def state_file(save_path: Path, settings: Settings) -> Path:
    """Return the file of an interrupted calibration's state: beside the importance file, else the output."""
    result = settings.importance_file or save_path.absolute()
    return result.with_name(f".{result.name}.calibration")


class _RunRelaxation:
    """Relaxation of one run: its relaxer is made when base and plan are known, and described afterwards."""

    def __init__(self, aim: AimConfig, output: OutputConfig) -> None:
        self.aim, self.output = aim, output
        self.relaxer: Relaxer | None = None
        self.progress: Progress | None = None

    def make(self, base: Checkpoint, plan: Plan) -> Relaxer:
        """Decide what is relaxed by the importance, which is loaded, or measured with the run's other processes."""
        settings, output = self.aim.settings, self.output
        device, state = resolve_device(output.device, output.process_group), state_file(output.save_path, settings)
        importance = importance_of(base, settings, device, state, output.process_group, self._hold)
        self.relaxer = Relaxer(importance, self.aim.omegas, self.aim.rule, self.aim.scaling)
        self.relaxer.check(plan)
        logger.info(self.relaxer.sentence())
        return self.relaxer

    def _hold(self, progress: Progress) -> None:
        self.progress = progress

    def finished(self, error: BaseException | None) -> None:
        """Remove the state of a calibration that no importance file holds, once the result stands; else keep it."""
        if self.progress is None:
            return
        if error is None:
            self.progress.clear()
        else:
            self.progress.stop(error)

    def preview(self, base: Checkpoint, plan: Plan) -> list[str]:
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
        relaxer.check(plan)
        return [relaxer.sentence()]

    def details(self, omega: float) -> Mapping[str, JsonValue]:
        """Return what the run record says of one result."""
        assert self.relaxer is not None
        return {"relaxation": self.relaxer.details(omega)}

    def variants(self) -> tuple[Variant, ...]:
        """Return the results: one in the output itself, several in folders of it."""
        omegas = self.aim.omegas
        return tuple(self._variant(omega, omega_folder(omega) if len(omegas) > 1 else ".") for omega in omegas)

    def _variant(self, omega: float, folder: str) -> Variant:
        lineage: RelaxationLineage = {"omega": omega, **self.aim.label()}
        return Variant(folder, recipe={"omega": omega}, lineage=lineage, details=lambda: self.details(omega))


def relaxation_spec(aim: AimConfig, output: OutputConfig, merge: MergeRecipe | None) -> RelaxationSpec:
    """Return AIM in the form in which the planner takes it.

    Args:
        aim: omegas, importance and rules.
        output: of the run.
        merge: the recipe in whose pass the relaxation is done; None where a merged checkpoint is relaxed.

    Raises:
        UsageError: for a method without a base (adapters have one by whatever method), a control that an adapter cannot
            have, or values that cannot be.
    """
    if merge is not None and not merge.uses_base and output.save_as == "model":
        raise UsageError(f"AIM in one pass needs a method with a base; {merge.method} has none: use performAIM.py.")
    aim.check()
    if output.save_as == "adapter" and aim.scaling.needs_whole_tensors:
        raise UsageError(
            f"--control {aim.scaling.control} needs whole tensors, which an adapter does not hold; leave out "
            "--save_as adapter, or give another control."
        )
    relaxation = _RunRelaxation(aim, output)
    return RelaxationSpec(
        recipe=aim.as_recipe(),
        files=aim.files,
        protected=aim.protected,
        make=relaxation.make,
        variants=relaxation.variants(),
        preview=relaxation.preview,
        finished=relaxation.finished,
    )


def relax(
    merged_name: str,
    base_name: str,
    aim: AimConfig,
    output: OutputConfig,
    dtype: str | None = None,
    options: PlanOptions = DEFAULTS,
) -> Path:
    """Relax a merged checkpoint or an adapter towards its base and return the folder of the result.

    Args:
        merged_name: folder or hub id of what is relaxed.
        base_name: of its base.
        aim: omegas (several are folders in the output), importance and rules.
        output: place, kind and form of the result.
        dtype: of the result; None keeps that of what is relaxed.
        options: rules for inputs that differ.

    Raises:
        UsageError: for values that cannot be.
        CheckpointError: for inputs that are broken or do not fit together.
        CalibrationError: where importance cannot be measured.
    """
    aim.check()
    protected = [*local_paths([merged_name, base_name]), *aim.protected]
    return run(lambda: plan_relaxation(merged_name, base_name, aim, output, dtype, options), output, protected)


def plan_relaxation(
    merged_name: str,
    base_name: str,
    aim: AimConfig,
    output: OutputConfig,
    dtype: str | None = None,
    options: PlanOptions = DEFAULTS,
    headers_only: bool = False,
) -> MergePlan:
    """Open the two checkpoints and decide everything about a relaxation; importance is read or measured later.

    Args:
        merged_name: folder or hub id of what is relaxed.
        base_name: of its base.
        aim: omegas, importance and rules.
        output: of the run.
        dtype: of the result; None keeps that of what is relaxed.
        options: rules for inputs that differ.
        headers_only: download no weights, and compare none; such a plan can be reported and not executed.

    Raises:
        UsageError: where both hold the same weights, or for values that cannot be.
        CheckpointError: for inputs that are broken or do not fit together.
    """
    spec = relaxation_spec(aim, output, merge=None)
    reference, kind = aim.settings.reference, output.save_as
    recipe = MergeRecipe(
        method="passthrough",
        models=(merged_name,),
        base_model=base_name,
        output_slices=(OutputSlice((0,), {"scale": ParameterSchedule.fixed(1.0)}),),
        dtype=dtype or ("bfloat16" if reference else "auto"),
        has_dtype=dtype is not None,
        numerics="reference" if reference else "float32",
        options=options,
    )
    keys: JsonObject = {
        "merged_model": merged_name,
        "pretrained_model_name": base_name,
        "omega": list(aim.omegas),
        "numerics": recipe.numerics,
        "dtype": dtype,
        **({"save_as": kind} if kind == "adapter" else {}),
        **options.as_yaml_dict(),
        **aim.as_recipe(),
    }
    unchanged = aim.omegas == (1.0,) and not reference
    notes = (f"omega 1: the {'adapter' if kind == 'adapter' else 'merged model'} is left as it is.",)
    spec = replace(spec, recipe=keys, notes=notes if unchanged else (), implementation=merged_alone)
    plan = plan_merge(recipe, output, spec, headers_only)
    if not headers_only and kind == "model" and _same_weights(plan.inputs.template_model, plan.base):
        raise UsageError(
            f"--merged_model {plan.inputs.template_model.name} and --pretrained_model_name {plan.base.name} hold the "
            "same weights: nothing to relax."
        )
    return plan


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


def _merged(_base: Tensor | None, finetuned: Tensor) -> Tensor:
    return finetuned[0]


def _merged_spec() -> WeightedSum:
    """Describe `_merged` to the compiled kernel."""
    from merging.ops.kernel_spec import WeightedSum

    return WeightedSum([1.0], anchor="nothing")
