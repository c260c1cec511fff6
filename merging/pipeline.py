"""The pipeline: from a recipe to a finished checkpoint, for models and adapters, with AIM and without."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.device import check_device_here, resolve_device
from common.distributed import ProcessGroup
from common.files.file_state import check_unchanged, states_of
from common.files.temporary import is_temporary
from common.logging import logger
from common.versions import MERGING, package_versions
from merging.checkpoints.hub import local_paths
from merging.checkpoints.licenses import licenses_of
from merging.lora.adapter_format import AdapterFormat
from merging.ops.kernels.bus_errors import report_bus_errors
from merging.output.digests import InputDigests, digest_of
from merging.output.finalize import finalize
from merging.output.preparation import PreparedFiles
from merging.output.records.run_record import write_record
from merging.output.result_format import ModelFormat, ResultFormat
from merging.output.staging.journal import Stage
from merging.output.staging.output_path import check_target, check_untouched
from merging.output.staging.partition import (
    check_ranks_agree,
    check_result,
    gather_digests,
    open_stages,
    open_writers,
    rank_files,
    rank_slice,
)
from merging.output.staging.stage import recover, written_bytes
from merging.output.writer import ShardedWriter, parse_size
from merging.plan.checks import check_space
from merging.plan.merge_plan import MergePlan, OutputConfig, RelaxationSpec
from merging.planning import plan_merge
from merging.recipe import MergeRecipe

if TYPE_CHECKING:
    from merging.engine.execution import ExecutionConfig


def merge(recipe: MergeRecipe, output: OutputConfig, relaxation: RelaxationSpec | None = None) -> Path:
    """Merge models, or adapters into one adapter, and return the folder of the result.

    Args:
        recipe: method, models and parameters.
        output: place, kind and form of the result.
        relaxation: AIM in the same pass, as `aim.pipeline` makes it; several omegas are folders in the output.

    Raises:
        UsageError: for a recipe or an output that cannot be.
        CheckpointError: for inputs that are broken or do not fit together.
        FailureError: where the system fails. Nothing is at the target then that was not there before.
    """
    protected = [*local_paths(recipe.model_names), *(relaxation.protected if relaxation else ())]
    return run(lambda: plan_merge(recipe, output, relaxation), output, protected)


def run(make_plan: Callable[[], MergePlan], output: OutputConfig, protected: Iterable[Path] = ()) -> Path:
    """Check the output, make a plan and execute it; return the folder of the result.

    Args:
        make_plan: opens the inputs; of several ranks the first does so before the others, which find its downloads.
        output: place, kind and form of the result.
        protected: paths that the output must not touch. Those of the plan, which is made later, are checked as well.

    Raises:
        UsageError: for an output or inputs that cannot be.
        CheckpointError: for inputs that are broken or do not fit together.
        FailureError: where the system fails.
    """
    check_output(output, protected)
    with output.process_group.main_process_first():
        plan = make_plan()
    return write_checkpoint(plan, output)


def check_output(output: OutputConfig, protected: Iterable[Path] = ()) -> None:
    """Refuse an output that cannot be, before any model is opened.

    Args:
        output: its folder, size of files and device are checked.
        protected: paths that the output must not touch.

    Raises:
        UsageError: naming the flag.
    """
    check_untouched(output.save_path, protected)  # first, since an input is not empty, and --overwrite would be no help
    if output.process_group.is_main:
        recover(output.save_path)
    check_target(output.save_path, output.overwrite, output.resume)
    parse_size(output.max_shard_size)
    check_device_here(output.device, output.process_group)


def check_plan(plan: MergePlan, output: OutputConfig) -> None:
    """Refuse a plan that does not suit the output. Raises UsageError, FailureError for a disk that is full."""
    format_of(plan).check_output(output)
    check_untouched(output.save_path, plan.paths)
    check_space(output.save_path, plan.bytes, written_bytes(output.save_path))


def format_of(plan: MergePlan) -> ResultFormat:
    """Return the plan's kind of result."""
    return AdapterFormat(plan) if plan.kind == "adapter" else ModelFormat(plan)


def report(plan: MergePlan, output: OutputConfig, as_json: bool) -> str:
    """Return a plan as text or JSON for `--dry_run`, after the checks that the run would make.

    An output without a folder (an empty path) is not checked.
    """
    parse_size(output.max_shard_size)
    result = format_of(plan)
    if output.save_path != Path():
        check_plan(plan, output)
        check_target(output.save_path, output.overwrite, output.resume)
    with result.prepare_files() as files:
        description = result.describe(output.save_path, files)
    return json.dumps(description, indent=2) if as_json else result.describe_as_text(description)


def write_checkpoint(plan: MergePlan, output: OutputConfig) -> Path:
    """Write the result or results of a plan and return the output's folder.

    Of several ranks each writes a part of the tensors, and the first finishes.

    Raises:
        UsageError: where the plan does not suit the output.
        CheckpointError: where an input cannot be read or changed, or the result does not load.
        FailureError: where the system fails. Nothing is at the target then that was not there before.
    """
    result = format_of(plan)
    with _finishing(plan, output.process_group):
        if not output.process_group.is_main:
            with _weights(result, output, lambda: None):
                return output.save_path
        check_plan(plan, output)
        with result.prepare_files() as files:
            return _write(result, output, files)


def execution_config(plan: MergePlan, output: OutputConfig) -> ExecutionConfig:
    """Return how the plan's tensors are computed; loads torch, and loads or measures the importance for AIM."""
    from merging.engine import loop
    from merging.engine.execution import ExecutionConfig

    result, device = format_of(plan), resolve_device(plan.device or output.device, output.process_group)
    relaxation = plan.relaxation.make(plan.base, result.relaxed()) if plan.relaxation else None
    execution = ExecutionConfig(
        method=plan.implementation(),
        device=device,
        seed=plan.seed,
        reference=plan.reference,
        relaxation=relaxation,
        allow_nonfinite=output.allow_nonfinite,
    )
    if output.layer_stats:
        from merging.engine.collector import StatisticsCollector

        execution = replace(execution, make_collector=StatisticsCollector)
    return loop.with_model_statistics(plan.model, execution)


@contextmanager
def _finishing(plan: MergePlan, process_group: ProcessGroup) -> Iterator[None]:
    """Tell the relaxation of the run's end or error; of several ranks once all are through."""
    finished: Callable[[BaseException | None], None] = plan.relaxation.finished if plan.relaxation else lambda _: None
    try:
        yield
        process_group.barrier()
    except BaseException as error:
        finished(error)
        raise
    finished(None)


def _write(result: ResultFormat, output: OutputConfig, files: PreparedFiles) -> Path:
    """Write everything but the configs and the tokenizer, which are made and tried already."""
    started = time.perf_counter()
    plan = result.plan
    warning = licenses_of(plan.inputs.all).warning
    for note in (*plan.notes, *files.notes, *([warning] if warning else [])):
        logger.info(note)

    def check() -> None:
        untried = result.check_loads(files) if output.load_check else None
        if untried:
            logger.info(untried)

    sentences: list[str] = []
    tables: list[str] = []
    with _weights(result, output, check) as (device, stages, digests):
        for variant, stage in zip(plan.variants, stages, strict=True):
            seconds = time.perf_counter() - started
            reports, table = finalize(result, output, variant, stage, files, digests, device, seconds)
            sentences += reports
            tables += [table] if table else []
        if len(stages) > 1:
            folders = [variant.folder for variant in plan.variants]
            write_record(stages[0].folder.parent, plan.lineage, {"recipe": dict(plan.recipe), "variants": folders})
        for stage in stages:
            check_result(result, output, stage)
        for checkpoint in plan.inputs.all:
            check_unchanged(checkpoint.states)
    for sentence in dict.fromkeys(sentences):
        logger.info(sentence)
    for table in tables:
        print(table)
    return output.save_path


@contextmanager
def _weights(
    result: ResultFormat, output: OutputConfig, check: Callable[[], None]
) -> Iterator[tuple[str, Sequence[Stage], Mapping[Path, str | None]]]:
    """Write the weights, or this rank's part of them; yield device, stages and digests, then publish the result.

    check: what is tried while the first digests are taken, before torch is loaded.
    """
    report_bus_errors("Finished tensors are kept; the same command with --resume continues from there.")
    plan, process_group = result.plan, output.process_group
    lanes = [result.input_files(checkpoint) for checkpoint in plan.inputs.all]
    writers: list[ShardedWriter] = []
    with InputDigests(rank_files(lanes, process_group), lambda: writers[0].part if writers else 0.0) as digests:
        check()
        states = states_of(plan.files.values())
        execution = execution_config(plan, output)
        states = states_of(plan.files.values()) | states  # an importance file may be new
        device = execution.device.type
        key = _key(result, output, lanes, str(execution.device)) if process_group.is_main else ""
        with open_stages(result, output, check_ranks_agree(result, output, device, lanes, key)) as stages:
            writers += open_writers(result, output, stages)
            try:
                _run(result, output, writers, execution)
            except BaseException:
                for writer in writers:
                    writer.abandon()
                raise
            gathered = gather_digests(result, output, stages, lanes, digests)
            yield device, stages, gathered | {file: digest_of(file) for file in plan.files.values()}
            check_unchanged(states)


def _key(result: ResultFormat, output: OutputConfig, lanes: Iterable[Sequence[Path]], device: str) -> str:
    """Digest of all that the bytes depend on, which a run that resumes must have in common with the interrupted one."""
    plan = result.plan
    weights = [file for checkpoint in plan.inputs.all for file in checkpoint.files if file.exists()]
    files = [*dict.fromkeys((*itertools.chain(*lanes), *weights)), *plan.files.values()]
    stats = [(file, file.stat()) for file in files if not is_temporary(file)]
    states = [(str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    results = [(variant.folder, variant.recipe) for variant in plan.variants]
    form = {"max_shard_size": output.max_shard_size, "layer_stats": output.layer_stats}
    parts = [plan.program, plan.recipe, results, states, package_versions(MERGING), form, device]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def _run(
    result: ResultFormat, output: OutputConfig, writers: Sequence[ShardedWriter], execution: ExecutionConfig
) -> None:
    """Write the weights of all results from one read of the inputs."""
    from merging.engine import loop

    tensors, blocks_of = result.slice_of(rank_slice(result, output.process_group)), result.blocks(execution)
    loop.run(tensors, execution, writers, result.plan.label, blocks_of, output.process_group)
    for writer in writers:
        writer.close()
