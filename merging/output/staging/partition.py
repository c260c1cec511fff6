"""One process's part of a result that several make together: tensors, digests, what it hands in."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import CheckpointError
from merging.checkpoints.storage import tensor_bytes
from merging.output.digests import InputDigests, digest_of
from merging.output.records.lock import read_lock
from merging.output.records.run_record import versions
from merging.output.shards import Shards, lay_out
from merging.output.staging.output_path import RECORD
from merging.output.staging.publication_check import check_files, check_small_files, check_tensors
from merging.output.staging.stage import Stage, result_folders, staged, stages_for
from merging.output.writer import ShardedWriter, parse_size
from merging.plan.merge_plan import Output, Work
from merging.processes import Processes

if TYPE_CHECKING:
    from merging.engine.execution import ExecutionConfig

PATIENCE = 120.0
"""Seconds until a network's file system must show here what another machine has made."""


def ranges(sizes: Sequence[int], count: int) -> list[range]:
    """Cut a list into `count` ranges of about equal sums: an item goes where its middle lies. Some may be empty."""
    total, before = sum(sizes), 0
    ends = [0] * count
    for i, size in enumerate(sizes):
        owner = min(count - 1, (2 * before + size) * count // (2 * total)) if total else 0
        before += size
        ends[owner:] = [i + 1] * (count - owner)
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def dealt(sizes: Sequence[int], count: int) -> list[int]:
    """Return whose each item is, so that `count` sums are about equal: the largest first, each to the least loaded."""
    loads, owners = [0] * count, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += sizes[i]
    return owners


def own_tensors(work: Work, processes: Processes) -> range:
    """Return which tensors of the plan are this process's, by their bytes."""
    return ranges([tensor_bytes(t.shape, t.dtype) for t in work.plan.tensors], processes.count)[processes.rank]


def own_files(lanes: Sequence[Sequence[Path]], processes: Processes) -> list[list[Path]]:
    """Return those of the inputs' files whose digests are this process's, by their bytes."""
    if processes.count == 1:
        return [list(lane) for lane in lanes]
    files = _files(lanes)
    owners = dealt([file.stat().st_size for file in files], processes.count)
    mine = {file for file, owner in zip(files, owners, strict=True) if owner == processes.rank}
    return [[file for file in lane if file in mine] for lane in lanes]


def agreed(work: Work, output: Output, job: ExecutionConfig, lanes: Iterable[Sequence[Path]], key: str) -> str:
    """Return the first process's key. Raises CheckpointError where a process was asked for something else."""
    processes = output.processes
    if processes.count == 1:
        return key
    of_output = [output.max_shard_size, output.layer_stats, output.allow_nonfinite]
    asked = [work.program, work.recipe, *of_output, job.device.type]
    results = [(variant.folder, variant.recipe) for variant in work.variants]
    seen = [(file.name, file.stat().st_size) for lane in lanes for file in lane]
    plan = [(tensor.name, tensor.shape, tensor.dtype) for tensor in work.plan.tensors]
    mine = {
        "command": _digest([asked, results]), "inputs": _digest([seen, plan]), "versions": _digest(versions()),
        "key": key,
    }  # fmt: skip
    first, *others = processes.everybody(mine)
    for rank, other in enumerate(others, 1):
        for what in ("command", "inputs", "versions"):
            if other[what] != first[what]:
                raise CheckpointError(
                    f"Rank {rank} of {processes.count} has other {what} than rank 0; all ranks need the same "
                    "command, the same files and the same packages."
                )
    return str(first["key"])


@contextmanager
def stages_of(work: Work, output: Output, key: str) -> Iterator[list[Stage]]:
    """Yield the stages that `merging.output.staging.stage.staged` makes: the first process keeps them, all write in
    them."""
    processes, parts = output.processes, [variant.folder for variant in work.variants]
    if not processes.leads:
        processes.wait()
        for folder in result_folders(output.save_path, parts):
            _await(folder, output)
        yield stages_for(output.save_path, parts, key, processes.rank, processes.count)
        return
    with staged(output.save_path, output.overwrite, key, output.resume, output.quiet, parts, processes.count) as stages:
        if processes.count > 1:
            for stage in stages:
                _shards(work, output).allocate(stage.folder)
            processes.wait()
        yield stages


def writers_of(work: Work, output: Output, stages: Sequence[Stage]) -> list[ShardedWriter]:
    """Return a writer of this process's part for each result, all of them after the same tensor."""
    size, tensors = parse_size(output.max_shard_size), work.plan.tensors
    own = own_tensors(work, output.processes) if output.processes.count > 1 else None
    writers = [ShardedWriter(stage.folder, tensors, size, stage.journal, own=own) for stage in stages]
    done = min(writer.done for writer in writers)
    for writer in writers:
        writer.rewind(done)
    return writers


def hand_in(
    work: Work, output: Output, stages: Sequence[Stage], lanes: Sequence[Sequence[Path]], digests: InputDigests
) -> dict[Path, str]:
    """Return the digests of all inputs, and finish the weights: those of several processes by their first.

    Its journals then have the entries of all. Raises CheckpointError where a file that two processes wrote does not
    hold what they wrote, OSError where a file could not be read.
    """
    processes, found = output.processes, digests.all()
    if processes.count == 1:
        return found
    files = _files(lanes)
    processes.wait()
    for stage in stages:
        own = own_tensors(work, processes)
        check_tensors(stage.folder, _shards(work, output), stage.journal.entries, own)
    everybody = processes.everybody(
        {"entries": [stage.journal.entries for stage in stages], "digests": [found.get(file) for file in files]}
    )
    if not processes.leads:
        return found
    shards = _shards(work, output)
    for i, stage in enumerate(stages):
        parts = [given["entries"][i] for given in everybody]
        stage.journal.hold(list(chain(*parts)))
        _check_borders(stage, shards, [len(part) for part in parts])
        shards.seal(stage.folder)
        shards.write_index(stage.folder)
    every = [next((d for d in given if d), None) for given in zip(*(e["digests"] for e in everybody), strict=True)]
    return {file: digest for file, digest in zip(files, every, strict=True) if digest}


def check_result(work: Work, output: Output, stage: Stage) -> None:
    """Check a finished result on the disk before it is published.

    Of several ranks each has checked its own tensors already. Raises DamagedError.
    """
    shards = _shards(work, output)
    check_files(stage.folder, shards)
    if output.processes.count == 1:
        check_tensors(stage.folder, shards, stage.journal.entries)
    lock = read_lock(stage.folder)
    check_small_files(stage.folder, lock["files"], (RECORD, "README.md"))


def _check_borders(stage: Stage, shards: Shards, counts: Sequence[int]) -> None:
    """Read back what lies next to each other in one file and was written by two processes."""
    starts = {sum(counts[:rank]) for rank in range(1, len(counts))} - {0, len(shards.places)}
    for start in sorted(starts):
        before, after = shards.places[start - 1], shards.places[start]
        for i in (start - 1, start) if before.shard == after.shard else ():
            place, file = shards.places[i], stage.folder / shards.names[before.shard]
            if digest_of(file, place.offset, place.size) != stage.journal.entries[i]["digest"]:
                raise CheckpointError(
                    f"Tensor {place.name} in {file.name} is not as it was written: two processes write that file, and "
                    "the file system of --save_path does not keep them apart; write to another, or with one process."
                )


def _shards(work: Work, output: Output) -> Shards:
    return lay_out(work.plan.tensors, parse_size(output.max_shard_size))


def _files(lanes: Iterable[Sequence[Path]]) -> list[Path]:
    """The files of all inputs, each once, in an order that is the same in every process."""
    return list(dict.fromkeys(chain(*lanes)))


def _await(folder: Path, output: Output) -> None:
    deadline = time.monotonic() + PATIENCE
    while not folder.is_dir():
        output.processes.check()
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"Process {output.processes.rank} of {output.processes.count} does not see {folder}, which the first "
                "one made: --save_path must be on a file system that all machines share."
            )
        time.sleep(0.1)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=isinstance(value, Mapping)).encode()).hexdigest()
