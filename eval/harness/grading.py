"""Scores from answers, by lm-eval's filters, metrics and aggregation. No model, no torch."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from eval.benchmarks import Benchmark
from eval.data.protocol import Loaded
from eval.seeding import seeded
from eval.settings import Settings

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

    from common.files.json_values import JsonObject
    from eval.request_types import Answer


class Recorded:
    """Stands where lm-eval expects a model: gives each instance the answers it was given before."""

    rank = 0
    world_size = 1

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        self._answers = {id(i): list(i.resps) for task in tasks.values() for i in task.instances}
        for task in tasks.values():
            for instance in task.instances:
                instance.resps = []
        self._given: dict[int, int] = defaultdict(int)

    def _next(self, requests: Sequence[Instance]) -> list[Answer]:
        answers = []
        for request in requests:
            answers.append(self._answers[id(request)][self._given[id(request)]])
            self._given[id(request)] += 1
        return answers

    generate_until = loglikelihood = loglikelihood_rolling = _next


def grade(
    loaded: Mapping[Benchmark, Loaded], plan: Mapping[str, Sequence[int]] | None, settings: Settings
) -> JsonObject:
    """lm-eval's dictionary of results with samples, for tasks whose instances carry their answers."""
    from lm_eval import evaluator

    tasks: dict[str, Task] = {}
    groups: dict[str, Group] = {}
    for part in loaded.values():
        tasks |= part.tasks
        groups |= part.groups
    with _prompts_kept(tasks), seeded(settings.seed):
        raw = evaluator.evaluate(
            lm=Recorded(tasks),
            task_dict={"tasks": tasks, "groups": groups},
            samples={name: list(items) for name, items in plan.items()} if plan else None,
            bootstrap_iters=1000,
            confirm_run_unsafe_code=settings.allow_code_execution,
        )
    return dict(raw)


def doc_hash(doc: JsonObject) -> str:
    """The digest of an item that lm-eval writes into its samples."""
    from lm_eval.utils import handle_non_serializable, hash_string

    text = json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
    return str(hash_string(text))


@contextmanager
def _prompts_kept(tasks: Mapping[str, Task]) -> Iterator[None]:
    """While open, building a task's requests leaves those it has."""
    for task in tasks.values():
        task.build_all_requests = lambda **_: None
    try:
        yield
    finally:
        for task in tasks.values():
            del task.build_all_requests
