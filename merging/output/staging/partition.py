"""Slices of one result over its ranks: tensors and digests of each rank, checks that they fit together."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from common.distributed import ProcessGroup
from common.errors import CheckpointError, StoppedError
from common.versions import MERGING, package_versions
from merging.checkpoints.storage import tensor_bytes
from merging.output.digests import InputDigests, digest_of
from merging.output.records.lock import read_lock
from merging.output.result_format import ResultFormat
from merging.output.shards import Shards, lay_out
from merging.output.staging.journal import Stage
from merging.output.staging.output_path import RECORD
from merging.output.staging.publication_check import check_files, check_small_files, check_tensors
from merging.output.staging.stage import finished, result_folders, staged, stages_for, work_folder_of
from merging.output.writer import ShardedWriter
from merging.plan.merge_plan import OutputConfig

FOLDER_SECONDS = 120.0
"""Time until a network file system must show a folder that another machine has made."""


def partition(sizes: Sequence[int], count: int) -> list[range]:
    """Return `count` contiguous ranges of about equal sums: an item goes where its middle lies; ranges may be empty."""
    total, before = sum(sizes), 0
    ends = [0] * count
    for i, size in enumerate(sizes):
        owner = min(count - 1, (2 * before + size) * count // (2 * total)) if total else 0
        before += size
        ends[owner:] = [i + 1] * (count - owner)
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def balance(sizes: Sequence[int], count: int) -> list[int]:
    """Return the rank of each item for about equal sums: the largest first, each to the rank with the least."""
    loads, owners = [0] * count, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += sizes[i]
    return owners


def rank_slice(result: ResultFormat, process_group: ProcessGroup) -> range:
    """Return this rank's tensors of the plan: a contiguous range, about equal in bytes over the ranks."""
    sizes = [tensor_bytes(t.shape, t.dtype) for t in result.plan.layout.tensors]
    return partition(sizes, process_group.world_size)[process_group.rank]


def rank_files(lanes: Sequence[Sequence[Path]], process_group: ProcessGroup) -> list[list[Path]]:
    """Return the input files whose digests this rank takes, balanced by size."""
    if process_group.world_size == 1:
        return [list(lane) for lane in lanes]
    files = _files(lanes)
    owners = balance([file.stat().st_size for file in files], process_group.world_size)
    of_rank = {file for file, owner in zip(files, owners, strict=True) if owner == process_group.rank}
    return [[file for file in lane if file in of_rank] for lane in lanes]


def check_ranks_agree(
    result: ResultFormat, output: OutputConfig, device: str, lanes: Iterable[Sequence[Path]], key: str
) -> str:
    """Return rank 0's key. Raises CheckpointError for a rank with another command, other files or other packages."""
    process_group, plan = output.process_group, result.plan
    if process_group.world_size == 1:
        return key
    of_output = [output.max_shard_size, output.layer_stats, output.allow_nonfinite]
    command = [plan.program, plan.recipe, *of_output, device]
    results = [(variant.folder, variant.recipe) for variant in plan.variants]
    files = [(file.name, file.stat().st_size) for lane in lanes for file in lane]
    tensors = [(tensor.name, tensor.shape, tensor.dtype) for tensor in result.plan.layout.tensors]
    facts = {
        "command": _digest([command, results]),
        "inputs": _digest([files, tensors]),
        "versions": _digest(package_versions(MERGING)),
        "key": key,
    }
    first, *rest = process_group.all_gather(facts)
    for rank, other in enumerate(rest, 1):
        for what in ("command", "inputs", "versions"):
            if other[what] != first[what]:
                raise CheckpointError(
                    f"Rank {rank} of {process_group.world_size} has other {what} than rank 0; all ranks need the same "
                    "command, the same files and the same packages."
                )
    return str(first["key"])


@contextmanager
def open_stages(result: ResultFormat, output: OutputConfig, key: str) -> Iterator[list[Stage]]:
    """Yield the stages that `merging.output.staging.stage.staged` makes on rank 0; all ranks write into them."""
    process_group, parts = output.process_group, [variant.folder for variant in result.plan.variants]
    if not process_group.is_main:
        process_group.barrier()
        for folder in result_folders(output.save_path, parts):
            _await(folder, output)
        try:
            yield stages_for(output.save_path, parts, key, process_group.rank, process_group.world_size)
        except StoppedError as error:
            if error.keeps and finished(work_folder_of(output.save_path)):
                error.add_note("Finished tensors are kept: the same command with --resume continues from there.")
            raise
        return
    with staged(output.save_path, output.overwrite, key, output.resume, parts, process_group.world_size) as stages:
        if process_group.world_size > 1:
            for stage in stages:
                _shards(result, output).allocate(stage.folder)
            process_group.barrier()
        yield stages


def open_writers(result: ResultFormat, output: OutputConfig, stages: Sequence[Stage]) -> list[ShardedWriter]:
    """Return a writer of this rank's slice for each result, all of them after the same tensor."""
    size, tensors = result.shard_size(output), result.plan.layout.tensors
    part = rank_slice(result, output.process_group) if output.process_group.world_size > 1 else None
    writers = [ShardedWriter(stage, tensors, size, result.stem, part) for stage in stages]
    done = min(writer.done for writer in writers)
    for writer in writers:
        writer.rewind(done)
    return writers


def gather_digests(
    result: ResultFormat,
    output: OutputConfig,
    stages: Sequence[Stage],
    lanes: Sequence[Sequence[Path]],
    digests: InputDigests,
) -> dict[Path, str]:
    """Return the digests of all inputs; on rank 0, with the journal entries of all ranks, finish the weight files.

    Raises CheckpointError where a file that two ranks wrote does not hold what they wrote, OSError where a file could
    not be read.
    """
    process_group, of_rank = output.process_group, digests.all()
    if process_group.world_size == 1:
        return of_rank
    files = _files(lanes)
    process_group.barrier()
    for stage in stages:
        part = rank_slice(result, process_group)
        check_tensors(stage.folder, _shards(result, output), stage.entries, part)
    gathered = process_group.gather(
        {"entries": [stage.entries for stage in stages], "digests": [of_rank.get(file) for file in files]}
    )
    if gathered is None:
        return of_rank
    shards = _shards(result, output)
    for i, stage in enumerate(stages):
        parts = [entry["entries"][i] for entry in gathered]
        stage.hold(list(chain(*parts)))
        _check_borders(stage, shards, [len(part) for part in parts])
        shards.seal(stage.folder)
        shards.write_index(stage.folder)
    by_file = zip(files, *(entry["digests"] for entry in gathered), strict=True)
    return {file: digest for file, *by_rank in by_file for digest in by_rank if digest}


def check_result(result: ResultFormat, output: OutputConfig, stage: Stage) -> None:
    """Check a finished result on the disk before it is published.

    Of several ranks each has checked its own tensors already. Raises DamagedError.
    """
    shards = _shards(result, output)
    check_files(stage.folder, shards)
    if output.process_group.world_size == 1:
        check_tensors(stage.folder, shards, stage.entries)
    lock = read_lock(stage.folder)
    check_small_files(stage.folder, lock["files"], (RECORD, "README.md"))


def _check_borders(stage: Stage, shards: Shards, counts: Sequence[int]) -> None:
    """Read back what lies next to each other in one file and was written by two ranks."""
    starts = {sum(counts[:rank]) for rank in range(1, len(counts))} - {0, len(shards.places)}
    for start in sorted(starts):
        before, after = shards.places[start - 1], shards.places[start]
        for i in (start - 1, start) if before.shard == after.shard else ():
            place, file = shards.places[i], stage.folder / shards.names[before.shard]
            if digest_of(file, place.offset, place.size) != stage.entries[i]["digest"]:
                raise CheckpointError(
                    f"Tensor {place.name} in {file.name} is not as it was written: two ranks write that file, and "
                    "the file system of --save_path does not keep them apart; write to another, or use one process."
                )


def _shards(result: ResultFormat, output: OutputConfig) -> Shards:
    return lay_out(result.plan.layout.tensors, result.shard_size(output), result.stem)


def _files(lanes: Iterable[Sequence[Path]]) -> list[Path]:
    """The files of all inputs, each once, in an order that is the same in every process."""
    return list(dict.fromkeys(chain(*lanes)))


def _await(folder: Path, output: OutputConfig) -> None:
    deadline = time.monotonic() + FOLDER_SECONDS
    while not folder.is_dir():
        output.process_group.check_ranks()
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"Rank {output.process_group.rank} does not see {folder}, which rank 0 made: --save_path must be on a "
                "file system that all machines share."
            )
        time.sleep(0.1)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=isinstance(value, Mapping)).encode()).hexdigest()
