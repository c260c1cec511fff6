"""Tables of collected experiments in the documents: cells worked by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.stats.gains import HV
from scripts.experiments.document_tables import controls

COLUMNS = ["replicate", "family.rate_scale", "method", "models", "relaxation", "omega", "mean", HV]
AIM_GAINS = {"s1": 2.0, "s2": 3.0, "s3": 4.0, "s4": 3.0}
"""Points that AIM adds to the merge of each family; the control adds half of a point less, or more for s4."""


@pytest.fixture
def collected(tmp_path: Path) -> Path:
    """Four families of two training recipes, each with a merge, AIM and one control at the paper's omega."""
    rows = []
    for number, (replicate, gain) in enumerate(AIM_GAINS.items()):
        start = [replicate, 1.0 + 2 * (number % 2), "ties", "A + B"]
        control = gain + (0.5 if replicate == "s4" else -0.5)
        rows += [
            [*start, None, None, 50.0, 0.25],
            [*start, "AIM", 0.4, 50.0 + gain, 0.5],
            [*start, "uniform", 0.4, 50.0 + control, 0.5],
        ]
    file = tmp_path / "collected.json"
    file.write_text(json.dumps({"experiment": "e", "columns": COLUMNS, "part": 1, "parts": 1, "rows": rows}))
    return file


def test_cells_by_hand(collected: Path) -> None:
    """Means, Student's intervals over families, bold where the interval excludes 0, and one column per recipe."""
    table = controls(collected)
    # t(0.975, 3) = 3.1824; standard deviations 0.8165 of (2, 3, 4, 3) and 0.5 of (0.5, 0.5, 0.5, -0.5); sqrt(4) = 2
    assert "**+3.00 (+1.70 to +4.30)**" in table
    assert "+0.25 (-0.55 to +1.05)" in table
    assert "**+0.250 (+0.250 to +0.250)**" in table
    recipes = table[table.index("by fine-tuning") :]
    assert "rate x1" in recipes
    assert "rate x3" in recipes
    # t(0.975, 1) = 12.7062; (2, 4): standard deviation 1.4142 over sqrt(2)
    assert "+3.00 (-9.71 to +15.71)" in recipes
    merges = next(line for line in recipes.splitlines() if "mean score of the merges" in line)
    assert merges.count("50.00") == 2
