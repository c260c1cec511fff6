"""Making a checkpoint that was planned: stage, stream, side files, lock, and only then the place it was asked for."""

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

from common.device import check_device_here
from common.distributed import ProcessGroup
from common.errors import UsageError
from common.files.file_state import check_unchanged, states_of
from common.files.temporary import is_temporary
from common.logging import logger
from common.versions import MERGING, package_versions
from merging.checkpoints.licenses import licenses_of
from merging.ops.kernels.bus_errors import report_bus_errors
from merging.output.digests import InputDigests, digest_of
from merging.output.finalize import Finisher
from merging.output.load_check import check_loads, known_names
from merging.output.preparation import Prepared, prepared
from merging.output.records.lock import files_of
from merging.output.records.run_record import write_record
from merging.output.staging.output_path import check_target
from merging.output.staging.partition import (
    check_ranks_agree,
    check_result,
    gather_digests,
    open_stages,
    open_writers,
    rank_files,
    rank_slice,
)
from merging.output.staging.stage import Stage, recover, written_bytes
from merging.output.writer import ShardedWriter, parse_size
from merging.plan.checks import check_space
from merging.plan.merge_plan import Output, Work

if TYPE_CHECKING:
    from merging.engine.execution import ExecutionConfig


def produce(work: Work, output: Output) -> Path:
    """Write the checkpoint that was planned and return its folder.

    Each rank writes its slice of the tensors, and rank 0 finishes the result. Raises UsageError, CheckpointError
    or FailureError; then nothing is at the target that was not there before.
    """
    with ended(work.finished, output.process_group):
        if not output.process_group.is_main:
            with _weights(work, output, lambda: None):
                return output.save_path
        recover(output.save_path)
        check_output(work, output)
        with prepared(work.inputs, work.plan, work.template) as small:
            return _make(work, output, small)


@contextmanager
def ended(finished: Callable[[BaseException | None], None], process_group: ProcessGroup) -> Iterator[None]:
    """Call `finished` at the end of a run, with the error that ended it; of several ranks once all are through."""
    try:
        yield
        process_group.barrier()
    except BaseException as error:
        finished(error)
        raise
    finished(None)


def _make(work: Work, output: Output, small: Prepared) -> Path:
    """Make the rest: all but the tokenizer and the configs, which are made and tried already."""
    started = time.perf_counter()
    inputs = work.inputs
    licenses = licenses_of(inputs.all)
    for note in (*work.notes, *small.notes, *([licenses.warning] if licenses.warning else [])):
        logger.info(note)

    def check() -> None:
        known = known_names(work.plan, inputs.template_model)
        unloaded = check_loads(work.plan, small.configs, known) if output.load_check else None
        if unloaded:
            logger.info(unloaded)

    with _weights(work, output, check) as (job, stages, found):
        finisher = Finisher(work, output, job, small, licenses)
        for variant, stage in zip(work.variants, stages, strict=True):
            finisher.finish(variant, stage, found, time.perf_counter() - started)
        if len(stages) > 1:
            parts = [variant.folder for variant in work.variants]
            write_record(stages[0].folder.parent, work.lineage, {"recipe": dict(work.recipe), "variants": parts})
        for stage in stages:
            check_result(work, output, stage)
        for checkpoint in inputs.all:
            check_unchanged(checkpoint.states)
    for sentence in dict.fromkeys(finisher.said):
        logger.info(sentence)
    for table in finisher.tables:
        print(table)
    return output.save_path


@contextmanager
def _weights(
    work: Work, output: Output, check: Callable[[], None]
) -> Iterator[tuple[ExecutionConfig, Sequence[Stage], Mapping[Path, str | None]]]:
    """Write this rank's slice of the weights; yield job, stages and digests, then take the target's place.

    check: what is tried while the first digests are taken, before torch is loaded.
    """
    report_bus_errors("Finished tensors are kept; the same command with --resume continues from there.")
    lanes = [files_of(checkpoint) for checkpoint in work.inputs.all]
    writers: list[ShardedWriter] = []
    with InputDigests(rank_files(lanes, output.process_group), lambda: writers[0].part if writers else 0.0) as digests:
        check()
        others = states_of(work.files.values())
        job = _with_output(work.make_job(), output)
        others = states_of(work.files.values()) | others  # an importance file may be new
        files = [*itertools.chain(*lanes), *work.files.values()]
        key = (
            _key(work, files, output, job) if output.process_group.is_main else ""
        )  # it alone saved an importance file
        with open_stages(work, output, check_ranks_agree(work, output, job, lanes, key)) as stages:
            writers += open_writers(work, output, stages)
            try:
                _stream(work, output, writers, job)
            except BaseException:
                for writer in writers:
                    writer.abandon()
                raise
            found = gather_digests(work, output, stages, lanes, digests)
            yield job, stages, found | {file: digest_of(file) for file in work.files.values()}
            check_unchanged(others)


def check_asked(output: Output, kept: Iterable[Path]) -> None:
    """Refuse what is asked of the output before any model is opened; kept: files that must not be written over.

    Raises UsageError.
    """
    if output.process_group.is_main:
        recover(output.save_path)
    check_target(output.save_path, output.overwrite, kept, output.resume)
    parse_size(output.max_shard_size)
    check_device_here(output.device, output.process_group)


def check_output(work: Work, output: Output) -> None:
    """Refuse an output that cannot be written, or that would touch an input. Raises UsageError, FailureError."""
    parse_size(output.max_shard_size)
    taken = [*(place for checkpoint in work.inputs.all for place in checkpoint.places), *work.files.values()]
    check_target(output.save_path, output.overwrite, taken, output.resume)
    check_space(output.save_path, work.bytes, written_bytes(output.save_path))


def _with_output(job: ExecutionConfig, output: Output) -> ExecutionConfig:
    """The job with what the output asks of the loop. Raises UsageError for what does not go together."""
    if output.layer_stats and job.reference:
        raise UsageError("--layer_stats needs blocks in float32, and does not go with --numerics reference.")
    job = replace(job, allow_nonfinite=output.allow_nonfinite)
    if not output.layer_stats:
        return job
    from merging.engine.collector import StatisticsCollector

    return replace(job, make_collector=StatisticsCollector)


def _key(work: Work, files: Sequence[Path], output: Output, job: ExecutionConfig) -> str:
    """What an interrupted run must have in common with the one that goes on with it: all that the bytes depend on."""
    lasting = [file for file in files if not is_temporary(file)]
    seen = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in lasting]
    results = [(variant.folder, variant.recipe) for variant in work.variants]
    of_output = {"max_shard_size": output.max_shard_size, "layer_stats": output.layer_stats}
    same = [work.program, work.recipe, results, seen, package_versions(MERGING), of_output, str(job.device)]
    return hashlib.sha256(json.dumps(same, default=str).encode()).hexdigest()


def _stream(work: Work, output: Output, writers: Sequence[ShardedWriter], job: ExecutionConfig) -> None:
    """Write the weights of all results from one read of the inputs."""
    from merging.engine import loop

    own = rank_slice(work, output.process_group)
    part = replace(work.plan, tensors=work.plan.tensors[own.start : own.stop])
    loop.run(part, job, writers, work.label, process_group=output.process_group)
    for writer in writers:
        writer.close()
