"""What the processes of one run tell each other: values where they meet, and that one of them has ended.

Each process holds one connection to the first, which answers for all. A connection ends with its process, so that the
others know of an end at once, whatever they are doing; a process that is not heard of for PATIENCE seconds counts as
ended (its machine is off, or cut off). torch's own collectives are not used: they wait for half an hour, or abort the
interpreter, and tell nothing to processes that are computing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from common.errors import StoppedError
from common.processes.interrupts import defer

BEAT = 5.0
"""Seconds between two signs of life."""
PATIENCE = 300.0
"""Seconds without one after which a process counts as ended."""
GRACE = 20.0
"""Seconds that a process has to come to its end once another has ended."""


@dataclass(frozen=True)
class Ending:
    """How a run ended before its time: by which process, on which machine, and with which exit code.

    told: whether that process says why; keeps: whether what is done stays for --resume.
    """

    rank: int
    machine: str
    code: int = 1
    told: bool = False
    keeps: bool = True


class Company:
    """This process among the others: `links` are its connections by number, of the first to all, of others to it."""

    def __init__(
        self, rank: int, count: int, local: int, machines: Mapping[int, str], links: Mapping[int, Connection],
        patience: float = PATIENCE, keep: object = None,
    ) -> None:  # fmt: skip
        """keep: what must live as long as this (the launcher's store, where it lives in the first process)."""
        self.rank, self.count, self.local = rank, count, local
        self.ending: Ending | None = None
        self._machines, self._links, self._patience = machines, dict(links), patience
        self._changed, self._sending = threading.Condition(), threading.Lock()
        self._round = 0
        self._given: dict[int, dict[int, bytes]] = {}
        self._answers: dict[int, bytes] = {}
        self._left, self._kept = False, keep
        threading.Thread(target=self._attend, daemon=True, name="company").start()

    def exchange(self, payload: bytes, how: str = "listed") -> bytes:
        """Give a value and return what all gave: a JSON list of JSON texts, or the sum of arrays of the type `how`.

        Raises StoppedError where one of them has ended.
        """
        number, self._round = self._round, self._round + 1
        if self.rank == 0:
            self._give(0, number, how, payload)
        else:
            self._send(0, _pack("give", payload, number=number, how=how))
        with self._changed:
            self._changed.wait_for(lambda: number in self._answers or self.ending is not None)
            if number not in self._answers:
                self.check()
            return self._answers.pop(number)

    def check(self) -> None:
        """Raise StoppedError where another process has ended."""
        if self.ending is not None:
            raise self.stopped()

    def fail(self, code: int, keeps: bool) -> Ending:
        """Tell the others that this process ends by an error; returns how the run ended: so, or by an earlier end."""
        mine = Ending(self.rank, self._machines[self.rank], code, told=True, keeps=keeps)
        if self.rank == 0:
            self._end(mine)
        elif self.ending is None:
            self._send(0, _pack("failed", code=code, keeps=keeps))
            with self._changed:
                self._changed.wait_for(lambda: self.ending is not None, timeout=GRACE)
        return self.ending or mine

    def stopped(self) -> StoppedError:
        """The error of a process that ends because another has; on each machine at most one says so."""
        assert self.ending is not None
        ending = self.ending
        here = ending.machine == self._machines[self.rank]
        first = 1 if here and ending.rank == self.rank - self.local else 0
        silent = self.local != first or (here and ending.told)
        who = f"rank {ending.rank} of {self.count}, on {ending.machine}"
        sentence = f"Another process of this run stopped ({who}{', where it says why' if ending.told else ''})."
        return StoppedError("" if silent else sentence, ending.code, ending.keeps)

    def terminated(self, number: int = signal.SIGTERM, *_: object) -> None:
        """Handle SIGTERM: a launcher sends it when another process has ended, or when the whole run is to end.

        Raises StoppedError, or KeyboardInterrupt where no other has ended.
        """
        if defer(number):
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for _tick in range(40):  # what the launcher saw is here in a moment
            self.check()
            time.sleep(0.05)
        raise KeyboardInterrupt

    def close(self) -> None:
        """Part from the others: the first process waits until they have heard all that it said."""
        if self.rank == 0:
            with self._changed:
                self._changed.wait_for(lambda: not self._links, timeout=GRACE)
        self._left = True
        if self.rank:
            self._send(0, _pack("bye"))

    def _attend(self) -> None:
        """Hear the others until this process leaves; runs in a thread of its own."""
        heard = dict.fromkeys(self._links, time.monotonic())
        beaten, beat = 0.0, min(BEAT, self._patience / 4)
        try:
            while self._links and not self._left:
                links = {link: rank for rank, link in list(self._links.items())}
                for link in wait(list(links), beat):
                    rank = links[link]  # type: ignore[index]
                    heard[rank] = time.monotonic()
                    self._hear(rank, link)  # type: ignore[arg-type]
                now = time.monotonic()
                if now - beaten >= beat:
                    self._tell(_pack("beat"))
                    beaten = now
                for rank in [rank for rank in list(self._links) if now - heard[rank] > self._patience]:
                    self._lose(rank)
        except Exception:  # nobody would attend any more, and all would wait for ever
            self._end(Ending(self.rank, self._machines[self.rank]))

    def _hear(self, rank: int, link: Connection) -> None:
        try:
            kind, fields, payload = _unpack(link.recv_bytes())
        except (EOFError, OSError):
            self._lose(rank)
            return
        if kind == "give":
            self._give(rank, fields["number"], fields["how"], payload)
        elif kind == "all":
            with self._changed:
                self._answers[fields["number"]] = payload
                self._changed.notify_all()
        elif kind == "failed":
            self._end(Ending(rank, self._machines[rank], fields["code"], told=True, keeps=fields["keeps"]))
        elif kind == "end":
            self._end(Ending(**fields))
            self._send(rank, _pack("bye"))
        elif kind == "bye":
            self._drop(rank)

    def _give(self, rank: int, number: int, how: str, payload: bytes) -> None:
        """Take what a process gives; the last one completes the answer."""
        with self._changed:
            given = self._given.setdefault(number, {})
            given[rank] = payload
            if len(given) < self.count:
                return
            del self._given[number]
            answer = _combined(how, [given[rank] for rank in sorted(given)])
            self._answers[number] = answer
            self._changed.notify_all()
        self._tell(_pack("all", answer, number=number))

    def _end(self, ending: Ending) -> None:
        """The run has ended: the first end counts, and everybody is told of it."""
        with self._changed:
            if self.ending is not None:
                return
            self.ending = ending
            self._changed.notify_all()
        if self.rank == 0:
            self._tell(_pack("end", **asdict(ending)))
        if ending.rank != self.rank:
            timer = threading.Timer(GRACE, self._leave_now)
            timer.daemon = True
            timer.start()

    def _leave_now(self) -> None:
        """End a process that is still in the middle of something, as in a product of large matrices."""
        if self._left:
            return
        error = self.stopped()
        if str(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)

    def _tell(self, message: bytes) -> None:
        for rank in list(self._links):
            self._send(rank, message)

    def _send(self, rank: int, message: bytes) -> None:
        link = self._links.get(rank)
        if link is None:
            return
        try:
            with self._sending:
                link.send_bytes(message)
        except OSError:
            self._lose(rank)

    def _lose(self, rank: int) -> None:
        """A process is gone without a word."""
        if self._drop(rank) and not self._left:
            self._end(Ending(rank, self._machines[rank]))

    def _drop(self, rank: int) -> bool:
        with self._changed:
            known = self._links.pop(rank, None) is not None
            self._changed.notify_all()
        return known


def _pack(kind: str, payload: bytes = b"", **fields: Any) -> bytes:
    return json.dumps([kind, fields]).encode() + b"\n" + payload


def _unpack(message: bytes) -> tuple[str, dict[str, Any], bytes]:
    head, _, payload = message.partition(b"\n")
    kind, fields = json.loads(head)
    return kind, fields, payload


def _combined(how: str, parts: list[bytes]) -> bytes:
    """What all gave, in the order of the processes, so that a sum has the same bits in every run."""
    if how == "listed":
        return b"[" + b",".join(parts) + b"]"
    import numpy

    total = numpy.frombuffer(parts[0], how).copy()
    for part in parts[1:]:
        total += numpy.frombuffer(part, how)
    return total.tobytes()
