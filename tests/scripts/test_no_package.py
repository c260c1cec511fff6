"""Refusal of `pip install .`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("editable", [[], ["--editable"]], ids=["wheel", "editable"])
def test_pip_install_says_to_clone(editable: list[str], tmp_path: Path) -> None:
    """pip ends with one sentence that says to clone, before it builds, fetches or installs anything."""
    before = set(os.listdir(ROOT))
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", tmp_path, *editable, ROOT],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 1
    assert "error: this project is not installed as a package; clone it, run `pip install" in output
    assert "Traceback" not in output
    assert set(os.listdir(ROOT)) == before
    assert not list(tmp_path.iterdir())
