"""Data of the report page: a small part read at once, and packed parts read when they are shown."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.figures import marker_polygon, method_looks
from eval.outcomes import IFEVAL_MEAN, Outcomes
from eval.report.fronts import Variant, pareto_front, variants
from eval.report.plots import curved
from eval.report.report import Cell, Report
from eval.results.rows import MergeGroup, Models, Row
from eval.results.samples import Answer, Item
from eval.stats.gains import HV

if TYPE_CHECKING:
    from common.files.json_values import JsonObject

Answers = Mapping[str, Mapping[str, Mapping[Item, Answer]]]
"""Row (its key) -> column -> item -> answer."""


@dataclass
class PageData:
    """`core` is JSON; `chunks` are gzipped JSON in base64, by name."""

    core: JsonObject
    chunks: dict[str, str] = field(default_factory=dict)


def page_data(models: Models, report: Report, answers: Answers, most: int | None = None) -> PageData:
    """Gather everything. `most`: how many items of a benchmark are shown at most (None: all)."""
    rows = [row for row in models.rows if not (row.published and not row.result.scores)]
    number = {row.key: i for i, row in enumerate(rows)}
    sets = variants(models)
    several = len(sets) > 1
    data = PageData(
        {
            "columns": list(models.columns),
            "units": {name: models.unit(name) for name in (*models.columns, HV)},
            "methods": _methods(models),
            "variants": [{"label": v.label, "color": v.color if several else None} for v in sets],
            "models": [_model(row, models, number, sets) for row in rows],
            "pairs": _pairs(models),
            "curves": _curves(models, report),
        }
    )
    data.core["benchmarks"] = [_benchmark(data, column, rows, number, answers, most) for column in models.columns]
    return data


def _methods(models: Models) -> dict[str, list[list[float]] | None]:
    """By method: the corners of its marker, the same as in the figures; None for a disc."""
    looks = method_looks(family.method for family in models.families)
    corners = {method: marker_polygon(marker) for method, (marker, _) in looks.items()}
    return {m: [[round(x, 3), round(y, 3)] for x, y in c] if c else None for m, c in corners.items()}


def _model(row: Row, models: Models, number: Mapping[str, int], sets: Sequence[Variant]) -> JsonObject:
    family = next((f for f in models.families if any(r.key == row.key for r in f.rows)), None)
    unrelaxed = family.unrelaxed if family and family.unrelaxed and family.unrelaxed.key != row.key else None
    kind = "base" if family is None and not any(row.label in f.members for f in models.families) else "source"
    if family is not None:
        relaxed = "variant" if row.lineage.variant else "aim"
        kind = relaxed if row.lineage.omega is not None else "merge"
    return {
        "name": row.name,
        "label": family.label if family else row.label,
        "method": family.method if family else "",
        "kind": kind,
        "omega": row.lineage.omega,
        "relaxation": row.lineage.variant or "AIM",
        "published": row.published,
        "unrelaxed": number[unrelaxed.key] if unrelaxed else None,
        "variant": next((i for i, v in enumerate(sets) if any(r.key == row.key for r in v.rows)), None),
        "scores": {c: row.scores[c] for c in models.columns if c in row.scores},
    }


def _pairs(models: Models) -> list[JsonObject]:
    """For each pair of benchmarks the Pareto fronts, as points: without AIM, and one for each variant with AIM."""
    sets = variants(models)
    panels = []
    for x, y in itertools.combinations(models.columns, 2):

        def points(rows: Sequence[Row | None], x: str = x, y: str = y) -> list[tuple[float, float]]:
            return [(r.scores[x], r.scores[y]) for r in rows if r and x in r.scores and y in r.scores]

        sources = points(models.sources)
        plain = points([f.unrelaxed for f in models.families])
        relaxed = [points(variant.rows) for variant in sets]
        fronts: JsonObject = {"plain": pareto_front([*sources, *plain]) if plain else []}
        fronts["relaxed"] = [pareto_front([*sources, *some]) if some else [] for some in relaxed]
        if sources or plain or any(relaxed):
            panels.append({"x": x, "y": y, **fronts})
    return panels


def _curves(models: Models, report: Report) -> list[JsonObject]:
    """For each family with several omegas, each quantity's points (omega, value, low, high); the merge at omega 1."""
    names = [*models.columns, HV]
    cells = {line.row.key: dict(zip(names, line.cells, strict=True)) for line in report.lines}
    panels = []
    for family in curved(models):
        lines = {name: _curve(family, cells, name) for name in names}
        panels.append({"label": family.label, "method": family.method, "lines": {k: v for k, v in lines.items() if v}})
    return panels


def _curve(family: MergeGroup, cells: Mapping[str, Mapping[str, Cell]], name: str) -> list[list[float | None]]:
    points: dict[float, list[float | None]] = {}
    for row in family.curve:
        omega = 1.0 if row is family.unrelaxed else row.lineage.omega
        cell = cells[row.key][name]
        if omega is not None and cell.value is not None:
            points.setdefault(omega, [omega, cell.value, *(cell.interval or (None, None))])
    return [points[omega] for omega in sorted(points)]


def _benchmark(
    data: PageData,
    column: str,
    rows: Sequence[Row],
    number: Mapping[str, int],
    answers: Answers,
    most: int | None,
) -> JsonObject:
    """One benchmark's items: which there are, who has them right; prompts and answers go into chunks."""
    all_items: dict[Item, None] = {}
    for row in rows:
        if column in row.result.outcomes:
            all_items |= {(task, item): None for task, item, _ in row.result.outcomes[column].keys()}  # noqa: SIM118
    items = list(all_items)[:most]
    tasks = list(dict.fromkeys(task for task, _ in items))
    verdicts = {}
    questions: dict[Item, tuple[str, str]] = {}
    for row in rows:
        outcomes = row.result.outcomes.get(column)
        if outcomes is None or column not in row.result.scores:
            continue
        marks = _marks(outcomes, row.result.scores[column].metric)
        verdicts[number[row.key]] = "".join(marks.get(item, "-") for item in items)
        answers_of_row = answers.get(row.key, {}).get(column, {})
        for item, answer in answers_of_row.items():
            questions.setdefault(item, (answer.prompt, answer.gold))
    for row in rows:
        answers_of_row = answers.get(row.key, {}).get(column, {})
        if answers_of_row and number[row.key] in verdicts:
            parts = [_packed_answer(answers_of_row.get(item), questions.get(item)) for item in items]
            details = _details(row.result.outcomes[column], items)
            data.chunks[f"a{number[row.key]}-{column}"] = packed({"answers": parts, "metrics": details})
    if questions:
        data.chunks[f"q-{column}"] = packed([questions.get(item, ("", "")) for item in items])
    return {
        "column": column,
        "tasks": tasks,
        "items": [[tasks.index(task), item] for task, item in items],
        "verdicts": verdicts,
        "of": len(all_items),
    }


def _marks(outcomes: Outcomes, metric: str) -> dict[Item, str]:
    """1 right, 0 wrong, h in between; IFEval's are those of whole prompts, strictly read."""
    name = "prompt_level_strict_acc" if metric == IFEVAL_MEAN else metric
    keys = [(task, item) for task, item, _ in outcomes.keys()]  # noqa: SIM118
    return {k: "1" if v >= 1 else "0" if v <= 0 else "h" for k, v in zip(keys, outcomes.verdicts(name), strict=True)}


def _details(outcomes: Outcomes, items: Sequence[Item]) -> dict[str, list[float | None]]:
    """Every metric that is kept of a benchmark, in the order of the items."""
    shared = [set(task.verdicts) for task in outcomes.tasks.values()]
    names = [n for n in next(iter(outcomes.tasks.values())).verdicts if all(n in s for s in shared)]
    keys = [(task, item) for task, item, _ in outcomes.keys()]  # noqa: SIM118
    values = {name: dict(zip(keys, outcomes.verdicts(name), strict=True)) for name in names}
    return {name: [values[name].get(item) for item in items] for name in names}


def _packed_answer(answer: Answer | None, question: tuple[str, str] | None) -> JsonObject | None:
    if answer is None:
        return None
    packed: JsonObject = {"t": list(answer.texts)} if not answer.choices else {}
    if answer.choices:
        packed["c"] = [[text, round(value, 3) if math.isfinite(value) else None] for text, value in answer.choices]
    if answer.extracted is not None:
        packed["x"] = answer.extracted
    if question and answer.prompt != question[0]:
        packed["p"] = answer.prompt
    return packed


def packed(value: object) -> str:
    """JSON, gzipped, in base64: no character of it means anything to HTML. The same value gives the same text."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return base64.b64encode(gzip.compress(text, 6, mtime=0)).decode("ascii")
