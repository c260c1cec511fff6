"""Results files, folders of them, collections and the published tables -> results of each model, one each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import BadInputError, UsageError
from eval.results.collection import COLLECTION, unpacked
from eval.results.conditions import BY_BENCHMARK, listed, run_differences
from eval.results.result import COLUMNS, PUBLISHED, EvalResult, Lineage, Score, read_json_file
from eval.results.rows import Models, Warn, assemble

if TYPE_CHECKING:
    from common.files.json_values import JsonObject

PAPER = Path(__file__).resolve().parent.parent.parent / "configs" / "paper_results.json"
"""The paper's tables: 4 source models, 40 merges."""


def load(paths: Sequence[Path], names: Mapping[str, str], warn: Warn, with_paper: bool = False) -> Models:
    """Read results and put them in the order of the tables. `names`: model path, id or last part -> label to print.

    `with_paper` adds the published results and their labels, and keeps to their benchmarks.
    """
    results, labels_from_files = read_all(paths, warn)
    if with_paper:
        published, labels = read_results(PAPER, warn)
        present = {score for result in results for score in result.scores}
        if present - set(COLUMNS):
            warn(f"Not among the paper's benchmarks, and left out: {', '.join(sorted(present - set(COLUMNS)))}.")
        results = published + [_of_the_paper(result) for result in results]
        labels_from_files = {
            **labels,
            **{Path(model).name: label for model, label in labels.items()},
            **labels_from_files,
        }
    return assemble(results, {**labels_from_files, **names}, warn)


def _of_the_paper(result: EvalResult) -> EvalResult:
    """A result without the benchmarks that the paper has not."""
    scores = {c: result.scores[c] for c in COLUMNS if c in result.scores}
    return replace(result, scores=scores, outcomes={c: o for c, o in result.outcomes.items() if c in scores})


@dataclass(frozen=True)
class Source:
    """One result, the file it was read from, when it was measured (seconds since 1970), and which argument it is of."""

    result: EvalResult
    file: Path
    time: float | None
    argument: int


def read_all(paths: Sequence[Path], warn: Warn) -> tuple[list[EvalResult], dict[str, str]]:
    """Read results files and folders: one result a model, and the labels that the files bring.

    Of one model the last argument's result counts, and within a folder the newest. Others add the benchmarks that it
    lacks where weights and evaluation conditions are the same; `warn` receives those that are left out.
    """
    groups: dict[str, list[Source]] = {}
    names: dict[str, str] = {}
    for argument, path in enumerate(paths):
        sources, labels = _read(path, argument)
        names |= labels
        if all(source.time is not None for source in sources):
            sources = sorted(sources, key=lambda source: source.time or 0.0)
        for source in sources:
            groups.setdefault(source.result.key, []).append(source)
    return [_newest(group, warn) for group in groups.values()], names


def read_results(path: Path, warn: Warn) -> tuple[list[EvalResult], Mapping[str, str]]:
    """Read one argument of `read_all`."""
    return read_all([path], warn)


def _newest(sources: Sequence[Source], warn: Warn) -> EvalResult:
    """Return a model's newest result, with the benchmarks of older ones that belong to the same row."""
    *older, newest = sources
    result = newest.result
    for source in reversed(older):
        lacking = [name for name in source.result.scores if name not in result.scores]
        both = [name for name in source.result.scores if name in result.scores]
        if both and source.argument != newest.argument:
            warn(f"{result.model} has several results for {', '.join(both)}; those of {newest.file} are used.")
        if not lacking:
            continue
        reason = _unlike(source, newest)
        if reason:
            warn(
                f"{source.file} is left out ({', '.join(lacking)} of {result.model}): its conditions are not those of "
                f"the newest result, {newest.file}: {reason}."
            )
            continue
        machines = [r.hardware.get("cpu") for r in (source.result, result)]
        if None not in machines and machines[0] != machines[1]:
            warn(
                f"{result.model}: {', '.join(lacking)} was measured on another machine ({machines[0]}) than the rest "
                f"({machines[1]})."
            )
        result = together(source.result, result)
    return result


def _unlike(older: Source, newest: Source) -> str:
    """Return why two results of a model are not of one row, or an empty text."""
    digests = older.result.digest, newest.result.digest
    if digests[0] != digests[1]:
        return "the weights differ" if None not in digests else "one of them has no digest of its weights"
    if digests[0] is None and older.argument == newest.argument:
        return "neither has a digest of its weights"
    return listed(run_differences(older.result, newest.result))


def together(older: EvalResult, newer: EvalResult) -> EvalResult:
    """One model's two results as one; the newer wins where both have a benchmark."""
    outcomes = {c: o for c, o in older.outcomes.items() if c not in newer.scores}
    settings = dict(newer.settings)
    for name in (*BY_BENCHMARK, "prompts_sha256", "data"):
        values = [r.settings.get(name) for r in (older, newer)]
        if any(isinstance(value, Mapping) for value in values):
            settings[name] = {k: v for value in values if isinstance(value, Mapping) for k, v in value.items()}
    limits = [r.settings["limit"] for r in (older, newer) if isinstance(r.settings.get("limit"), int)]
    if limits:
        settings["limit"] = max(limits)
    return replace(
        newer,
        scores={**older.scores, **newer.scores},
        outcomes={**outcomes, **newer.outcomes},
        settings=settings,
        harness={**older.harness, **newer.harness} | _joined_parts(older.harness, newer.harness),
    )


def _joined_parts(older: JsonObject, newer: JsonObject) -> JsonObject:
    """The parts of lm-eval's dictionary that have an entry for each task, joined."""
    names = ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
    return {n: {**older.get(n, {}), **newer.get(n, {})} for n in names if n in older or n in newer}


def _read(path: Path, argument: int) -> tuple[list[Source], Mapping[str, str]]:
    """Read one argument: its results, and the labels it brings itself. A folder is searched for results_*.json."""
    if path.is_dir():
        files = results_files(path)
        if not files:
            raise UsageError(f"{path} holds no results_*.json; evaluate_model.py writes them under its --save_path.")
        return [_source(_checked(EvalResult.load(file), file), file, argument) for file in files], {}
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give results files of evaluate_model.py or a folder of them.")
    data = read_json_file(path)
    results: list[EvalResult]
    labels: Mapping[str, str] = {}
    if isinstance(data, dict) and data.get("format") == "paper_results":
        results, labels = _paper(data, path)
    elif isinstance(data, dict) and data.get("format") == COLLECTION:
        results, labels = unpacked(data, str(path))
    else:
        results = [EvalResult.from_json(data, str(path))]
    return [_source(_checked(result, path), path, argument) for result in results], labels


def _source(result: EvalResult, file: Path, argument: int) -> Source:
    """A result with its time: that of the run, else the one in the file's name."""
    time = result.harness.get("date")
    if not isinstance(time, int | float):
        stamp = re.fullmatch(r"results_(\d{4}-\d\d-\d\d)T(\d\d)-(\d\d)-(\d\d(?:\.\d+)?)", file.stem)
        time = None
        if stamp:
            day, hours, minutes, seconds = stamp.groups()
            with suppress(ValueError):
                start = datetime.strptime(f"{day} {hours}:{minutes}", "%Y-%m-%d %H:%M")
                time = start.timestamp() + float(seconds)
    return Source(result, file, time, argument)


def results_files(folder: Path) -> list[Path]:
    """All results files below a folder, by their time."""
    return sorted(folder.rglob("results_*.json"), key=lambda f: (f.name, str(f)))


def _paper(data: JsonObject, path: Path) -> tuple[list[EvalResult], Mapping[str, str]]:
    """Read the published results: like ours without settings, and with the published cells, which nothing here uses."""
    try:
        results = []
        for row in data["rows"]:
            lineage = Lineage(
                row["method"], data["base_model"] if row["method"] else None, tuple(row["models"]), row["omega"]
            )
            scores = {name: Score(PUBLISHED, float(value)) for name, value in row["scores"].items()}
            results.append(EvalResult(row["model"], scores, lineage))
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
