"""Programs to run and verdicts on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

MAX_REPORT = 64 << 10
STATUSES = ("passed", "failed", "timed out")


@dataclass(frozen=True)
class Program:
    """A model-written program and its tests.

    Attributes:
        code: the program.
        tests: tests that run in another process and call the program's functions; empty where `code` ends with its own
            tests, in which case the program can claim to have passed.
        prelude: trusted code whose definitions the tests use.
        entry_points: names in the tests that always mean the program's objects; None where unknown.
    """

    code: str
    tests: str = ""
    prelude: str = ""
    entry_points: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Verdict:
    """Verdict on one program.

    Attributes:
        status: passed, failed or timed out.
        detail: error or limit that ended it.
        layers: layers of containment that held.
    """

    status: Literal["passed", "failed", "timed out"]
    detail: str = ""
    layers: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """True for a program whose tests passed."""
        return self.status == "passed"


@dataclass(frozen=True)
class Report:
    """The report of the test process: a verdict, or why the sandbox could not be set up (status "unavailable")."""

    status: str
    detail: str
    layers: tuple[str, ...]


def parse_report(data: bytes) -> Report | None:
    """Return the report in the output of the sandbox; None where it is no complete report of at most 64 KiB."""
    if len(data) > MAX_REPORT:
        return None
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or fields.keys() != {"status", "detail", "layers"}:
        return None
    status, detail, layers = fields["status"], fields["detail"], fields["layers"]
    if status not in (*STATUSES, "unavailable") or not isinstance(detail, str) or not isinstance(layers, list):
        return None
    if len(layers) > 16 or not all(isinstance(one, str) and len(one) < 100 for one in layers):
        return None
    return Report(status, "".join(c if c.isprintable() else " " for c in detail), tuple(layers))
