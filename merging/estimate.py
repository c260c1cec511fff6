"""How long a merge will take: from the bytes that its plan moves and the measured bandwidths of a machine.

Four things happen at the same time, and the slowest of them sets the pace:

    read     inputs from the disk                   bytes read / read
    digest   `lane_threads` of the cores            bytes read / (digest x processes x cores of each for it)
             for each process
    compute  all that the cores are needed for      CPU seconds / cores, where CPU seconds are
                                                    bytes read x (1 / before + 1 / blocks + 1 / digest)
                                                    + written / output
    write    the slower of the disk                 (bytes written - buffer) / write
             and the thread that writes             written / (output x processes) + read / (before x cores)

    total  = start + the largest of the four; `binding` is the largest of the five

`before` is what a method finds out about a tensor before its first block (TIES: its thresholds), while the writing
thread waits. Cores and processes are those of all machines together. What is left in the system's buffer when
a process ends is not waited for; several processes wait for all of it. Downloads are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merging.bandwidths import Bandwidths
from merging.digests import lane_threads

LANES = {"start": "starting", "read": "reading", "digest": "digests", "compute": "computing", "write": "writing"}
"""What an estimate consists of, as people are told of it."""


@dataclass(frozen=True)
class Amounts:
    """Bytes that a merge moves: read of inputs (and hashed), written.

    method: whose measured rate holds for it; None where there is none. cached: whether the system holds the inputs.
    """

    read: int
    written: int
    method: str | None = None
    cached: bool = False


@dataclass(frozen=True)
class Estimate:
    """Seconds for each resource; compute is None where the method has no measured rate."""

    machine: str
    start: float
    read: float
    digest: float
    compute: float | None
    write: float

    @property
    def seconds(self) -> dict[str, float]:
        """What is known, by the names of LANES."""
        found = {name: getattr(self, name) for name in LANES}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def binding(self) -> str:
        """The name of the resource that needs longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def total(self) -> float:
        """Seconds from the command to its end; without what is not known."""
        return self.start + max(value for name, value in self.seconds.items() if name != "start")

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON, seconds rounded to a thousandth."""
        rounded = {name: None if value is None else round(value, 3) for name, value in vars(self).items()
                   if name != "machine"}  # fmt: skip
        return {"machine": self.machine, "seconds": round(self.total, 3), "binds": self.binding, **rounded}


def estimate(amounts: Amounts, machine: Bandwidths) -> Estimate:
    """Return what a merge takes on a machine, or on several; the formula is the module's."""
    processes, cores = machine.processes * machine.machines, machine.cores * machine.machines
    rate = machine.methods.get(amounts.method) if amounts.method else None
    before = amounts.read / rate.before if rate else 0.0
    busy = amounts.read / machine.digest + amounts.written / machine.output
    lanes = processes * lane_threads(machine.cores)
    late = amounts.written if processes > 1 else max(0.0, amounts.written - machine.buffer)
    return Estimate(
        machine=machine.name,
        start=machine.start,
        read=amounts.read / (machine.cached * machine.machines if amounts.cached else machine.read),
        digest=amounts.read / (machine.digest * lanes),
        compute=(amounts.read / rate.blocks + before + busy) / cores if rate else None,
        write=max(late / machine.write, amounts.written / (machine.output * processes) + before / cores),
    )


def as_sentence(found: Mapping[str, Any]) -> str:
    """Return an estimate (its `as_dict`) as a line for people, with what binds."""
    parts = []
    for name, word in LANES.items():
        if found[name] is None:
            parts.append(f"{word} not measured for this merge")
        else:
            parts.append(f"{word} {duration(found[name])}{' (binds)' if name == found['binds'] else ''}")
    about = "at least" if found["compute"] is None else "about"
    return f'takes {about} {duration(found["seconds"])} on "{found["machine"]}": {", ".join(parts)}'


def duration(seconds: float) -> str:
    """Return seconds for people, in two figures or whole: "0.4 s", "41 s", "7 min", "2.3 h"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 99.5:
        return f"{minutes:.1f} min" if minutes < 9.95 else f"{minutes:.0f} min"
    return f"{minutes / 60:.1f} h"
