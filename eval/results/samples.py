"""Prompts and answers per item, from the samples files next to results files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import BadInputError
from common.files.bounded_reading import UnreadableError, parse_json, read_lines
from common.files.json_types import Fields, check_shape
from eval.results.reader import results_files
from eval.results.result import EvalResult
from eval.results.rows import Warn, model_key
from eval.tasks.answers import extract
from eval.tasks.strict import final_answer

if TYPE_CHECKING:
    from common.files.json_values import JsonObject

SAMPLE = Fields({}, {"task": str, "doc_id": int, "doc_hash": str, "arguments": list, "resps": list})
"""Types of the keys of a sample that are used here."""
Item = tuple[str, int]
"""(task, number of the item in it)."""


@dataclass(frozen=True)
class Answer:
    """One model's answer to one item: the prompt as it was given, the gold answer or tests, and what the model made.

    `texts`: a generation per sample; `choices`: for multiple choice, each continuation and its log-likelihood;
    `extracted`: what the grader of maths answers took from the first text.
    """

    prompt: str
    gold: str
    texts: tuple[str, ...] = ()
    choices: tuple[tuple[str, float], ...] = ()
    extracted: str | None = None


def sample_files(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """The samples files below folders, or beside results files, by model (its key), the oldest first."""
    files: dict[str, list[Path]] = {}
    for path in paths:
        for file in results_files(path) if path.is_dir() else [path]:
            beside = sorted(file.parent.glob(f"samples_*_{file.stem.removeprefix('results_')}.jsonl"))
            if file.name.startswith("results_") and beside:
                files.setdefault(model_key(EvalResult.load(file).model), []).extend(beside)
    return files


def answers_of(result: EvalResult, files: Sequence[Path], warn: Warn) -> dict[str, dict[Item, Answer]]:
    """One model's answers by column and item, as far as its result has outcomes of them; newer files win.

    Raises BadInputError for a file that is cut short; `warn` receives columns without answers.
    """
    docs = {
        (task, item): (column, doc)
        for column, outcomes in result.outcomes.items()
        for task, item, doc in outcomes.keys()  # noqa: SIM118
    }
    maths = result.settings.get("preset") == "lm-eval"
    answers: dict[str, dict[Item, Answer]] = {}
    for file in files:
        for sample in _lines(file):
            key = str(sample.get("task")), int(sample.get("doc_id", -1))
            column, doc = docs.get(key, (None, None))
            if column is not None and str(sample.get("doc_hash", doc))[:8] == doc:
                answers.setdefault(column, {})[key] = _answer(sample, column, maths)
    without = [column for column in result.outcomes if column not in answers]
    if without:
        warn(f"{result.model}: no samples of {', '.join(without)} beside its results, so their answers are not shown.")
    return answers


def _lines(file: Path) -> Iterator[JsonObject]:
    try:
        for number, line in enumerate(read_lines(file), 1):
            sample = parse_json(line, f"{file}, line {number}", allow_surrogates=True)
            check_shape(sample, SAMPLE, f"{file}, line {number}")
            yield sample
    except OSError as error:
        raise BadInputError(f"{file} cannot be read ({error.strerror}).") from error
    except UnreadableError as error:
        raise BadInputError(str(error)) from error


def _answer(sample: JsonObject, column: str, strict: bool) -> Answer:
    arguments = [part for part in sample.get("arguments") or [] if isinstance(part, list) and part]
    prompt = str(arguments[0][0]) if arguments else ""
    responses = [response[0] if len(response) == 1 else response for response in sample.get("resps") or []]
    gold = str(sample.get("target", ""))
    if arguments and all(len(part) > 1 and isinstance(part[1], str) for part in arguments):
        likely = [float(r[0]) if isinstance(r, list) else float("nan") for r in responses]
        choices = tuple((str(part[1]).strip(), value) for part, value in zip(arguments, likely, strict=False))
        at = int(gold) if gold.isdecimal() else -1
        return Answer(prompt, choices[at][0] if 0 <= at < len(choices) else gold, choices=choices)
    texts = tuple(str(text) for r in responses for text in (r if isinstance(r, list) else [r]))
    extracted = None
    if column in ("MATH", "GSM8K") and texts:
        extracted = final_answer(texts[0]) if strict else extract(texts[0])
    return Answer(prompt, gold, texts, extracted=extracted)
