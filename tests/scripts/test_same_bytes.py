"""Merges keep the bytes that they had in the kept list; the elementwise ones do not depend on the processor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.dev.same_bytes import differences, recipes

ROOT = Path(__file__).resolve().parents[2]
ELEMENTWISE = "^((ties|dare_linear|sce), bf16|more tokens, union|slices|passthrough, fp16)$"


@pytest.mark.skipif(sys.platform != "linux", reason="the script forks its interpreter")
def test_elementwise_merges_have_the_bytes_of_the_kept_list(tmp_path: Path) -> None:
    """A sample of the matrix, run as a user runs it."""
    command = [sys.executable, "scripts/dev/same_bytes.py", "--folder", str(tmp_path / "same_bytes")]
    command += ["--only", ELEMENTWISE, "--compare", "results/same_bytes.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip().endswith("All 6 recipes have the same bytes."), done.stdout + done.stderr
    assert done.returncode == 0


def test_kept_list_has_each_recipe() -> None:
    """The list is of the whole matrix, which has at least 60 recipes of different names."""
    names = [recipe.name for recipe in recipes()]
    assert len(set(names)) == len(names) >= 60
    assert set(json.loads((ROOT / "results" / "same_bytes.json").read_text())) == set(names)


def test_differences_name_recipe_and_tensor() -> None:
    """A changed, a missing and a new tensor are a line each, and so is a recipe of one side."""
    before = {"a": {"x": "1", "y": "2"}, "b": {}}
    after = {"a": {"x": "1", "y": "3", "z": "4"}, "c": {}}
    assert sorted(differences(before, after)) == [
        "a: y: 2 before, 3 after",
        "a: z: missing before, 4 after",
        "b: only before",
        "c: only after",
    ]
