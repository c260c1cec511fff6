"""Every file under configs/ is one that the programs accept."""

from __future__ import annotations

from pathlib import Path

import pytest

from merging.recipe import make_recipe, read_config
from scripts.experiments.schema import read_experiment

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "experiments").glob("*.yaml")), ids=lambda f: f.name)
def test_experiments_are_accepted(file: Path) -> None:
    """Each file is an experiment of scripts/run_experiment.py, or a merge recipe, with known keys only, and begins with
    a comment on where its numbers come from."""
    if file.stem == "as_shipped":
        assert make_recipe({}, read_config(file)).models
    else:
        experiment = read_experiment(file)
        assert experiment.pools or experiment.families
    assert file.read_text().startswith("#")


def test_as_shipped_is_what_the_original_would_have_used() -> None:
    """as_shipped: weight 1, density 1, the original's bf16 arithmetic."""
    recipe = make_recipe({}, read_config(ROOT / "configs" / "experiments" / "as_shipped.yaml"))
    assert recipe.parameters["weights"] == [1.0] * 3
    assert recipe.parameters["density"] == [1.0] * 3
    assert recipe.numerics == "reference"


def test_requirements_are_pinned() -> None:
    """Every requirement has an exact version, torch's being the one that the project is tested with."""
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = [x for x in (ROOT / name).read_text().splitlines() if x and not x.startswith(("#", "-r"))]
        assert lines
        assert all("==" in x for x in lines)
    assert "torch==2.13.0" in (ROOT / "requirements.txt").read_text()
