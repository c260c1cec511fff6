"""What scripts/bandwidth.py measures: each function returns bytes per second, one figure for each run.

Disk figures are by the clock on the wall. Digests, methods and the writer's work are by CPU time, so that a busy
neighbour does not enter; they are for one core.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch

from merging.digests import InputDigests
from merging.groups import group_of
from merging.job import Job
from merging.output.journal import Journal
from merging.recipe import make_recipe
from merging.registry import find_method
from merging.run import plan_merge
from merging.stored import map_file
from merging.stream import run, tensor_blocks
from merging.tensors import BLOCK_ELEMENTS
from merging.work import Output, Work
from merging.writer import ShardedWriter
from scripts.bench_memory import peak

DENSITY = {"dare_linear": 0.5, "dare_ties": 0.5}
"""What has no default and is measured at a half."""


def rates(
    size: int, runs: int, work: Callable[[], object], clock: Callable[[], float], ready: Callable[[], object] = tuple
) -> list[float]:
    """Return bytes per second of `work`, which moves `size` bytes, in each of `runs` runs; `ready` comes before."""
    found = []
    for _ in range(runs):
        ready()
        started = clock()
        work()
        found.append(size / max(1e-9, clock() - started))
    return found


def drop(files: Sequence[Path]) -> bool:
    """Take files out of the page cache, once they are on the disk; returns whether this system can."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def touch(files: Sequence[Path]) -> None:
    """Read files as a merge does, through a memory map, and do nothing with them: one byte of every page."""
    for file in files:
        with closing(map_file(file)) as mapped:
            np.frombuffer(mapped, np.uint8)[:: mmap.PAGESIZE].sum()


def read(files: Sequence[Path], runs: int) -> list[float]:
    """Reading from the disk, as a merge does."""
    size = sum(file.stat().st_size for file in files)
    return rates(size, runs, lambda: touch(files), time.perf_counter, lambda: drop(files))


def cached(files: Sequence[Path], runs: int) -> list[float]:
    """Copying from the page cache, since touching what is mapped moves nothing."""
    room = memoryview(bytearray(1 << 22))

    def work() -> None:
        for file in files:
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(room):
                    pass

    size = sum(file.stat().st_size for file in files)
    return rates(size, runs, work, time.perf_counter, lambda: touch(files))


def write(file: Path, size: int, runs: int) -> list[float]:
    """Writing a file and waiting until it is on the disk."""
    data = np.random.default_rng(0).bytes(1 << 22)

    def work() -> None:
        with file.open("wb") as stream:
            for start in range(0, size, len(data)):
                stream.write(data[: size - start])
            stream.flush()
            os.fsync(stream.fileno())

    found = rates(size, runs, work, time.perf_counter, lambda: file.unlink(missing_ok=True))
    file.unlink()
    return found


def digest(files: Sequence[Path], runs: int) -> list[float]:
    """Digests of inputs, as a merge takes them beside its work; files in the page cache."""

    def work() -> None:
        with InputDigests([[file] for file in files]) as digests:
            digests.all()

    size = sum(file.stat().st_size for file in files)
    return rates(size, runs, work, time.process_time, lambda: touch(files))


@dataclass(frozen=True)
class _Named:
    """A tensor of the result, of eight blocks."""

    name: str
    shape: tuple[int, ...] = (8, BLOCK_ELEMENTS)
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class _Listing:
    tensors: tuple[_Named, ...]


def output(folder: Path, size: int, runs: int) -> list[float]:
    """What the thread that writes does with blocks that are ready: look at each, hash it, hand it to the system."""
    blocks = [(0.02 * torch.randn(1, BLOCK_ELEMENTS)).bfloat16() for _ in range(8)]
    tensors = tuple(_Named(f"t{i}") for i in range(max(1, size // (16 * BLOCK_ELEMENTS))))
    job = Job(find_method("linear").implementation(), torch.device("cpu"))
    folder.mkdir(parents=True, exist_ok=True)

    def clear() -> None:
        for file in folder.iterdir():
            file.unlink()

    def made(tensor: object, job: object, observers: object) -> Iterator[list[torch.Tensor]]:
        return ([block] for block in blocks)

    def work() -> None:
        writer = ShardedWriter(folder, tensors, inf, Journal(folder / "journal.jsonl", "bandwidth"))
        run(_Listing(tensors), job, [writer], quiet=True, make=made)
        writer.close()

    found = rates(16 * BLOCK_ELEMENTS * len(tensors), runs, work, time.process_time, clear)
    clear()
    folder.rmdir()
    return found


def _planned(method: str, base: Path, models: Sequence[Path]) -> Work:
    given: dict[str, Any] = {"density": DENSITY[method]} if method in DENSITY else {}
    names = {"base_model": str(base), "models_to_merge": ",".join(map(str, models))}
    recipe = make_recipe({"method": method, **names, **given}, {})
    return plan_merge(recipe, Output(Path(), device="cpu", quiet=True, load_check=False))


def method_rates(method: str, base: Path, models: Sequence[Path], runs: int) -> Mapping[str, list[float]]:
    """Merging by one thread, nothing written: `before` a tensor's first block, and its `blocks`.

    Every run maps the files anew, so that the system's work for the pages is in it. `before` is left out where it is
    less than a hundredth of the whole.
    """
    torch.set_num_threads(1)
    wholes, befores = [], []
    for _ in range(runs):
        seconds = []
        for what in (_prepare, _merge):
            work = _planned(method, base, models)
            job = work.make_job()
            started = time.process_time()
            what(work, job)
            seconds.append(time.process_time() - started)
            for checkpoint in work.inputs.all:
                checkpoint.weights.close()
        before, whole = seconds
        size = work.plan.bytes_read
        befores.append(size / max(1e-9, before))
        wholes.append(size / max(1e-9, whole - before))
        needed = before > whole / 100
    return {"blocks": wholes} | ({"before": befores} if needed else {})


def _prepare(work: Work, job: Job) -> None:
    prepare = job.implementation.prepare
    for tensor in work.plan.tensors:
        if prepare is not None and tensor.is_merged:
            prepare(group_of(tensor, job), tensor.parameters)


def _merge(work: Work, job: Job) -> None:
    for tensor in work.plan.tensors:
        for _ in tensor_blocks(tensor, job):
            pass


def start(base: Path, models: Sequence[Path], out: Path, runs: int) -> list[float]:
    """Seconds of whole merges of checkpoints with next to nothing in them; the first, unmeasured, is load-checked."""
    names = ["--base_model", str(base), "--models_to_merge", ",".join(map(str, models))]
    command = [sys.executable, "merge.py", "--method", "task_arithmetic", *names, "--save_path", str(out),
               "--overwrite", "--quiet"]  # fmt: skip
    return [peak(command)[1] for _ in range(runs + 1)][1:]


def buffer() -> int:
    """Return the bytes that the system takes before a writer must wait for the disk; 0 where that is not known."""
    settings = Path("/proc/sys/vm")
    try:
        if fixed := int((settings / "dirty_bytes").read_text()):
            return fixed
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
        return free * int((settings / "dirty_ratio").read_text()) // 100
    except (OSError, StopIteration, ValueError):
        return 0
