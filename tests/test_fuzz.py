"""500 mutated inputs, always the same: refused in one sentence, or merged to what their content says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.dev.fuzz import KINDS, fuzz, summary

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_inputs(kind: str) -> None:
    """No case of a kind hangs, is Unexpected, prints foreign text as it is, or gives a wrong result."""
    tally = fuzz([kind], 500 // len(KINDS), seed=15)[kind]
    assert tally.problems == []
    assert tally.cases == tally.refused + tally.identical + tally.verified == 500 // len(KINDS)
    assert tally.refused > 0


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
