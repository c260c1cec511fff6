"""Laws of the folders: the order of packages and rooms, their size, and libraries that --help must not load."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections import defaultdict
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


MODULES = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in FILES}
MOST_FILES = 15
"""Of a folder; more than that is hard to search by eye."""


def imported_modules(file: Path) -> set[str]:
    """Modules of the project that a file imports, at any depth, those for type checking included."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {name if name in MODULES else node.module for name in full}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules & MODULES.keys()


def room_of(module: str) -> str:
    """A module of a package's top level is a room of its own; all others belong to the folder below the package."""
    return ".".join(module.split(".")[:2])


def assert_no_circle(graph: dict[str, set[str]]) -> None:
    """Fail with the circle where there is one."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_rooms_form_an_order() -> None:
    """No two rooms import each other, directly or by way of others."""
    graph: dict[str, set[str]] = defaultdict(set)
    for module, file in MODULES.items():
        room = room_of(module)
        graph[room] |= {room_of(name) for name in imported_modules(file)} - {room}
    assert_no_circle(graph)


def test_modules_form_an_order() -> None:
    """No two modules import each other, inside a room as well."""
    assert_no_circle({module: imported_modules(file) - {module} for module, file in MODULES.items()})


FOLDERS = sorted({f.parent for f in FILES} | {f.parent for f in (ROOT / "scripts").rglob("*.py")})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: str(f.relative_to(ROOT)))
def test_folders_are_small_and_described(folder: Path) -> None:
    """A folder of the packages holds at most 15 files and says what belongs there; methods/ has one file a paper."""
    if folder != ROOT / "merging" / "methods":
        assert len([f for f in folder.iterdir() if f.is_file()]) <= MOST_FILES
    if folder.relative_to(ROOT).parts[0] != "scripts":
        assert (ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "").endswith(".")


LM_EVAL = {f"data/{name}" for name in ("loading", "protocol", "fewshot")}
LM_EVAL |= {f"harness/{name}" for name in ("requests", "grading", "scores", "rescore")}


def test_lm_eval_is_met_in_few_places() -> None:
    """Tasks are read, configured, given examples, asked, graded and scored by lm-eval, and its models adapted: one file
    of eval/ for each (and the task functions that lm-eval itself loads)."""
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
        "harness/scores",
        "outcomes",
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
