"""The house's walls: who may import whom, and what no module may import at the top."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "common": set(),
    "merging": {"common"},
    "aim": {"common", "merging"},
    "eval": {"common"},
}
PACKAGES = set(ALLOWED)
FILES = [f for package in ALLOWED for f in sorted((ROOT / package).rglob("*.py"))]


def imported(tree: ast.AST) -> set[str]:
    """First parts of every absolute import, at any depth."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_edges(file: Path) -> None:
    """A package imports only the packages that the house allows it, and nobody imports scripts or entry points."""
    package = file.relative_to(ROOT).parts[0]
    names = imported(ast.parse(file.read_text()))
    assert names & PACKAGES <= ALLOWED[package] | {package}
    assert not names & {"merge", "performAIM", "evaluate_model", "scripts", "tests"}


LM_EVAL = {"data/loading", "data/protocol", "harness/requests", "harness/grading", "harness/rescore"}


def test_lm_eval_is_met_in_few_places() -> None:
    """Tasks are read, configured, asked and graded by lm-eval, and its models adapted: one file of eval/ for each (and
    the task functions that lm-eval itself loads)."""
    users = {f.relative_to(ROOT).as_posix() for f in FILES if "lm_eval" in imported(ast.parse(f.read_text()))}
    allowed = {f"eval/{name}.py" for name in LM_EVAL}
    assert users <= allowed | {u for u in users if u.startswith(("eval/tasks/", "eval/harness/backends/"))}


def test_answers_are_graded_without_torch() -> None:
    """Reading, grading and rescoring import no torch or transformers at any depth; models live in the backends."""
    names = (
        "data/loading",
        "data/protocol",
        "harness/grading",
        "harness/rescore",
        "results/scores",
        "results/outcomes",
        "results/result",
        "harness/journal",
        "results/store",
    )
    for name in names:
        tree = ast.parse((ROOT / "eval" / f"{name}.py").read_text())
        assert not imported(tree) & {"torch", "transformers", "vllm"}, name


@pytest.mark.parametrize("script", ["merge.py", "performAIM.py", "evaluate_model.py", "scripts/importance.py"])
def test_help_needs_no_heavy_library(script: str) -> None:
    """--help answers without importing torch, transformers, lm_eval, datasets or matplotlib."""
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['{script}', '--help']\n"
        "try:\n"
        f"    runpy.run_path('{script}', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'datasets', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
