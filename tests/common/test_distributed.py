"""Collectives of ranks over a store, and the end of all ranks when one of them ends or does not start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch.distributed import PrefixStore, Store, TCPStore

from common import distributed
from common.distributed import ProcessGroup, RankEnd, RankHost, RankMonitor, StoreChannel
from common.errors import StoppedError
from tests.helpers.launching import ROOT


def ranks_in_threads(count: int, run: Callable[[ProcessGroup], Any]) -> tuple[dict[int, Any], int]:
    """Run a function as each of `count` ranks, in threads over one real store; return its results and the keys left."""
    server = TCPStore("127.0.0.1", 0, count, True, wait_for_workers=False)
    here = RankHost.of_this_process()
    hosts = [replace(here, machine=f"machine-{rank}") for rank in range(count)]  # no rank watches another's process
    results: dict[int, Any] = {}

    def be(rank: int) -> None:
        store = PrefixStore("ranks", TCPStore("127.0.0.1", server.port, count, False, wait_for_workers=False))
        monitor = RankMonitor(store, rank, 0, hosts, is_agent_store=True)
        try:
            results[rank] = run(ProcessGroup(rank, count, 0, StoreChannel(store, monitor)))
        except StoppedError as error:
            results[rank] = error
        finally:
            monitor.close()

    threads = [threading.Thread(target=be, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results, server.num_keys()


@pytest.mark.parametrize("count", [2, 3])
def test_collectives(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks get all values in rank order, also of values longer than a chunk and of none; sums have the bits of an
    addition in rank order, in each dtype, and the store is left empty."""
    monkeypatch.setattr(distributed, "CHUNK_BYTES", 1 << 10)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(7, 300, dtype=torch.float64, generator=generator) * 10.0**rank for rank in range(count)]
    numbers = [torch.arange(3000) + rank for rank in range(count)]
    halves = [tensor.bfloat16() for tensor in tensors]

    def run(group: ProcessGroup) -> tuple[object, ...]:
        rank = group.rank
        gathered = group.gather({"rank": rank})
        values = group.all_gather("ab" * (1000 * rank))
        group.barrier()
        sums = [group.all_reduce_sum(each[rank]) for each in (tensors, numbers, halves)]
        return gathered, values, sums, group.all_reduce_sum(torch.zeros(0, 3)).shape

    results, keys = ranks_in_threads(count, run)
    assert keys <= 2 * count + 1  # heartbeats, marks of leaving, the store's own key
    expected = [reduce(torch.add, each) for each in (tensors, numbers, halves)]
    for rank in range(count):
        gathered, values, sums, empty = results[rank]
        assert gathered == (None if rank else [{"rank": other} for other in range(count)])
        assert values == ["ab" * (1000 * other) for other in range(count)]
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(sums, expected, strict=True))
        assert empty == (0, 3)


def test_values_beyond_the_limit_of_the_store() -> None:
    """A value larger than the 8 MiB that the store takes at once reaches all ranks."""
    results, _ = ranks_in_threads(2, lambda group: [len(value) for value in group.all_gather("x" * (9 << 20))])
    assert results == {0: [9 << 20] * 2, 1: [9 << 20] * 2}


def test_a_rank_without_heartbeat_counts_as_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of another machine that stops its heartbeat ends the others, with one sentence on each machine."""
    monkeypatch.setattr(distributed, "HEARTBEAT_TIMEOUT", 1.5)
    monkeypatch.setattr(distributed, "HEARTBEAT_SECONDS", 0.1)
    heartbeat = RankMonitor._check_heartbeat

    def check_heartbeat(self: RankMonitor, store: Store) -> None:
        if self.rank != 2:
            heartbeat(self, store)

    monkeypatch.setattr(RankMonitor, "_check_heartbeat", check_heartbeat)
    results, _ = ranks_in_threads(3, lambda group: group.barrier() if group.rank < 2 else time.sleep(4))
    assert [str(results[rank]) for rank in (0, 1)] == ["Rank 2 of 3 on machine-2 died."] * 2


def test_the_first_end_counts() -> None:
    """Of several errors the first one's exit code and rank reach all ranks, also those that wait in a collective."""

    def run(group: ProcessGroup) -> object:
        assert group.channel is not None
        if group.rank == 1:
            return group.channel.monitor.fail(2, keeps_work=False)
        group.barrier()
        return None

    results, _ = ranks_in_threads(3, run)
    assert results[1] == RankEnd(1, "machine-1", 2, is_reported=True, keeps_work=False)
    for rank in (0, 2):
        error = results[rank]
        assert isinstance(error, StoppedError)
        assert (error.exit_code, error.keeps) == (2, False)
        assert str(error) == "Rank 1 of 3 on machine-1 failed and reports its error there."


def test_a_rank_that_does_not_start() -> None:
    """The other ranks wait for a bounded time and name the missing rank and the address."""
    message = join_alone(rank=0, port=0)
    assert message.startswith("Rank 0 of 2 did not meet the other ranks at 127.0.0.1:0 within ")
    assert "(no sign of rank 1)" in message


def test_a_store_out_of_reach() -> None:
    """A rank whose launcher's store does not answer ends with one sentence that names its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    message = join_alone(rank=1, port=port)
    assert message.startswith(f"Rank 1 of 2 did not meet the other ranks at 127.0.0.1:{port} within ")
    assert "start all ranks, with the same MASTER_ADDR and MASTER_PORT" in message
    done = join_alone(rank=1, port=0, variables={"MASTER_ADDR": ""})
    assert done.startswith("WORLD_SIZE is 2 and MASTER_ADDR or MASTER_PORT is not set")


def join_alone(rank: int, port: int, variables: Mapping[str, str] = MappingProxyType({})) -> str:
    """Start one rank of two, with little patience, and return its one line on stderr."""
    code = (
        "import sys; from common import distributed; from common.cli import run\n"
        "distributed.JOIN_SECONDS = 1.0; distributed.CONNECT_SECONDS = 0.3\n"
        "def main(argv):\n"
        "    with distributed.init_distributed(): pass\n"
        "sys.exit(run(main, []))\n"
    )
    ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, **ranks, "OMP_NUM_THREADS": "1", **variables}
    environment.pop("TORCH_CPP_LOG_LEVEL", None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    return line.removeprefix("error: ")


def test_strided_slices_cover_everything() -> None:
    """The slices of all ranks hold each item once, and their lengths differ by one at most."""
    items = list(range(11))
    for count in (1, 2, 5, 20):
        slices = [ProcessGroup(rank, count).strided_slice(items) for rank in range(count)]
        assert sorted(i for part in slices for i in part) == items
        assert max(map(len, slices)) - min(map(len, slices)) <= 1
