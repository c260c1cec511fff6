"""A sample of scripts/dev/torture.py: interrupted and failing runs lose, break and leave nothing."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from scripts.dev.torture import as_text
from tests.conftest import ROOT


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
def test_a_sample_of_interruptions(tmp_path: Path, run_script) -> None:
    """60 runs, killed at a file operation or at a random moment, or with an operation that fails: no problem."""
    finished = run_script("scripts/dev/torture.py", "--sample", 60, "--results", tmp_path / "torture.json", "--quiet")
    assert finished.returncode == 0, finished.stderr[-3000:]
    results = json.loads((tmp_path / "torture.json").read_text())
    assert results["cases"] == sum(row["cases"] for row in results["rows"]) == 60
    assert results["problems"] == []


def test_the_committed_figures() -> None:
    """The figures that docs/reliability.md quotes are of every kind of run and fault, without a problem."""
    results = json.loads((ROOT / "results" / "torture.json").read_text())
    assert results["problems"] == []
    tried = {row["scenario"] for row in results["rows"] if row["cases"]}
    assert tried == {row["scenario"] for row in results["rows"]}
    assert f"{results['cases']} cases of {results['of']}" in as_text(results)
