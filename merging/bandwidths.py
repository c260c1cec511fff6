"""What a machine reads, hashes, merges and writes in a second: types, and the file of scripts/bandwidth.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from console.errors import FailureError, UsageError, nearest
from console.files import read_json, user_path


@dataclass(frozen=True)
class Rate:
    """Bytes of inputs, the base's among them, that one core merges in a second.

    before: what is found out about a whole tensor first; blocks: its blocks.
    """

    blocks: float
    before: float = math.inf


@dataclass(frozen=True)
class Bandwidths:
    """What one or several machines do, in bytes per second.

    cores, processes: of each machine. read, write: the disk's, or the file system's for all machines together; cached:
    inputs that the system holds in memory already, for each machine. digest: inputs, by one core. output: results,
    which one thread checks, hashes and hands to the system. buffer: bytes that the system takes before a writer must
    wait for the disk. start: seconds until and after the weights. methods: {name: rate}; those not in it were not
    measured.
    """

    name: str
    cores: int
    read: float
    write: float
    digest: float
    output: float
    start: float
    cached: float = math.inf
    buffer: float = 0.0
    processes: int = 1
    machines: int = 1
    methods: Mapping[str, Rate] = field(default_factory=dict)


def bandwidths_at(text: str) -> Bandwidths:
    """Return what `FILE` or `FILE:MACHINE` names ("here" where no machine is). Raises as `read_bandwidths` does."""
    file, colon, machine = text.rpartition(":")
    if not colon or user_path(text).is_file():
        return read_bandwidths(user_path(text))
    return read_bandwidths(user_path(file), machine)


def read_bandwidths(file: Path, name: str = "here") -> Bandwidths:
    """Read a machine from a file of scripts/bandwidth.py; what it does not say is that of the machine it is `like`.

    Raises CheckpointError for no JSON, FailureError for other contents, UsageError for a machine that is not in it.
    """
    machines = read_json(file, f"{file} does not exist; scripts/bandwidth.py measures one.").get("machines")
    if not isinstance(machines, dict) or not all(isinstance(entry, dict) for entry in machines.values()):
        raise FailureError(f"{file} has no machines in it; scripts/bandwidth.py writes such a file.")
    if name not in machines:
        raise UsageError(f"{file} has no machine {name!r}.{nearest(name, machines)} It has {', '.join(machines)}.")
    given = machines[name]
    if (like := given.get("like")) is not None:
        if like not in machines or "like" in machines[like]:
            raise FailureError(f"{file}: machine {name} is like {like!r}, which is no measured machine of the file.")
        given = {**machines[like], **given}
    number = _Numbers(file, name, given)
    return Bandwidths(
        name=name,
        cores=number.whole("cores"),
        processes=number.whole("processes", 1),
        machines=number.whole("machines", 1),
        read=number.positive("read"),
        write=number.positive("write"),
        digest=number.positive("digest"),
        output=number.positive("output"),
        start=number.positive("start"),
        cached=number.positive("cached", math.inf),
        buffer=number.at_least("buffer", 0.0),
        methods=_methods(file, name, given.get("methods", {})),
    )


def _methods(file: Path, name: str, given: Any) -> dict[str, Rate]:
    if not isinstance(given, dict) or not all(isinstance(rates, dict) for rates in given.values()):
        raise FailureError(f"{file}: machine {name}: methods must map names to rates, found {given!r}.")
    found = {}
    for method, rates in given.items():
        number = _Numbers(file, f"{name}, {method}", rates)
        found[method] = Rate(number.positive("blocks"), number.positive("before", math.inf))
    return found


@dataclass(frozen=True)
class _Numbers:
    """The numbers of one entry; each is refused by the name of file, entry and key."""

    file: Path
    entry: str
    given: Mapping[str, Any]

    def at_least(self, key: str, default: float | None = None) -> float:
        value = self.given.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or math.isnan(value):
            raise FailureError(f"{self.file}: machine {self.entry}: {key} must be a positive number, found {value!r}.")
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.at_least(key, default)
        if value == 0:
            raise FailureError(f"{self.file}: machine {self.entry}: {key} must be a positive number, found 0.")
        return value

    def whole(self, key: str, default: float | None = None) -> int:
        value = self.positive(key, default)
        if value != int(value):
            raise FailureError(f"{self.file}: machine {self.entry}: {key} must be a whole number, found {value:g}.")
        return int(value)
