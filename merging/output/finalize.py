"""Files that accompany the weights of a finished result: tokenizer, configs, model card, lock file, run record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from common.files.json_values import JsonObject, JsonValue
from common.versions import MERGING, versions
from merging.checkpoints.licenses import licenses_of
from merging.engine.base_comparison import CHANGED
from merging.output.layer_statistics import as_markdown, by_layer
from merging.output.preparation import PreparedFiles
from merging.output.records.card import describe_method, pipeline_tag_of, write_card
from merging.output.records.lock import (
    FORMAT,
    check_inputs,
    check_others,
    check_tensors,
    describe_input,
    small_files,
    tensors_of,
    write_lock,
)
from merging.output.records.run_record import write_record
from merging.output.result_format import ResultFormat
from merging.output.staging.journal import Stage
from merging.plan.merge_plan import Lineage, OutputConfig, Variant
from merging.plan.types import TensorPlan
from merging.recipe.mergekit.writer import write_mergekit


def finalize(
    result: ResultFormat,
    output: OutputConfig,
    variant: Variant,
    stage: Stage,
    files: PreparedFiles,
    digests: Mapping[Path, str | None],
    device: str,
    seconds: float,
) -> tuple[list[str], str | None]:
    """Write everything next to the weights of one result.

    Args:
        result: the kind of result, with its plan.
        output: of the run.
        variant: which of the plan's results it is.
        stage: its folder and journal; the weights are written.
        files: configs and tokenizer.
        digests: of the inputs' files.
        device: on which it was computed, "cpu" or "cuda".
        seconds: since the start of the run.

    Returns:
        Sentences for the user, and the statistics per layer as a table where they were computed.

    Raises:
        CheckpointError: where the result does not repeat the lock that it must.
    """
    plan = result.plan
    recipe = {**plan.recipe, **variant.recipe}
    lineage: Lineage = {**plan.lineage, **variant.lineage}
    files.copy_to(stage.folder)
    if plan.mergekit is not None:
        write_mergekit(stage.folder, *plan.mergekit)
    rows = _layer_rows(result, stage) if output.layer_stats else []
    table = _layer_table(result, variant, rows) if rows else None
    title = output.save_path.name if variant.folder == "." else f"{output.save_path.name} {variant.folder}"
    write_card(
        stage.folder,
        title,
        lineage,
        front=result.card_front(lineage),
        text=result.card_text(lineage, describe_method(lineage)),
        recipe=recipe,
        licenses=licenses_of(plan.inputs.all),
        pipeline_tag=pipeline_tag_of(files.configs["config.json"]),
        layer_table=table,
        merge_recipe=plan.merge_recipe,
    )
    write_lock(stage.folder, _lock(result, output, recipe, stage, digests, device))
    nonfinite = {entry["name"]: entry["nonfinite"] for entry in stage.entries if "nonfinite" in entry}
    sentences = [f"Tensor {name}: {count} entries are not finite." for name, count in nonfinite.items()]
    record = result.record()
    equals_base = _equals_base(result, stage)
    if equals_base:
        sentences.append(f"{title} equals the base {plan.base.name} in every value: the merge changed nothing.")
    details = {
        "recipe": recipe,
        "sources": dict(plan.sources),
        "inputs": [{"name": c.name, "commit": c.commit} for c in plan.inputs.all],
        **record,
        "tensors": {**record["tensors"], "nonfinite": nonfinite},
        "notes": [*plan.notes, *files.notes],
        **variant.details(),
        **({"layer_statistics": rows} if rows else {}),
        **({"processes": output.process_group.world_size} if output.process_group.world_size > 1 else {}),
        "seconds": round(seconds, 3),
        **({"equals_base": True} if equals_base else {}),
    }
    write_record(stage.folder, lineage, details)
    return sentences, table


def _equals_base(result: ResultFormat, stage: Stage) -> bool:
    """True where every merged tensor of a model has the base's values."""
    tensors = result.plan.layout.tensors
    has_base = any(isinstance(t, TensorPlan) and t.is_merged and t.base is not None for t in tensors)
    return has_base and not any(CHANGED in entry for entry in stage.entries)


def _layer_rows(result: ResultFormat, stage: Stage) -> list[JsonObject]:
    """The statistics per layer of the merged tensors."""
    merged = {tensor.name for tensor in result.plan.model.tensors if tensor.is_merged}
    entries = ((entry["name"], entry["layer_statistics"]) for entry in stage.entries if entry["name"] in merged)
    return by_layer(entries, len(result.plan.inputs.models))


def _layer_table(result: ResultFormat, variant: Variant, rows: Sequence[Mapping[str, JsonValue]]) -> str:
    table = as_markdown(rows, [model.name for model in result.plan.inputs.models])
    return table if variant.folder == "." else f"{variant.folder}. {table}"


def _lock(
    result: ResultFormat,
    output: OutputConfig,
    recipe: Mapping[str, JsonValue],
    stage: Stage,
    digests: Mapping[Path, str | None],
    device: str,
) -> JsonObject:
    """The lock of the content of a stage. Raises CheckpointError where it does not repeat the expected one."""
    plan, expected = result.plan, output.expected
    inputs = [describe_input(one, digests, result.input_files(one)) for one in plan.inputs.distinct]
    files = {name: digests.get(file) for name, file in plan.files.items()}
    tensors = tensors_of(plan.layout, stage.entries)
    if expected is not None:
        check_inputs(expected, inputs)
        check_others(expected, files)
        result.check_lock(expected)
        check_tensors(expected, tensors)
    return {
        "format": FORMAT,
        "program": plan.program,
        "recipe": dict(recipe),
        "sources": dict(plan.sources),
        "device": device,
        **({"threads": _threads()} if plan.whole_matrix else {}),
        "max_shard_size": output.max_shard_size,
        "versions": versions(MERGING),
        "inputs": inputs,
        **result.lock_entries(),
        "other_inputs": files,
        "files": small_files(stage.folder),
        "tensors": tensors,
    }


def _threads() -> int:
    import torch

    return torch.get_num_threads()
