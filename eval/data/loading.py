"""Read lm-eval's tasks and their data: only the task files asked for; everything missing is named at once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import BadInputError, EvaluationError, ProjectError
from eval.benchmarks import Benchmark
from eval.data.data_sources import check_nltk, offer_nltk, redirected
from eval.data.dataset_revisions import facts, pinned
from eval.data.protocol import Loaded, Shipped, sandboxed_code_eval
from eval.data.task_index import folders_for, stock_folder
from eval.request_types import digest
from eval.seeding import seeded
from eval.settings import Settings

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

    from common.files.json_values import JsonObject

TEMPLATES = 1024
"""Compiled prompt templates that are kept."""


def load(benchmarks: tuple[Benchmark, ...], settings: Settings) -> Mapping[Benchmark, Loaded]:
    """The tasks of all benchmarks: kept for the next model, unless the user's own files, which may change, are read.

    Raises UsageError for an unknown name, BadInputError for data that is not there, naming all of it.
    """
    compile_templates_once()
    offer_nltk(settings.data_dir)
    if any(b.name == "ifeval" for b in benchmarks):
        check_nltk(settings.offline)
    read = _read if settings.include_path else _cached_read
    return read(benchmarks, settings.data_dir, settings.offline, settings.include_path, settings.seed)


@cache
def compile_templates_once() -> None:
    """Let lm-eval compile each prompt template once, not for every item anew, which is most of building requests."""
    from lm_eval.utils import env

    env.from_string = lru_cache(TEMPLATES)(env.from_string)


def _read(
    benchmarks: tuple[Benchmark, ...], data_dir: Path | None, offline: bool, include_path: Path | None, seed: int
) -> Mapping[Benchmark, Loaded]:
    manager, folders = _indexed(benchmarks, include_path)
    code = any(b"code_eval" in file.read_bytes() for folder in folders for file in folder.rglob("*.py"))
    loaded: dict[Benchmark, Loaded] = {}
    missing: list[str] = []
    with redirected(data_dir, offline), sandboxed_code_eval(code), seeded(seed):
        for b in benchmarks:
            try:
                parts = manager.load([b.task])
            except BadInputError as error:
                missing.append(f"{b.name}: {error}")
                continue
            except ProjectError:
                raise
            except Exception as error:  # task files run code of their own
                kind = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no details'])[0]}"
                raise EvaluationError(f"The benchmark {b.name!r} could not be read: {kind}") from error
            shipped = {name: Shipped.of(task) for name, task in parts["tasks"].items()}
            loaded[b] = Loaded(parts["tasks"], parts.get("groups", {}), shipped, _facts(parts["tasks"]))
    if missing:
        raise BadInputError(missing[0].partition(": ")[2] if len(missing) == 1 else " ".join(missing))
    return loaded


def _facts(tasks: Mapping[str, Task]) -> JsonObject:
    """Number, digest and standing of a benchmark's items, where its data set has pins."""
    splits = []
    for task in tasks.values():
        name, split = task.get_config("dataset_path"), task.get_config("test_split")
        if name not in pinned() or not split or split not in getattr(task, "dataset", {}):
            return {}
        splits.append(facts(name, task.get_config("dataset_name"), split, task.dataset[split]))
    standing = {published for _, _, published in splits}
    return {
        "items": sum(count for count, _, _ in splits),
        "sha256": digest([one for _, one, _ in splits]),
        "published": False if False in standing else None if None in standing else True,
    }


_cached_read = lru_cache(maxsize=4)(_read)


def _indexed(benchmarks: tuple[Benchmark, ...], include_path: Path | None) -> tuple[TaskManager, list[Path]]:
    """lm-eval's index of the folders needed, and they; of everything only where a group's parts are not beside it."""
    from lm_eval.tasks import TaskManager

    include_paths = [str(include_path)] if include_path else []
    known_tasks = TaskManager(include_path=include_paths, include_defaults=False).all_tasks if include_paths else ()
    task_folders = folders_for(benchmarks, known_tasks)
    folders = [str(f) for f in task_folders] + include_paths
    manager = TaskManager(include_path=folders, include_defaults=False)
    if any(_members(b.task, manager) is None for b in benchmarks):
        manager = TaskManager(include_path=folders, include_defaults=True)
        task_folders.append(stock_folder())
    for b in benchmarks:
        if _members(b.task, manager) is None:
            raise EvaluationError(f"lm-eval could not read the task files of benchmark {b.name!r}.")
    return manager, task_folders + [Path(f) for f in include_paths]


def _members(name: str, manager: TaskManager) -> list[str] | None:
    """The leaf tasks behind a name; None where the index lacks one of them."""
    entry = manager.task_index.get(name)
    if entry is None:
        return None
    if entry.kind.name not in ("GROUP", "TAG"):
        return [name]
    children = entry.tags if entry.kind.name == "TAG" else entry.cfg.get("task") or ()
    if isinstance(children, str) or any(not isinstance(child, str) for child in children):
        return [name]  # tasks written out inside the group's file
    parts = [_members(child, manager) for child in sorted(children)]
    return None if any(p is None for p in parts) else [leaf for p in parts if p for leaf in p]
