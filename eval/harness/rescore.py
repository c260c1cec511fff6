"""Grade the answers of an earlier result again: from its samples, without a model and without torch."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import BadInputError, UsageError
from common.files.bounded_reading import UnreadableError, parse_json, read_lines
from common.files.json_types import Between, Fields, ListOf, check_shape
from common.logging import logger
from eval.harness.evaluation import Identity, Samples, assembled
from eval.log_filters import environment, muted
from eval.results.answer_facts import FACTS
from eval.results.result import EvalResult
from eval.results.store import model_folder, samples_file
from eval.settings import Settings

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from common.files.json_values import JsonObject

SAMPLE = Fields({"task": str, "doc_id": Between(0), "doc_hash": str, "filter": str, "arguments": ListOf(list),
                 "resps": ListOf(list)})  # fmt: skip
"""Types of the keys of a sample that are graded again."""


def source_of(result_path: Path, model: str | None, save_path: Path) -> Path:
    """The results file to grade again: the one given, else the newest of `model` under `save_path`."""
    if result_path != Path():
        if not result_path.is_file():
            raise UsageError(f"--rescore {result_path} is not a file; give a results_*.json of evaluate_model.py.")
        return result_path
    if not model:
        raise UsageError("--rescore needs a results file, or --model to find its newest one under --save_path.")
    results = sorted(model_folder(save_path, model).glob("results_*.json"))
    if not results:
        raise UsageError(f"--rescore: there are no results of {model} under {save_path}.")
    return results[-1]


def rescore(
    source: Path,
    data_dir: Path | None = None,
    include_path: Path | None = None,
    allow_code_execution: bool = False,
    sandbox: str = "auto",
    quiet: bool = False,
    debug: bool = False,
) -> tuple[EvalResult, Samples]:
    """Return the result and samples of `source` with today's grading; benchmark data are read as for an evaluation.

    Raises BadInputError for a results file without its samples, and for data of another version.
    """
    started = time.time()
    old = EvalResult.load(source)
    changes: dict[str, Any] = {"allow_code_execution": allow_code_execution, "quiet": quiet, "debug": debug}
    changes["sandbox"] = sandbox
    if data_dir is not None:
        changes |= {"data_dir": data_dir, "offline": True}
    if include_path is not None:
        changes["include_path"] = include_path
    settings = replace(Settings.from_recorded(old.settings, str(source)), **changes)
    if settings.data_dir is not None and not settings.data_dir.is_dir():
        raise UsageError(f"{settings.data_dir}, where the data of {source} were, is gone: give --data_dir.")
    settings.check()
    benchmarks = settings.chosen()
    lines = {b.task: _samples(samples_file(source, b.task)) for b in benchmarks}
    with ExitStack() as stack:
        stack.enter_context(environment(settings, local=True))
        stack.enter_context(muted(settings))
        from eval.data.loading import load
        from eval.data.protocol import configure
        from eval.harness.grading import grade

        loaded = load(tuple(benchmarks), settings)
        configure(loaded, settings, int(old.settings["max_length"]))
        plan: dict[str, list[int]] = {}
        for b in benchmarks:
            for name, task in loaded[b].tasks.items():
                plan[name] = _restore(task, name, [s for s in lines[b.task] if s["task"] == name], source)
        raw = grade(loaded, plan, settings)
        _keep_facts(raw["samples"], [line for group in lines.values() for line in group])
    logger.info(f"{source}: {sum(map(len, plan.values()))} items graded again.")
    recorded = {**old.settings, **settings.recorded(), "rescored_from": source.name}
    who = Identity(old.digest or "unknown", old.commit, tuple(old.hardware.get("gpus", ())))
    seconds = {**old.seconds, "grading": round(time.time() - started, 1)}
    result, samples = assembled(old.model, benchmarks, loaded, raw, recorded, who, seconds, started)
    return result, samples


def _keep_facts(samples: Samples, lines: list[JsonObject]) -> None:
    """Copy what is known of the answers besides their texts from the old samples to the new ones."""
    facts = {(line["task"], line["doc_id"]): {n: line[n] for n in FACTS if n in line} for line in lines}
    for task, items in samples.items():
        for item in items:
            item.update(facts.get((task, item["doc_id"]), {}))


def _samples(file: Path) -> list[JsonObject]:
    samples = []
    try:
        for number, line in enumerate(read_lines(file), 1):
            sample = parse_json(line, f"{file}, line {number}", allow_surrogates=True)
            check_shape(sample, SAMPLE, f"{file}, line {number}")
            samples.append(sample)
    except OSError as error:
        raise BadInputError(f"{file} belongs to the results file and cannot be read ({error.strerror}).") from error
    except UnreadableError as error:
        raise BadInputError(str(error)) from error
    return samples


def _restore(task: Task, name: str, lines: list[JsonObject], source: Path) -> list[int]:
    """Give a task the instances and answers of its samples; return the numbers of its items.

    Raises BadInputError where the benchmark's items are not those that were answered.
    """
    from lm_eval.api.instance import Instance

    from eval.harness.grading import doc_hash

    if not lines:
        raise BadInputError(f"The samples of {source} have no items of {name}.")
    lines = [line for line in lines if line["filter"] == lines[0]["filter"]]
    lines.sort(key=lambda line: line["doc_id"])
    docs = task.eval_docs
    kind = "loglikelihood" if task.OUTPUT_TYPE == "multiple_choice" else task.OUTPUT_TYPE
    instances = []
    for position, line in enumerate(lines):
        number = line["doc_id"]
        doc = docs[number] if number < len(docs) else None
        if doc is None or doc_hash(doc) != line["doc_hash"]:
            raise BadInputError(
                f"Item {number} of {name} is not the one that {source} has an answer to: the benchmark's data are of "
                "another version; give that version with --data_dir."
            )
        for index, (arguments, answers) in enumerate(zip(line["arguments"], line["resps"], strict=False)):
            metadata = (name, position, len(answers))
            responses = [tuple(a) if isinstance(a, list) else a for a in answers]
            instances.append(Instance(kind, doc, tuple(arguments), index, metadata, responses))
    task._instances = instances
    return [line["doc_id"] for line in lines]
