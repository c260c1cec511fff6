"""Results of an experiment: a row for every scored model, tables, figures and page, a CSV of all cells."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from common.errors import UsageError
from common.files.paths import read_json, write_whole
from eval.harness.references import path_label
from eval.report.latex import to_latex
from eval.report.page import make_page
from eval.report.plots import curved, plot_omega_curves, plot_pareto, save
from eval.report.report import make_report
from eval.report.tables import to_csv, to_markdown
from eval.results.answer_facts import answers_table
from eval.results.reader import PAPER, read_results
from eval.results.result import EvalResult
from eval.results.rows import Models, assemble, model_key
from eval.results.samples import answers_of, sample_files
from eval.stats.gains import HV, Measure, all_gains
from scripts.experiments.paired import Row, write_summary
from scripts.experiments.plan import Plan, Replicate
from scripts.experiments.state import State

T = TypeVar("T")
Remark = Callable[[str], None]
MOST_BYTES = 1 << 20
"""Size of a file of collected rows at most."""
MEAN = "mean"
"""Column of the CSV: the mean of the scores that are percentages of which more is better."""


def write_results(plan: Plan, state: State, remark: Remark, with_tables: bool) -> tuple[list[Path], list[Row]]:
    """Write tables, figures and the CSV of all scored cells into `report/`.

    Args:
        plan: The plan of the experiment.
        state: Its state.
        remark: Prints a sentence for the user.
        with_tables: False for the CSV and the differences over replicates alone. The tables bootstrap an interval of
            the HV gain of every model, which takes seconds a model.

    Returns:
        The files that a reader starts with, and the rows of the CSV.
    """
    out = plan.folder / "report"
    results = read_scores(plan, state, remark)
    if not results:
        remark("No cell has scores yet, so there is no report.")
        return [], []
    rows: list[Row] = []
    files: list[Path] = []
    several = len(plan.replicates) > 1
    for replicate in plan.replicates:
        models = models_of(plan, replicate, results, remark)
        if not models.rows:
            continue
        rows += rows_of(plan, replicate, models, remark)
        if not with_tables:
            continue
        folder = out / replicate.name if several else out
        files += write_tables(plan, models, results, folder, remark, with_figures=not several)
    write_whole(out / "cells.csv", to_csv_text(rows).encode())
    return [out / "cells.csv", *write_summary(plan, rows, out), *files], rows


def read_scores(plan: Plan, state: State, remark: Remark) -> dict[str, EvalResult]:
    """Return the newest result of every scored model, by its path, its columns named as the experiment names them."""
    results: dict[str, EvalResult] = {}
    for cell in plan.cells:
        scores = state.cell_folder(cell) / "scores"
        if cell.section != "evaluate" or not scores.is_dir() or state.status(cell).state != "done":
            continue
        for result in read_results(scores, remark)[0]:
            results[model_key(result.model)] = _renamed(result, plan.experiment.columns)
    return results


def _renamed(result: EvalResult, columns: Mapping[str, str]) -> EvalResult:
    def by_title(values: Mapping[str, T]) -> dict[str, T]:
        return {columns.get(name, name): value for name, value in values.items()}

    return replace(
        result, scores=by_title(result.scores), outcomes=by_title(result.outcomes), answers=by_title(result.answers)
    )


def models_of(plan: Plan, replicate: Replicate, results: Mapping[str, EvalResult], remark: Remark) -> Models:
    """Return a replicate's models as the tables have them; with the paper's numbers where those are asked for."""
    of_replicate = [m for m in plan.models if m.axes["replicate"] in (_name(replicate), "published")]
    chosen = [results[key] for m in of_replicate if (key := _label(m.path)) in results]
    names = {s: label for model, label in replicate.labels.items() for s in (model, _label(model))}
    if plan.experiment.published:
        published, labels = read_results(PAPER, remark)
        chosen = published + chosen
        names = {**labels, **names}
    mentioned = {
        s for r in chosen for m in (r.model, r.lineage.base_model, *r.lineage.models) if m for s in (m, model_key(m))
    }
    return assemble(chosen, {model: label for model, label in names.items() if model in mentioned}, remark)


def _label(reference: str) -> str:
    """Return a folder, which may be deleted, or hub id as its result names it."""
    return path_label(reference) if Path(reference).exists() else path_label(reference).removesuffix("@main")


def _name(replicate: Replicate) -> str:
    return str(replicate.axes["replicate"])


def rows_of(plan: Plan, replicate: Replicate, models: Models, remark: Remark) -> list[Row]:
    """Return a flat row for each scored model of a replicate: its axes, scores, their mean, and HV gain."""
    gains = all_gains(models, Measure(), remark).values
    by_path = {_label(model.path): model for model in plan.models if model.axes["replicate"] == _name(replicate)}
    rows: list[Row] = []
    for row in models.rows:
        model = by_path.get(model_key(row.model))
        if model is None or row.published:
            continue
        counted = [row.scores[c] for c in models.gain_columns if c in row.scores]
        entry = {**model.axes, "checkpoint": row.model, **row.scores}
        if counted:
            entry[MEAN] = sum(counted) / len(counted)
        if row.key in gains:
            entry[HV] = gains[row.key]
        rows.append(entry)
    return rows


def write_tables(
    plan: Plan, models: Models, results: Mapping[str, EvalResult], out: Path, remark: Remark, with_figures: bool
) -> list[Path]:
    """Write a replicate's tables; with_figures: also Pareto fronts, omega curves and the report page."""
    report = make_report(models, Measure(), remark)
    answers = answers_table([row.result for row in models.rows if not row.published])
    text = to_markdown(report) + (f"\n## Answers\n\n{answers}\n" if plan.experiment.evaluate.get("answers") else "")
    write_whole(out / "tables.md", f"# {plan.experiment.title}\n\n{text}".encode())
    write_whole(out / "tables.csv", to_csv(report).encode())
    write_whole(out / "tables.tex", to_latex(report).encode())
    files = [out / "tables.md"]
    if not with_figures:
        return files
    if len(models.columns) > 1 and models.families:
        files += save(plot_pareto(models, list(itertools.combinations(models.columns, 2)), remark), out / "pareto")
    if curved(models):
        files += save(plot_omega_curves(models, report.gains.values, report.uncertainty.intervals), out / "omega")
    samples = sample_files([plan.folder / "cells"])
    answers_by_row = {
        row.key: answers_of(results[model_key(row.model)], samples.get(model_key(row.model), []), remark)
        for row in models.rows
        if not row.published
    }
    page = make_page(models, report, answers_by_row, plan.experiment.title)
    write_whole(out / "report.html", page.encode("utf-8", "replace"))
    return [*files, out / "report.html"]


def to_csv_text(rows: Sequence[Row]) -> str:
    """Return rows as CSV, with every key that any of them has."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _columns(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def compact(plan: Plan, rows: Sequence[Row], file: Path) -> list[Path]:
    """Write the rows as compact JSON for results/: columns once, a line for each row, paths left out.

    Rows of more than `MOST_BYTES` are divided into `file`, FILE-2.json and so on, each with whole replicates;
    `read_rows` reads them together.

    Returns:
        The files.

    Raises:
        UsageError: where the rows of one replicate are too many.
    """
    heads = [key for key in _columns(rows) if key != "checkpoint"]
    head = {"experiment": plan.experiment.name, "title": plan.experiment.title, "columns": heads}
    most = MOST_BYTES - len(json.dumps(head)) - len('"part":999,"parts":999,"rows":[]\n\n\n')
    parts: list[list[str]] = []
    size = most
    for replicate, group in itertools.groupby(rows, key=lambda row: row.get("replicate")):
        lines = [json.dumps([_rounded(row.get(key)) for key in heads], separators=(",", ":")) for row in group]
        added = sum(len(line) + len(",\n") for line in lines)
        if added > most:
            raise UsageError(
                f"--collect {file}: replicate {replicate} would take {added} bytes, expected at most {most}; leave out "
                "methods, combinations or relaxations."
            )
        if not parts or size + added > most:
            parts.append([])
            size = 0
        parts[-1] += lines
        size += added
    parts = parts or [[]]
    files = [_part_file(file, number) for number in range(1, len(parts) + 1)]
    for number, (part_file, lines) in enumerate(zip(files, parts, strict=True), start=1):
        start = json.dumps({**head, "part": number, "parts": len(parts)}, separators=(",", ":")).removesuffix("}")
        write_whole(part_file, (start + ',"rows":[\n' + ",\n".join(lines) + "\n]}\n").encode())
    return files


def _part_file(file: Path, number: int) -> Path:
    return file if number == 1 else file.with_stem(f"{file.stem}-{number}")


def read_rows(file: Path) -> list[Row]:
    """Return the rows that `compact` wrote into a file and its further parts; values that a row lacks are left out.

    Raises UsageError for a part of another experiment.
    """
    rows: list[Row] = []
    number, parts, head = 1, 1, None
    while number <= parts:
        part_file = _part_file(file, number)
        document = read_json(part_file, f"{part_file} does not exist: part {number} of {parts} of {file}.")
        columns = document["columns"]
        head = head or (document["experiment"], columns, document["parts"])
        if head != (document["experiment"], columns, document["parts"]) or document["part"] != number:
            raise UsageError(f"{part_file} is not part {number} of {file}; collect the rows again.")
        for values in document["rows"]:
            rows.append({key: value for key, value in zip(columns, values, strict=True) if value is not None})
        parts, number = document["parts"], number + 1
    return rows


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _rounded(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value
