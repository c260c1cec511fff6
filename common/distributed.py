"""Ranks of one run: collectives over the launcher's TCPStore, and the end of all ranks when one of them ends.

torchrun and accelerate launch open torch.distributed's TCPStore at MASTER_ADDR:MASTER_PORT; under other launchers rank
0 opens it there. All values travel through that store, and no rank listens on a port of its own. torch's own
collectives are not used: they open further ports, add in an order that depends on the backend, and do not tell a rank
that is busy with other work that another rank has ended.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from common.cli import explain
from common.errors import FailureError, ProjectError, StoppedError, UsageError
from common.files.json_values import JsonValue
from common.processes.interrupts import defer

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store

T = TypeVar("T")

MAX_RANKS = 65_536
JOIN_SECONDS = 600.0
"""Time for all ranks to reach the store: machines start at different times, and read one disk."""
CONNECT_SECONDS = 5.0
"""Time of one attempt to connect, which no signal interrupts."""
HEARTBEAT_SECONDS = 0.5
HEARTBEAT_TIMEOUT = 60.0
"""Time without a heartbeat after which a rank on another machine counts as ended."""
GRACE_SECONDS = 20.0
"""Time for a rank to stop by itself after another rank has ended."""
CHUNK_BYTES = 4 << 20
"""Size of the pieces in which values are stored; TCPStore refuses values of more than 8 MiB."""


def launcher_ranks() -> tuple[int, int, int]:
    """Return (rank, number of ranks, rank on this machine) from a launcher's environment variables.

    Returns:
        (0, 1, 0) without WORLD_SIZE, and for a WORLD_SIZE of 1.

    Raises:
        UsageError: A variable is not a whole number, or RANK is missing or not below WORLD_SIZE.
    """
    world_size = _environment_number("WORLD_SIZE", 1)
    if world_size == 1:
        return 0, 1, 0
    if not os.environ.get("RANK"):
        raise UsageError(
            f"WORLD_SIZE is {world_size} and RANK is not set: start with torchrun or accelerate launch, or unset "
            "WORLD_SIZE for one process."
        )
    rank = _environment_number("RANK", 0)
    if not 1 <= world_size <= MAX_RANKS or not 0 <= rank < world_size:
        raise UsageError(f"RANK is {rank} and WORLD_SIZE is {world_size}: ranks are numbered from 0 to WORLD_SIZE - 1.")
    return rank, world_size, _environment_number("LOCAL_RANK", rank)


def _environment_number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise UsageError(f"The environment variable {name} is {text[:40]!r}, and a whole number was expected.")
    return int(text)


@dataclass(frozen=True)
class ProcessGroup:
    """The ranks of one run and their collectives; without `channel`, the one rank of a run of one process.

    Every rank calls the collectives in the same order. All of them raise StoppedError where another rank has ended.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    channel: StoreChannel | None = field(default=None, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """True for rank 0, which plans, prints and finishes the result of all ranks."""
        return self.rank == 0

    def gather(self, value: JsonValue) -> list[JsonValue] | None:
        """Return the values of all ranks in rank order on rank 0, None on the others; JSON types only."""
        if self.channel is None:
            return [value]
        parts = self.channel.gather(json.dumps(value).encode())
        return None if parts is None else [json.loads(part) for part in parts]

    def all_gather(self, value: JsonValue) -> list[JsonValue]:
        """Return the values of all ranks in rank order; JSON types only."""
        if self.channel is None:
            return [value]
        values = self.gather(value)
        gathered: list[JsonValue] = json.loads(self.channel.broadcast(json.dumps(values).encode()))
        return gathered

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the elementwise sum over all ranks, added in rank order so that its bits do not vary.

        Args:
            tensor: one shape and dtype on all ranks, on any device.

        Returns:
            The sum in the same shape and dtype, on the CPU.
        """
        if self.channel is None:
            return tensor
        import torch

        local = tensor.detach().cpu().contiguous()
        total = torch.empty_like(local)
        chunk = max(1, CHUNK_BYTES // local.element_size())
        for start in range(0, local.numel(), chunk):  # the store holds one chunk of each rank at most
            part = local.view(-1)[start : start + chunk]
            parts = self.channel.gather(part.view(torch.uint8).numpy().tobytes())
            if parts is not None:
                part = part.clone()
                for other in parts[1:]:
                    part += torch.frombuffer(bytearray(other), dtype=local.dtype)
            summed = self.channel.broadcast(part.view(torch.uint8).numpy().tobytes())
            total.view(-1)[start : start + chunk] = torch.frombuffer(bytearray(summed), dtype=local.dtype)
        return total

    def barrier(self) -> None:
        """Return once every rank has called this."""
        self.all_gather(None)

    def check_ranks(self) -> None:
        """Raise StoppedError where another rank has ended; for loops that compute without collectives."""
        if self.channel is not None:
            self.channel.monitor.check()

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block on rank 0, then on the others: they find its downloads, and skip the block where it fails."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def strided_slice(self, items: Sequence[T]) -> list[T]:
        """Return every world_size-th item from the rank-th on: the slices of all ranks hold each item once."""
        return list(items[self.rank :: self.world_size])


SINGLE_PROCESS = ProcessGroup()


@dataclass(frozen=True)
class RankEnd:
    """The end of a rank before the end of the run.

    rank: -1 for the launcher's store. is_reported: the rank prints its error. keeps_work: finished work stays for
    --resume.
    """

    rank: int
    machine: str
    exit_code: int = 1
    is_reported: bool = False
    keeps_work: bool = True


@dataclass(frozen=True)
class RankHost:
    """The machine and process of a rank; pid_namespace tells containers of one host name apart."""

    machine: str
    pid_namespace: str
    pid: int

    @classmethod
    def of_this_process(cls) -> RankHost:
        """Describe the calling process."""
        namespace = ""
        with suppress(OSError):
            namespace = os.readlink("/proc/self/ns/pid")
        return cls(socket.gethostname(), namespace, os.getpid())

    def shares_pids(self, other: RankHost) -> bool:
        """Return whether the other's process number means the same process here."""
        return (self.machine, self.pid_namespace) == (other.machine, other.pid_namespace)


class RankMonitor:
    """A thread that sends this rank's heartbeat and notices the end of other ranks.

    The first end is written to the store under one key, from which every rank learns it within HEARTBEAT_SECONDS. Ranks
    on one machine watch each other's processes; across machines each rank watches the heartbeat of the next rank.
    """

    def __init__(self, store: Store, rank: int, local_rank: int, hosts: Sequence[RankHost], is_agent_store: bool):
        self.rank, self.world_size = rank, len(hosts)
        self.end: RankEnd | None = None
        self._store, self._local_rank, self._hosts, self._is_agent_store = store, local_rank, hosts, is_agent_store
        self._next, self._beat, self._beat_time = (rank + 1) % len(hosts), -1, time.monotonic()
        self._is_closing = threading.Event()
        self._wake_reader, self._wake_writer = os.pipe()
        self._poller = select.poll()
        self._poller.register(self._wake_reader, select.POLLIN)
        self._watched: dict[int, int] = {}
        clone = store.clone()  # type: ignore[attr-defined]  # one client serves one thread at a time
        self._thread = threading.Thread(target=self._run, args=(clone,), daemon=True, name="rank monitor")
        self._thread.start()

    def check(self) -> None:
        """Raise StoppedError where another rank has ended."""
        if self.end is not None:
            raise self.stopped_error()

    def fail(self, exit_code: int, keeps_work: bool) -> RankEnd:
        """Tell the other ranks that this one ends by an error; return the first end, which may be another rank's."""
        machine = self._hosts[self.rank].machine
        return self._set_end(self._store, RankEnd(self.rank, machine, exit_code, True, keeps_work))

    def lose_store(self) -> None:
        """Note that the store does not answer: its process has ended."""
        if self.end is None:
            if self._is_agent_store:
                self.end = RankEnd(-1, os.environ.get("MASTER_ADDR", ""))
            else:
                self.end = RankEnd(0, self._hosts[0].machine)

    def stopped_error(self) -> StoppedError:
        """Return the error by which this rank stops after another; one rank of a machine has its sentence."""
        end = self.end
        assert end is not None
        is_here = end.machine == self._hosts[self.rank].machine
        speaker = 1 if is_here and end.rank == self.rank - self._local_rank else 0
        if self._local_rank != speaker or (is_here and end.is_reported):
            sentence = ""
        elif end.rank < 0:
            sentence = f"The launcher's store on {end.machine} closed before the run was complete."
        elif end.is_reported:
            sentence = f"Rank {end.rank} of {self.world_size} on {end.machine} failed and reports its error there."
        else:
            sentence = f"Rank {end.rank} of {self.world_size} on {end.machine} died."
        return StoppedError(sentence, end.exit_code, end.keeps_work)

    def handle_sigterm(self, number: int = signal.SIGTERM, *_: object) -> None:
        """Handle SIGTERM, by which a launcher ends the other ranks when one has ended, or a scheduler the whole run.

        Raises:
            StoppedError: Another rank has ended.
            KeyboardInterrupt: No other rank has ended.
        """
        if defer(number):
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for _tick in range(40):  # the launcher may have noticed the end before this rank
            self.check()
            time.sleep(0.05)
        raise KeyboardInterrupt

    def close(self) -> None:
        """Leave the run. Rank 0, whose process may hold the store, waits for the others to leave."""
        self._is_closing.set()
        os.write(self._wake_writer, b"\0")
        self._thread.join(GRACE_SECONDS)  # a thread inside torch at the interpreter's exit would abort it
        with suppress(RuntimeError):
            self._store.add(f"left/{self.rank}", 1)
            if self.rank == 0:
                ended = self.end.rank if self.end else -1
                others = [f"left/{other}" for other in range(1, self.world_size) if other != ended]
                deadline = time.monotonic() + GRACE_SECONDS
                while others and not self._store.check(others) and time.monotonic() < deadline:
                    time.sleep(0.01)

    def _run(self, store: Store) -> None:
        try:
            self._watch_processes(store)
            while self.end is None:
                ready = self._poller.poll(HEARTBEAT_SECONDS * 1000)
                if self._is_closing.is_set():
                    return
                for descriptor, _event in ready:
                    self._check_left(store, self._watched[descriptor])
                    self._poller.unregister(descriptor)
                self._check_heartbeat(store)
                if store.check(["end"]):
                    self.end = RankEnd(**json.loads(store.get("end")))
        except RuntimeError:
            if self._is_closing.is_set():
                return
            self.lose_store()
        if self.end is not None and self.end.rank != self.rank and not self._is_closing.wait(GRACE_SECONDS):
            self._exit_now()

    def _watch_processes(self, store: Store) -> None:
        """Watch the processes of the other ranks of this machine; without pidfd (macOS) heartbeats alone tell."""
        hostname = self._hosts[self.rank]
        for rank, host in enumerate(self._hosts):
            if rank == self.rank or not host.shares_pids(hostname) or not hasattr(os, "pidfd_open"):
                continue
            try:
                descriptor = os.pidfd_open(host.pid)
            except ProcessLookupError:
                self._check_left(store, rank)
            except OSError:
                continue
            else:
                self._watched[descriptor] = rank
                self._poller.register(descriptor, select.POLLIN)

    def _check_heartbeat(self, store: Store) -> None:
        store.add(f"heartbeat/{self.rank}", 1)
        beat, now = store.add(f"heartbeat/{self._next}", 0), time.monotonic()
        if beat != self._beat:
            self._beat, self._beat_time = beat, now
        elif now - self._beat_time > HEARTBEAT_TIMEOUT:
            self._check_left(store, self._next)

    def _check_left(self, store: Store, rank: int) -> None:
        """Write the end of a rank whose process is gone, unless the rank has left at the end of the run."""
        if not store.check([f"left/{rank}"]):
            self._set_end(store, RankEnd(rank, self._hosts[rank].machine))

    def _set_end(self, store: Store, end: RankEnd) -> RankEnd:
        """Write an end to the store, where the first one stays, and return that one."""
        try:
            first = RankEnd(**json.loads(store.compare_set("end", "", json.dumps(asdict(end)))))
        except RuntimeError:
            self.lose_store()
            first = self.end or end
        self.end = self.end or first
        return self.end

    def _exit_now(self) -> None:
        """End a process that is still busy with something, such as a product of large matrices."""
        error = self.stopped_error()
        if str(error):
            resume_hint = " Finished work is kept: continue with --resume." if error.keeps else ""
            print(f"error: {error}{resume_hint}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)


class StoreChannel:
    """Values from all ranks to rank 0 and from rank 0 to all ranks, in chunks that are deleted once they are read."""

    def __init__(self, store: Store, monitor: RankMonitor) -> None:
        self.monitor = monitor
        self._store, self._rank, self._world_size = store, monitor.rank, monitor.world_size
        self._round = 0

    def gather(self, payload: bytes) -> list[bytes] | None:
        """Return the payloads of all ranks in rank order on rank 0, None on the others."""
        self._round += 1
        with self._store_errors():
            if self._rank:
                self._put(f"{self._round}/{self._rank}", payload)
                return None
            return [payload, *(self._take(f"{self._round}/{rank}", 1) for rank in range(1, self._world_size))]

    def broadcast(self, payload: bytes) -> bytes:
        """Return rank 0's payload on all ranks; that of the others is ignored."""
        self._round += 1
        with self._store_errors():
            if self._rank:
                return self._take(f"{self._round}", self._world_size - 1)
            self._put(f"{self._round}", payload)
            return payload

    def _put(self, key: str, payload: bytes) -> None:
        starts = range(0, len(payload), CHUNK_BYTES)
        for i, start in enumerate(starts):
            self._store.set(f"{key}/{i}", payload[start : start + CHUNK_BYTES])  # type: ignore[arg-type]
        self._store.set(key, str(len(starts)))  # last: whoever sees this key finds all chunks

    def _take(self, key: str, readers: int) -> bytes:
        waited = 0.0
        while not self._store.check([key]):
            self.monitor.check()
            delay = min(0.1, max(0.0002, waited / 8))
            time.sleep(delay)
            waited += delay
        chunks = [f"{key}/{i}" for i in range(int(self._store.get(key)))]
        payload = b"".join(self._store.get(chunk) for chunk in chunks)
        if readers == 1 or self._store.add(f"{key}/readers", 1) == readers:
            for name in (*chunks, key, f"{key}/readers"):
                self._store.delete_key(name)
        return payload

    @contextmanager
    def _store_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # all errors of torch's stores
            self.monitor.lose_store()
            raise self.monitor.stopped_error() from error


@contextmanager
def init_distributed() -> Iterator[ProcessGroup]:
    """Yield the ranks that a launcher started, or SINGLE_PROCESS where the environment names no launcher.

    The ranks end together: an error of one ends all with its exit code and is printed once, by that rank; the death of
    a rank is reported by the others. Only rank 0 has a standard output.

    Raises:
        UsageError: The launcher's environment variables contradict each other.
        FailureError: Not all ranks reach the store within JOIN_SECONDS.
    """
    rank, world_size, local_rank = launcher_ranks()
    if world_size == 1:
        yield SINGLE_PROCESS
        return
    if rank:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    channel = _join(rank, world_size, local_rank)
    monitor = channel.monitor
    group = ProcessGroup(rank, world_size, local_rank, channel)
    handler = signal.signal(signal.SIGTERM, monitor.handle_sigterm)
    try:
        with _standard_output(is_open=group.is_main):
            try:
                yield group
            except SystemExit as error:  # --help
                if error.code:
                    raise
                group.barrier()
                raise
        group.barrier()
        signal.signal(signal.SIGTERM, handler)
    except SystemExit as error:
        if error.code:
            monitor.fail(error.code if isinstance(error.code, int) else 1, keeps_work=False)
        raise
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, once the other ranks have ended
        if isinstance(error, StoppedError):
            raise
        end = monitor.fail(explain(error)[1], keeps_work=not isinstance(error, ProjectError))
        if end.rank == rank:
            raise
        stopped = monitor.stopped_error()
        for note in getattr(error, "__notes__", ()):
            stopped.add_note(note)
        raise stopped from None
    finally:
        monitor.close()


def _join(rank: int, world_size: int, local_rank: int) -> StoreChannel:
    """Connect to the store and wait for all ranks."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch prints a C++ stack for each failed attempt
    import torch

    if "OMP_NUM_THREADS" not in os.environ:  # the launcher's way to share the cores; else each rank takes all
        torch.set_num_threads(max(1, torch.get_num_threads() // _environment_number("LOCAL_WORLD_SIZE", world_size)))
    address = os.environ.get("MASTER_ADDR")
    if not address or not os.environ.get("MASTER_PORT"):
        raise UsageError(
            f"WORLD_SIZE is {world_size} and MASTER_ADDR or MASTER_PORT is not set: start with torchrun or accelerate "
            "launch, or unset WORLD_SIZE for one process."
        )
    port = _environment_number("MASTER_PORT", 0)
    is_agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    deadline = time.monotonic() + JOIN_SECONDS
    try:
        store = _open_store(address, port, world_size, rank == 0 and not is_agent_store, deadline)
        hosts = _exchange_hosts(store, rank, world_size, deadline)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise FailureError(
            f"Rank {rank} of {world_size} did not meet the other ranks at {address}:{port} within "
            f"{JOIN_SECONDS / 60:.0f} minutes ({reason}); start all ranks, with the same MASTER_ADDR and MASTER_PORT."
        ) from error
    return StoreChannel(store, RankMonitor(store, rank, local_rank, hosts, is_agent_store))


def _open_store(address: str, port: int, world_size: int, is_master: bool, deadline: float) -> Store:
    from torch.distributed import PrefixStore, TCPStore

    while True:
        try:
            store = TCPStore(
                address, port, world_size, is_master, timedelta(seconds=CONNECT_SECONDS), False, multi_tenant=True
            )
        except RuntimeError:
            if is_master or time.monotonic() > deadline:
                raise
        else:
            store.set_timeout(timedelta(seconds=HEARTBEAT_TIMEOUT))
            return PrefixStore("ranks", store)


def _exchange_hosts(store: Store, rank: int, world_size: int, deadline: float) -> list[RankHost]:
    store.set(f"host/{rank}", json.dumps(asdict(RankHost.of_this_process())))
    keys = [f"host/{other}" for other in range(world_size)]
    while not store.check(keys):
        if time.monotonic() > deadline:
            missing = [str(other) for other, key in enumerate(keys) if not store.check([key])]
            raise TimeoutError(f"no sign of rank {', '.join(missing)}")
        time.sleep(0.01)
    return [RankHost(**json.loads(host)) for host in store.multi_get(keys)]


@contextmanager
def _standard_output(is_open: bool) -> Iterator[None]:
    if is_open:
        yield
        return
    with open(os.devnull, "w") as null, redirect_stdout(null):
        yield
