"""500 mutated inputs, always the same: refused in one sentence, or merged to what their content says."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.dev.fuzz import KINDS, MAX_MIB, Inputs, Tally, Target, fuzz, run_merge, summary

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tallies() -> dict[str, Tally]:
    """The outcomes of 500 cases."""
    return fuzz(KINDS, 500 // len(KINDS), seed=15)


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_inputs(kind: str, tallies: dict[str, Tally]) -> None:
    """No case of a kind hangs, is Unexpected, prints foreign text as it is, or gives a wrong result."""
    tally = tallies[kind]
    assert tally.problems == []
    assert tally.cases == tally.refused + tally.identical + tally.verified == 500 // len(KINDS)
    assert tally.refused > 0
    assert 0 < tally.peak_mib <= MAX_MIB


class Faulty(Inputs):
    """Inputs whose runs hang, end the process and take too much memory, in every second case."""

    def header(self) -> Target:
        """Hang where a signal handler of Python would not run."""
        return replace(super().header(), run=_every_second(lambda: time.sleep(1000)))

    def index(self) -> Target:
        """End the process."""
        return replace(super().index(), run=_every_second(os.abort))

    def importance(self) -> Target:
        """Take more than MAX_MIB."""
        return replace(super().importance(), run=_every_second(lambda: b"x" * (MAX_MIB << 20)))


def _every_second(fault: Callable[[], object]) -> Callable[[Sequence[str]], tuple[int, str, str]]:
    done = []

    def run(command: Sequence[str]) -> tuple[int, str, str]:
        done.append(command)
        if len(done) % 2 == 0:
            fault()
        return run_merge(command)

    return run


def test_hangs_crashes_and_memory_are_noticed() -> None:
    """A case that hangs, ends the process or takes too much memory is counted, and the next case runs."""
    found = fuzz(["header", "index", "importance"], 3, seed=15, inputs=Faulty, seconds=8.0)
    assert (found["header"].hangs, found["index"].unexpected, found["importance"].memory) == (1, 1, 1)
    for tally in found.values():
        assert tally.cases == 3
        assert len(tally.problems) == 1
        assert tally.refused + tally.identical + tally.verified == 2
    where = found["header"].problems[0]
    assert "test_fuzz.py" in where, where
    assert found["importance"].peak_mib > MAX_MIB


def test_the_long_run_found_nothing() -> None:
    """The figures that docs/reliability.md quotes: every kind, and no problem in it."""
    found = json.loads((ROOT / "results" / "fuzz.json").read_text())
    assert set(found["kinds"]) == set(KINDS)
    for kind, tally in found["kinds"].items():
        assert tally["problems"] == [], kind
        assert tally["cases"] == tally["refused"] + tally["identical"] + tally["verified"], kind
        assert tally["cases"] >= 500 // len(KINDS)
        assert tally["peak_mib"] < 1024
    assert summary(found) in (ROOT / "docs" / "reliability.md").read_text()
