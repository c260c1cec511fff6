"""One list of checks for commits, contributors and .ci/run."""

from __future__ import annotations

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def test_the_same_checks_everywhere() -> None:
    """.pre-commit-config.yaml and .ci/run run the commands of CONTRIBUTING.md, on the whole tree."""
    lines = (ROOT / "CONTRIBUTING.md").read_text().splitlines()
    [checks] = [line for line in lines if line.startswith(".venv/bin/ruff check")]
    commands = checks.split(" && ")
    assert len(commands) == 3
    [repository] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in repository["hooks"]] == commands
    assert all(hook["pass_filenames"] is False for hook in repository["hooks"])
    assert set(commands) <= set((ROOT / ".ci" / "run").read_text().splitlines())
