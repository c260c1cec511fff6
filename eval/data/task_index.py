"""Index of task names and the folders that define them: this project's, lm-eval's, or the user's. Parses no YAML.

lm-eval's own index parses every task file it ships, 10 to 20 s; looking for the names with a regular expression first
lets it index one folder.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from common.errors import EvaluationError, UsageError, nearest
from eval.benchmarks import LM_EVAL, MATHS, MMLU_PRO, Benchmark

OURS = Path(__file__).resolve().parents[1] / "tasks"
_NAME = re.compile(rb"""^["']?(?:task|group|tag)["']?[ \t]*:[ \t]*["']?([\w.\-]+)""", re.MULTILINE)
_TAG_LIST = re.compile(rb"""^["']?tag["']?[ \t]*:[ \t]*\n((?:[ \t]*-[ \t]*\S+[ \t]*\n)+)""", re.MULTILINE)


def stock_folder() -> Path:
    """Return the folder of the installed lm-eval's task files. Raises EvaluationError without lm-eval."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise EvaluationError("The package lm-eval is not installed; `pip install -r requirements.txt` brings it.")
    return Path(next(iter(spec.submodule_search_locations))) / "tasks"


@cache
def stock_names() -> Mapping[str, Sequence[Path]]:
    """Every task, group and tag that lm-eval's files name, with the folders of the files that do."""
    folders_by_name: dict[str, list[Path]] = {}
    for file in sorted(stock_folder().rglob("*.yaml")):
        text = file.read_bytes()
        tags = b"".join(_TAG_LIST.findall(text)).replace(b"-", b" ", 1).split()
        for name in {*_NAME.findall(text), *(tag.strip(b"\"'") for tag in tags if tag != b"-")}:
            folders = folders_by_name.setdefault(name.decode(), [])
            if file.parent not in folders:
                folders.append(file.parent)
    return folders_by_name


def folders_for(benchmarks: Sequence[Benchmark], known_tasks: Sequence[str] = ()) -> list[Path]:
    """The folders whose task files define `benchmarks`, without those in `known` (the user's own).

    Raises UsageError for a name that no task file has, suggesting the nearest.
    """
    folders: list[Path] = []
    for benchmark in benchmarks:
        if benchmark.task in known_tasks:
            continue
        if benchmark.paper_prompt:
            candidates: Sequence[Path] = [OURS / benchmark.name]
        elif benchmark.folders:
            candidates = [stock_folder() / folder for folder in benchmark.folders]
        else:
            candidates = _folders_of(benchmark.task, known_tasks)
        folders += [folder for folder in candidates if folder not in folders]
    return folders


def _near(name: str) -> Path | None:
    """Return the folder of the file that defines a task or group, if its name begins with the folder's (mmlu_virology).

    A tag may be spread over folders and is not looked for.
    """
    quoted = rb"""["']?""" + re.escape(name.encode()) + rb"""["']?"""
    defines = re.compile(rb"""^["']?(?:task|group)["']?[ \t]*:[ \t]*""" + quoted + rb"[ \t\r]*$", re.MULTILINE)
    for folder in sorted(stock_folder().iterdir(), key=lambda f: -len(f.name)):
        if name.startswith(folder.name) and folder.is_dir():
            for file in sorted(folder.rglob("*.yaml")):
                if defines.search(file.read_bytes()):
                    return file.parent
    return None


def _folders_of(name: str, known_tasks: Sequence[str]) -> Sequence[Path]:
    near = _near(name)
    if near is not None:
        return [near]
    names = stock_names()
    if name in names:
        return names[name]
    if name in MATHS["paper"]:
        raise UsageError(
            f"There is no benchmark {name!r} among lm-eval's tasks; ask for it by --math_benchmarks {name}."
        )
    candidates = {*LM_EVAL, MMLU_PRO.name, *known_tasks, *names}
    raise UsageError(f"There is no benchmark {name!r}.{nearest(name, candidates)}")
