"""Laws of naming: words of the field instead of fillers, docstrings that name or command, no renamed flags."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = [
    *sorted(ROOT.glob("*.py")),
    *(f for package in ("common", "merging", "aim", "eval", "scripts") for f in sorted((ROOT / package).rglob("*.py"))),
]
FILLERS = {"found", "given", "told", "said", "asked", "kept", "made", "known", "there", "here"}
"""Names that tell a reader nothing about the value."""
RENAMED_CLASSES = {
    "AdapterWork",
    "Ahead",
    "Company",
    "Either",
    "Ending",
    "Finisher",
    "Job",
    "Lane",
    "Section",
    "Setting",
    "Sink",
    "Use",
    "Work",
}
RENAMED_MODULES = {
    "asked",
    "company",
    "conveyor",
    "either",
    "fused",
    "mirror",
    "pins",
    "prepared",
    "scratch",
    "sidefiles",
    "stored",
    "watch",
}
RENAMED_FLAGS = ("--health", "--freeze", "--calibrate", "--regenerate", "--bandwidths")
CLAUSE = re.compile(r"(What|Whether|Where|How|Which|Whose|Whom|Who|When|Why|That)\b")


def names_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and name of every function, class, argument and assigned variable."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id


@pytest.mark.parametrize("file", CODE, ids=lambda f: str(f.relative_to(ROOT)))
def test_names_say_what_they_hold(file: Path) -> None:
    """No filler is the name of a variable, argument, function or class, and no old class or module name returns."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    wrong = [f"line {line}: {name}" for line, name in names_in(tree) if name.strip("_") in FILLERS | RENAMED_CLASSES]
    assert not wrong
    assert file.stem not in RENAMED_MODULES


@pytest.mark.parametrize("file", CODE, ids=lambda f: str(f.relative_to(ROOT)))
def test_docstrings_are_no_clauses(file: Path) -> None:
    """A docstring begins with a noun phrase or a command, not with a clause such as "What is ..."."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [n for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, documented)]
    assert not [text for node in nodes if CLAUSE.match(text := ast.get_docstring(node) or "")]


def test_renamed_flags_are_gone() -> None:
    """No code, configuration or document names a flag by an old spelling; the changelog may."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    for name in filter(None, tracked.split("\0")):
        file = ROOT / name
        if file.suffix in (".py", ".md", ".yaml", ".sh") and name not in ("CHANGELOG.md", "tests/test_names.py"):
            text = file.read_text(encoding="utf-8")
            assert not [flag for flag in RENAMED_FLAGS if re.search(rf"{flag}\b(?!_)", text)], name


def test_comments_name_no_milliseconds() -> None:
    """Measured times live in docs/performance.md, where they can be measured again."""
    for file in CODE:
        for line in file.read_text(encoding="utf-8").splitlines():
            assert not re.search(r"#.*\b\d+(\.\d+)? ?(ms|milliseconds|µs)\b", line), f"{file}: {line.strip()}"
