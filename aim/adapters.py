"""Relaxing one adapter: the columns of its A shrink where the base's input channels are active; the output is one too.

theta - theta_0 = f o (scaling B A) = scaling B (A diag(f)),   f = 1 - (1 - omega) s
"""

from __future__ import annotations

from typing import Any

from aim.config import Aim
from aim.pipeline import PAPER, merged_alone
from common.errors import UsageError
from merging.checkpoints.checkpoint import open_all
from merging.lora.plan import lay_out
from merging.lora.run import adapter_configs, base_modules, check_same_base
from merging.lora.settings import adapter_settings
from merging.lora.work import AdapterWork
from merging.output.records.run_record import read_lineage, read_merge_recipe
from merging.plan.merge_plan import Relaxing
from merging.plan.planner import plan
from merging.plan.slices import Inputs
from merging.recipe.options import DEFAULTS, PlanOptions
from merging.recipe.schedules import OutputSlice, ParameterSchedule
from merging.tokenizers.chat_template import choose_template
from merging.tokenizers.choice import choose_vocabulary
from merging.tokenizers.token_ids import read_tokenizers, token_ids


def plan_adapter_relaxation(
    merged_name: str, base_name: str, aim: Aim, dtype: str | None, relaxing: Relaxing, options: PlanOptions = DEFAULTS
) -> AdapterWork:
    """Open base and adapter and decide everything about the relaxation; the importance is read or measured later.

    dtype: None keeps the adapter's. Raises UsageError, CheckpointError.
    """
    if aim.settings.reference:
        raise UsageError("--save_as adapter does not work with --numerics reference, which is for whole models.")
    merged, base = open_all([merged_name, base_name])
    if merged.ref.adapter is None:
        raise UsageError(f"--save_as adapter needs --merged_model as BASE+ADAPTER; {merged.name} is a whole model.")
    check_same_base([merged], base)
    inputs = Inputs(merged, (merged,), base)
    read_tokenizers([merged.folder, base.folder])
    vocabulary = choose_vocabulary("base", merged if token_ids(merged.folder) is not None else base, [])
    of_model = plan(
        inputs, [OutputSlice((0,), {"scale": ParameterSchedule.fixed(1.0)})], None, vocabulary, options=options
    )
    planned = lay_out(inputs, of_model, "passthrough", dtype)
    lineage = {**read_lineage(merged), "base_model": base.ref.full_name}
    recipe: dict[str, Any] = {
        "merged_model": merged_name,
        "pretrained_model_name": base_name,
        "omega": list(aim.omegas),
        "numerics": "float32",
        "dtype": dtype,
        "save_as": "adapter",
        **options.as_yaml_dict(),
        **aim.as_recipe(),
    }
    notes = [*of_model.notes, *planned.notes]
    if aim.omegas == (1.0,):
        notes.append("omega 1: the adapter is left as it is.")
    return AdapterWork(
        program="performAIM.py",
        label="relaxing",
        paper=PAPER,
        inputs=inputs,
        plan=planned,
        settings=adapter_settings(planned, adapter_configs([merged]), base.ref, base_modules(base)),
        template=choose_template("base", vocabulary.folder, merged, [base]),
        recipe=recipe,
        sources={},
        lineage={**lineage, "models": lineage["models"] or [merged.ref.full_name]},
        notes=tuple(notes),
        implementation=merged_alone,
        relaxing=relaxing,
        files=aim.files,
        merge_recipe=read_merge_recipe(merged),
    )
