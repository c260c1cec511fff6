"""Results files, folders of them, collections and the published tables -> results of each model, one each."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from console.errors import BadInputError, UsageError
from eval.results.collection import COLLECTION, unpacked
from eval.results.result import COLUMNS, EvalResult, Lineage, Score
from eval.results.rows import PUBLISHED, Models, Remark, assemble, model_key

PAPER = Path(__file__).resolve().parent.parent.parent / "configs" / "paper_results.json"
"""The paper's tables: 4 source models, 40 merges."""


def load(paths: Sequence[Path], names: Mapping[str, str], remark: Remark, with_paper: bool = False) -> Models:
    """Read results and put them in the order of the tables. `names`: model path, id or last part -> label to print.

    `with_paper` adds the published results and their labels, and keeps to their benchmarks.
    """
    results, given = read_all(paths, remark)
    if with_paper:
        published, labels = read_results(PAPER, remark)
        present = {score for result in results for score in result.scores}
        if present - set(COLUMNS):
            remark(f"Not among the paper's benchmarks, and left out: {', '.join(sorted(present - set(COLUMNS)))}.")
        results = published + [_of_the_paper(result) for result in results]
        given = {**labels, **{Path(model).name: label for model, label in labels.items()}, **given}
    return assemble(results, {**given, **names}, remark)


def _of_the_paper(result: EvalResult) -> EvalResult:
    """A result without the benchmarks that the paper has not."""
    scores = {c: result.scores[c] for c in COLUMNS if c in result.scores}
    return replace(result, scores=scores, outcomes={c: o for c, o in result.outcomes.items() if c in scores})


def read_all(paths: Sequence[Path], remark: Remark) -> tuple[list[EvalResult], dict[str, str]]:
    """Read results files and folders: one result a model, and the labels that the files bring.

    Results of one model from several arguments are put together; the later argument wins where both have a benchmark.
    """
    results: dict[str, EvalResult] = {}
    names: dict[str, str] = {}
    for path in paths:
        found, given = read_results(path, remark)
        names |= given
        for result in found:
            key = model_key(result.model)
            earlier = results.get(key)
            if earlier is not None:
                both = [name for name in result.scores if name in earlier.scores]
                if both:
                    remark(f"{result.model} has several results for {', '.join(both)}; those of {path} are used.")
                result = together(earlier, result)
            results[key] = result
    return list(results.values()), names


def together(older: EvalResult, newer: EvalResult) -> EvalResult:
    """One model's two results as one; the newer wins where both have a benchmark."""
    outcomes = {c: o for c, o in older.outcomes.items() if c not in newer.scores}
    return replace(newer, scores={**older.scores, **newer.scores}, outcomes={**outcomes, **newer.outcomes})


def read_results(path: Path, remark: Remark) -> tuple[list[EvalResult], Mapping[str, str]]:
    """Read one argument: its results, and the labels it brings itself.

    A folder is searched for results_*.json. Of one model the newest counts (by file name, which holds the time), and
    older ones of the same weights for the benchmarks that it lacks.
    """
    if path.is_dir():
        files = results_files(path)
        if not files:
            raise UsageError(f"{path} holds no results_*.json; evaluate_model.py writes them under its --save_path.")
        newest: dict[str, EvalResult] = {}
        for file in files:
            result = _checked(EvalResult.load(file), file)
            older = newest.get(model_key(result.model))
            if older is not None:
                lost = [name for name in older.scores if name not in result.scores]
                same = older.digest is not None and older.digest == result.digest
                if lost and same:
                    result = together(older, result)
                elif lost:
                    remark(f"{file} is the newest of {result.model} and lacks {', '.join(lost)} of an older one.")
            newest[model_key(result.model)] = result
        return sorted(newest.values(), key=lambda r: model_key(r.model)), {}
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give results files of evaluate_model.py or a folder of them.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInputError(f"{path} is not JSON, perhaps cut short ({error}).") from error
    if isinstance(data, Mapping) and data.get("format") == "paper_results":
        return _paper(data, path)
    if isinstance(data, Mapping) and data.get("format") == COLLECTION:
        found, names = unpacked(data, str(path))
        return [_checked(result, path) for result in found], names
    return [_checked(EvalResult.from_json(data, str(path)), path)], {}


def results_files(folder: Path) -> list[Path]:
    """All results files below a folder, by their time."""
    return sorted(folder.rglob("results_*.json"), key=lambda f: (f.name, str(f)))


def _paper(data: Mapping[str, Any], path: Path) -> tuple[list[EvalResult], Mapping[str, str]]:
    """Read the published results: like ours without settings, and with the published cells, which nothing here uses."""
    try:
        results = []
        for row in data["rows"]:
            lineage = Lineage(
                row["method"], data["base_model"] if row["method"] else None, tuple(row["models"]), row["omega"]
            )
            scores = {name: Score(PUBLISHED, float(value)) for name, value in row["scores"].items()}
            results.append(_checked(EvalResult(row["model"], scores, lineage), path))
        return results, dict(data["names"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInputError(f"{path} lacks a part of the published results' format ({error!r}).") from error


def _checked(result: EvalResult, path: Path) -> EvalResult:
    for name, score in result.scores.items():
        if not isinstance(score.value, int | float) or not math.isfinite(score.value):
            raise BadInputError(f"{path}: {name} is {score.value!r}, not a finite score; evaluate the model again.")
    return result


def parse_names(values: Iterable[str]) -> dict[str, str]:
    """Read `path=Label` entries, several in one value parted by commas."""
    names: dict[str, str] = {}
    for entry in (part for value in values for part in value.split(",")):
        model, equals, label = entry.rpartition("=")
        if not (equals and model.strip() and label.strip()):
            raise UsageError(f"--names {entry!r}: expected path=Label.")
        names[model.strip()] = label.strip()
    return names
