"""Limits of the types and files that a merge runs through, and their page docs/architecture.md.

How types are counted. The trace of tests/helpers/call_trace.py covers `merge.py` from its flags to the published result
of one TIES merge of two models: one process, no AIM, compiled kernels, no load check (which has no types). A class of
common, merging or aim counts where a method of it runs, generated or inherited ones included, on an instance or on the
class; a base class counts where it defines that method. Three kinds do not count:

- exceptions: they carry a message out of the merge and nothing along it;
- the classes of NOT_COUNTED, each with its reason;
- types without code: type aliases, TypedDicts, protocols and the layouts of C structures never run.

Everything else counts, private classes too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from merging.ops.kernels.kernels import kernels

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
MOST_TYPES, MOST_FILES = 61, 42
"""Types that a merge uses, and files that define them; lower them with each type that goes."""
NOT_COUNTED = {"common.files.locks.Lock": "a lock on the work folder, held around the merge; no step reads it"}
MOST_LINES = 60
"""Of each program in the root folder, which parses flags and calls the packages."""
PROGRAMS = ("merge.py", "performAIM.py", "evaluate_model.py")

needs_kernels = pytest.mark.skipif(kernels() is None, reason="without a C compiler, other executors do step 9")


@pytest.fixture(scope="module")
def trace(
    family: Mapping[str, Path], run_script: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The record of one merge: {"classes": {name: file}, "files": [...]}."""
    folder = tmp_path_factory.mktemp("trace")
    models = ["--base_model", family["base"], "--models_to_merge", f"{family['a']},{family['b']}"]
    done = run_script(
        "-m", "tests.helpers.call_trace", folder / "trace.json",
        "merge.py", "--method", "ties", *models, "--save_path", folder / "out", "--device", "cpu", "--no-load_check",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (folder / "out" / "model.safetensors").is_file()
    record: dict[str, Any] = json.loads((folder / "trace.json").read_text())
    return record


@needs_kernels
def test_a_merge_needs_few_types(trace: Mapping[str, Any]) -> None:
    """The types between the flags and the bytes, and the files that define them, stay within their limits."""
    classes = {name: file for name, file in trace["classes"].items() if name not in NOT_COUNTED}
    assert len(classes) <= MOST_TYPES, sorted(classes)
    assert len(set(classes.values())) <= MOST_FILES, sorted(set(classes.values()))
    assert NOT_COUNTED.keys() <= trace["classes"].keys()  # no reason outlives its class


@needs_kernels
def test_the_page_names_every_type(trace: Mapping[str, Any]) -> None:
    """docs/architecture.md names every public type that a merge uses, in the numbered steps."""
    named = set(re.findall(r"`(\w+)`", steps()))
    used = {name.rpartition(".")[2] for name in trace["classes"] if name not in NOT_COUNTED}
    assert {name for name in used if not name.startswith("_")} - named == set()


@needs_kernels
def test_the_steps_are_those_of_a_merge(trace: Mapping[str, Any]) -> None:
    """A merge enters every Python file that the numbered steps of docs/architecture.md name, and uses every type."""
    assert set(re.findall(r"`([\w/]+\.py)`", steps())) - set(trace["files"]) == set()
    types = set(re.findall(r"`([A-Z]\w+)`", steps()))
    assert types - {name.rpartition(".")[2] for name in trace["classes"]} == set()


def steps() -> str:
    """Return the numbered steps of the page."""
    return "\n".join(re.findall(r"^\d+\. .*(?:\n {3,}.*)*", PAGE.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_only_call_the_packages(program: str) -> None:
    """A program of the root folder has few lines: its flags and its work are in the packages."""
    assert len((ROOT / program).read_text(encoding="utf-8").splitlines()) <= MOST_LINES
