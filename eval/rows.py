"""Results files -> rows and families: which models there are, their names, and which AIM row relaxes which merge."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from console.errors import EvaluationError, UsageError, nearest
from eval.result import COLUMNS, EvalResult, Lineage, Score

Remark = Callable[[str], None]

COLLECTION = "results_collection"
"""The "format" of a file that holds several models' results, as scripts/collect_results.py writes it."""

METHOD_NAMES = {
    "dare_linear": "DARE Task Arithmetic",
    "dare_ties": "DARE Ties",
    "linear": "Linear",
    "task_arithmetic": "Task Arithmetic",
    "ties": "Ties Merging",
    "widen": "WIDEN",
}
"""Method -> its title in the paper's tables; a method that is not listed keeps its own name."""


@dataclass(frozen=True)
class Row:
    """One model with its scores in percent; `members` are the labels of the fine-tuned models it was merged from."""

    model: str
    label: str
    scores: Mapping[str, float]
    lineage: Lineage
    members: tuple[str, ...]

    @property
    def name(self) -> str:
        """The checkpoint's own name: the last part of its path or hub id."""
        return Path(self.model).name

    @property
    def merged(self) -> bool:
        return self.lineage.method is not None or self.lineage.omega is not None


@dataclass(frozen=True)
class Family:
    """One merge and its relaxations; `twin` is None where only AIM rows have results; `relaxed` by falling omega."""

    method: str
    label: str
    members: tuple[str, ...]
    twin: Row | None
    relaxed: tuple[Row, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.relaxed if self.twin is None else (self.twin, *self.relaxed)


@dataclass(frozen=True)
class Models:
    """All that was read: source models (the base first), families in table order, benchmarks in column order."""

    sources: tuple[Row, ...]
    families: tuple[Family, ...]
    columns: tuple[str, ...]
    limit: int | None = None
    """The largest --limit that any of the scores was measured under: these are not scores of whole benchmarks."""

    def find(self, label: str) -> Row | None:
        """The row that a population means by `label`: a source model's label, or the name of a merged checkpoint."""
        merged = [row for family in self.families for row in family.rows]
        known = {key: row for row in merged for key in (row.name, row.label)} | {row.label: row for row in self.sources}
        return known.get(label)


def load(paths: Sequence[Path], names: Mapping[str, str], remark: Remark) -> Models:
    """Read results files and folders. `names`: model path, id or last part -> label to print.

    A folder is searched for results_*.json, of which each model's newest (by file name, which holds the time) counts.
    Results of one model from several arguments are put together; the later argument wins where both have a benchmark.
    """
    results: dict[str, EvalResult] = {}
    names = dict(names)
    for path in paths:
        found, given = read_results(path, remark)
        names = {**given, **names}
        for result in found:
            key = _key(result.model)
            earlier = results.get(key)
            if earlier is not None:
                both = [name for name in result.scores if name in earlier.scores]
                if both:
                    remark(f"{result.model} has several results for {', '.join(both)}; those of {path} are used.")
                result = replace(result, scores={**earlier.scores, **result.scores})
            results[key] = result
    return assemble(list(results.values()), names, remark)


def assemble(results: Sequence[EvalResult], names: Mapping[str, str], remark: Remark) -> Models:
    """Name the models, pair each AIM row with its merge, and put all in the order of the tables."""
    label_of = _labeller(results, names)
    order = _source_order(results, label_of)
    rows = [
        Row(
            model=result.model,
            label=label_of(result.model),
            scores={name: score.value for name, score in result.scores.items()},
            lineage=result.lineage,
            members=tuple(sorted(map(label_of, result.lineage.models), key=order.index)),
        )
        for result in results
    ]
    bases = {label_of(row.lineage.base_model) for row in rows if row.lineage.base_model}
    rank = {label: at for at, label in enumerate(order)}
    sources = sorted((row for row in rows if not row.merged), key=lambda r: (r.label not in bases, rank[r.label]))
    families = sorted(
        _families([row for row in rows if row.merged], remark),
        key=lambda f: (f.method.lower(), len(f.members), [rank[m] for m in f.members], f.label),
    )
    present = dict.fromkeys(name for row in rows for name in row.scores)
    columns = tuple(c for c in COLUMNS if c in present) + tuple(c for c in present if c not in COLUMNS)
    limits = [limit for result in results if isinstance(limit := result.settings.get("limit"), int)]
    return Models(tuple(sources), tuple(families), columns, max(limits, default=None))


def _families(rows: Sequence[Row], remark: Remark) -> list[Family]:
    groups: dict[tuple[str, tuple[str, ...]], list[Row]] = {}
    for row in rows:
        method = row.lineage.method or "Unrecorded method"
        groups.setdefault((METHOD_NAMES.get(method, method), row.members), []).append(row)
    families = []
    for (method, members), group in groups.items():
        label = " + ".join(members)
        twins = [row for row in group if row.lineage.omega is None]
        relaxed: dict[str | None, list[Row]] = {twin.model: [] for twin in twins}
        for row in group:
            if row.lineage.omega is not None:
                twin = _twin(row, twins)
                if twin is None:
                    remark(f"{row.model}: no single merge without AIM to compare it with, so no percentages.")
                relaxed.setdefault(twin.model if twin else None, []).append(row)
        by_model = {twin.model: twin for twin in twins}
        for model, aim_rows in relaxed.items():
            own = by_model.get(model) if model is not None else None
            name = (own or aim_rows[0]).name
            shown = label or name
            if len(relaxed) > 1 and label:
                shown = f"{label} ({name})"
            by_omega = sorted(aim_rows, key=lambda r: (-(r.lineage.omega or 0.0), r.model))
            families.append(Family(method, shown, members, own, tuple(by_omega)))
    return families


def _twin(row: Row, twins: Sequence[Row]) -> Row | None:
    """The merge that `row` relaxes: the only one of its models and method, or the one its own name begins with."""
    if len(twins) > 1:
        twins = [twin for twin in twins if row.name.startswith(twin.name)]
        longest = max((len(twin.name) for twin in twins), default=0)
        twins = [twin for twin in twins if len(twin.name) == longest]
    return twins[0] if len(twins) == 1 else None


def _key(model: str) -> str:
    """One spelling of a path or hub id: `./out/x/` and `out/x` are the same model."""
    return str(Path(model))


def _labeller(results: Sequence[EvalResult], names: Mapping[str, str]) -> Callable[[str], str]:
    """Return model -> label: the name given, else the last part of the path, or the whole where two share that part."""
    names = {_key(model): label for model, label in names.items()}
    paths = {_key(result.model) for result in results}
    by_last: dict[str, set[str]] = {}
    for path in sorted(paths):
        by_last.setdefault(Path(path).name, set()).add(path)
    mentioned = [m for r in results for m in (r.model, r.lineage.base_model, *r.lineage.models) if m]
    spellings = {s for m in mentioned for s in (_key(m), Path(m).name)}
    unknown = sorted(set(names) - spellings)
    if unknown:
        raise UsageError(f"--names {unknown[0]}: no result or lineage has this model.{nearest(unknown[0], spellings)}")

    def label(model: str) -> str:
        key, last = _key(model), Path(model).name
        same = by_last.get(last, set())
        if key not in paths and len(same) == 1:  # merged from a folder that was since moved, or another spelling of it
            key = next(iter(same))
        for spelling in (_key(model), key, last):
            if spelling in names:
                return names[spelling]
        return last if len(same) <= 1 else key

    return label


def _source_order(results: Sequence[EvalResult], label_of: Callable[[str], str]) -> list[str]:
    """Labels in the order of the largest merge's list of models, then of smaller ones', then as they were read."""
    lists = sorted((result.lineage.models for result in results), key=len, reverse=True)
    every = [model for models in lists for model in models] + [result.model for result in results]
    return list(dict.fromkeys(map(label_of, every)))


def read_results(path: Path, remark: Remark) -> tuple[list[EvalResult], Mapping[str, str]]:
    """Read one argument: its results, and the labels it brings itself."""
    if path.is_dir():
        files = sorted(path.rglob("results_*.json"), key=lambda f: (f.name, str(f)))
        if not files:
            raise UsageError(f"{path} holds no results_*.json; evaluate_model.py writes them under its --save_path.")
        newest: dict[str, EvalResult] = {}
        for file in files:
            result = _checked(EvalResult.load(file), file)
            older = newest.get(_key(result.model))
            lost = [name for name in older.scores if name not in result.scores] if older else []
            if lost:
                remark(f"{file} is the newest result of {result.model} and lacks {', '.join(lost)} of an older one.")
            newest[_key(result.model)] = result
        return sorted(newest.values(), key=lambda r: _key(r.model)), {}
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give results files of evaluate_model.py or a folder of them.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvaluationError(f"{path} is not JSON, perhaps cut short ({error}).") from error
    if isinstance(data, Mapping) and data.get("format") == "paper_results":
        return _paper(data, path)
    if isinstance(data, Mapping) and data.get("format") == COLLECTION:
        entries = data.get("results")
        if not isinstance(entries, list):
            raise EvaluationError(f"{path} is a collection of results without a list of them.")
        return [_checked(EvalResult.from_json({"aim": entry}, str(path)), path) for entry in entries], data.get(
            "names", {}
        )
    return [_checked(EvalResult.from_json(data, str(path)), path)], {}


def _paper(data: Mapping[str, Any], path: Path) -> tuple[list[EvalResult], Mapping[str, str]]:
    """Read the published results: like ours without settings, and with the published cells, which nothing here uses."""
    try:
        results = []
        for row in data["rows"]:
            lineage = Lineage(
                row["method"], data["base_model"] if row["method"] else None, tuple(row["models"]), row["omega"]
            )
            scores = {name: Score("published", float(value)) for name, value in row["scores"].items()}
            results.append(_checked(EvalResult(row["model"], scores, lineage), path))
        return results, dict(data["names"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EvaluationError(f"{path} lacks a part of the published results' format ({error!r}).") from error


def _checked(result: EvalResult, path: Path) -> EvalResult:
    for name, score in result.scores.items():
        if not isinstance(score.value, int | float) or not math.isfinite(score.value):
            raise EvaluationError(f"{path}: {name} is {score.value!r}, not a finite score; evaluate the model again.")
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
