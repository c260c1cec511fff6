"""Results -> tables in the form of the AIM paper's: Markdown for reading, CSV for computing."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from console.errors import UsageError, nearest
from eval.hypervolume import hv_gain, population_of
from eval.rows import Models, Remark, Row

HV = "HV Gain"
Rule = str | Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Cell:
    """One number of a table: what is printed, its unrounded value (None for "-"), and whether it leads its column."""

    text: str
    value: float | None = None
    lead: bool = False

    @property
    def markdown(self) -> str:
        value, space, change = self.text.partition(" ")
        return f"**{value}**{space}{change}" if self.lead else self.text


@dataclass(frozen=True)
class Line:
    """One row of a table; `aim` is "-", "No", "Yes", or "Yes (omega)"."""

    row: Row
    method: str
    label: str
    aim: str
    population: tuple[str, ...] | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Report:
    """The tables: source models first (where any have results), then one table per method."""

    columns: tuple[str, ...]
    sources: Table | None
    methods: tuple[Table, ...]
    note: str


def make_report(models: Models, rule: Rule, remark: Remark) -> Report:
    """Compute the gains and fill the cells. `rule` is as in `population_of`; `remark` hears why a cell stays empty."""
    if not isinstance(rule, str):
        _check_rule(rule, models)
    gains, populations = all_gains(models, rule, remark)
    omegas = sorted({row.lineage.omega for f in models.families for row in f.relaxed if row.lineage.omega is not None})
    sources = [Line(row, "-", row.label, "-", None, _cells(row, None, models.columns, gains)) for row in models.sources]
    merged = []
    for family in models.families:
        for row in family.rows:
            twin = family.twin if row is not family.twin else None
            omega = row.lineage.omega
            aim = "No" if omega is None else "Yes" if len(omegas) == 1 else f"Yes ({omega:g})"
            cells = _cells(row, twin, models.columns, gains)
            merged.append(Line(row, family.method, family.label, aim, populations.get(row.model), cells))
    sources, merged = _lead(sources), _lead(merged)
    titles = dict.fromkeys(line.method for line in merged)
    return Report(
        models.columns,
        Table("Base Models", tuple(sources)) if sources else None,
        tuple(Table(title, tuple(line for line in merged if line.method == title)) for title in titles),
        "\n\n".join(_notes(models, rule, populations, omegas)),
    )


def all_gains(models: Models, rule: Rule, remark: Remark) -> tuple[dict[str, float], dict[str, tuple[str, ...]]]:
    """HV gain and population labels of each merged model, by model; a gain that cannot be computed is left out."""
    gains: dict[str, float] = {}
    populations: dict[str, tuple[str, ...]] = {}
    said: set[str] = set()

    def once(sentence: str) -> None:
        if sentence not in said:
            said.add(sentence)
            remark(sentence)

    for family in models.families:
        for row in family.rows:
            labels = population_of(rule, family.label, row.name, family.members)
            if labels is None:
                once(f"No HV gain for {family.label} ({family.method}): no population is known for it.")
                continue
            populations[row.model] = labels
            reason = _unmeasured(row, labels, models)
            if reason:
                once(reason)
                continue
            members = [models.find(label) for label in labels]
            scores = [[member.scores[c] for c in models.columns] for member in members if member is not None]
            gains[row.model] = hv_gain([row.scores[c] for c in models.columns], scores)
    return gains, populations


def _unmeasured(row: Row, labels: Sequence[str], models: Models) -> str:
    """Why the gain of `row` cannot be computed, or an empty string."""
    for label in labels:
        member = models.find(label)
        if member is None:
            return f"HV gain over {', '.join(labels)}: no result of {label} was given, so the cell stays '-'."
        missing = [c for c in models.columns if c not in member.scores]
        if missing:
            return (
                f"HV gain over {', '.join(labels)}: {label} has no score for {', '.join(missing)}; the cell stays '-'."
            )
    missing = [c for c in models.columns if c not in row.scores]
    return f"HV gain of {row.model}: no score for {', '.join(missing)}, so the cell stays '-'." if missing else ""


def _check_rule(rule: Mapping[str, Sequence[str]], models: Models) -> None:
    known = {name for family in models.families for name in (family.label, *(row.name for row in family.rows))}
    for label in rule:
        if label not in known:
            raise UsageError(
                f"The population file has {label!r}, which no merged row is called.{nearest(label, known)}"
            )


def _cells(row: Row, twin: Row | None, columns: Sequence[str], gains: Mapping[str, float]) -> tuple[Cell, ...]:
    cells = []
    for column in columns:
        value = row.scores.get(column)
        before = twin.scores.get(column) if twin else None
        # Percentages of benchmarks are those of the printed values, as in the paper; a reader can check them.
        change = None if value is None or before is None else percentage(round(before, 2), round(value, 2))
        cells.append(_cell(value, change))
    gain, before = gains.get(row.model), gains.get(twin.model) if twin else None
    cells.append(_cell(gain, None if gain is None or before is None else percentage(before, gain)))
    return tuple(cells)


def _cell(value: float | None, change: str | None) -> Cell:
    if value is None:
        return Cell("-")
    return Cell(f"{value:.2f} ({change})" if change else f"{value:.2f}", value)


def percentage(before: float, after: float) -> str | None:
    """Relative change as printed, `+4.65%` or `+inf%`; None where nothing changed, to 2 decimals of a percent."""
    if before == 0.0:
        return None if after == 0.0 else f"{math.copysign(math.inf, after):+}%"
    shown = f"{100.0 * (after - before) / before:+.2f}%"
    return None if shown in ("+0.00%", "-0.00%") else shown


def _lead(lines: list[Line]) -> list[Line]:
    """Mark the maximum of each column; of equal ones (as printed, HV gain unrounded) the last, as in the paper."""
    out = lines
    for at in range(len(lines[0].cells) if lines else 0):
        last = at == len(lines[0].cells) - 1
        values = {
            i: v if last else round(v, 2) for i, line in enumerate(lines) if (v := line.cells[at].value) is not None
        }
        if len(values) < 2:
            continue
        best = max(values, key=lambda i: (values[i], i))
        cell, line = lines[best].cells[at], out[best]
        cells = (*line.cells[:at], Cell(cell.text, cell.value, True), *line.cells[at + 1 :])
        out = [*out[:best], Line(line.row, line.method, line.label, line.aim, line.population, cells), *out[best + 1 :]]
    return out


def _notes(
    models: Models, rule: Rule, populations: Mapping[str, Sequence[str]], omegas: Sequence[float]
) -> Iterator[str]:
    """What stands beside the tables: how many items, what the gain is and over which population, which omega."""
    if models.limit is not None:
        yield (
            f"Scores (some or all) are of --limit {models.limit} items of a benchmark, at least one of each of its "
            "subjects: small samples."
        )
    if not models.families:
        return
    d = len(models.columns)
    if rule == "merged":
        over = '"merged", the fine-tuned models merged in the row'
    else:
        sets = {f.label: populations[r.model] for f in models.families for r in f.rows if r.model in populations}
        each = "; ".join(f"{label} over {{{', '.join(labels)}}}" for label, labels in sets.items())
        over = f'"paper", as in the published tables: {each}' if rule == "paper" else f"from the file: {each}"
    root = {1: "", 2: "square root of the ", 3: "cube root of the "}.get(d, f"{d}th root of the ")
    yield (
        f"{HV}: {root}hypervolume that a model adds to its population ({d} scores as fractions, reference at the "
        f"origin). Population {over}. Gains over different populations do not compare."
        + (f" AIM at omega {omegas[0]:g}." if len(omegas) == 1 else "")
    )


def to_markdown(report: Report) -> str:
    """Return the tables as Markdown, ready for a README."""
    numbers = [*report.columns, HV]
    parts = []
    if report.sources:
        lines = [["-", line.label, "-", *(c.markdown for c in line.cells)] for line in report.sources.lines]
        parts.append(f"## {report.sources.title}\n\n" + _pipe(["Method", "Model(s)", "AIM", *numbers], lines))
    if report.methods:
        parts.append("## Merged Models")
    for table in report.methods:
        lines, above = [], None
        for line in table.lines:
            label = "" if line.label == above else line.label
            lines.append([label, line.aim, *(c.markdown for c in line.cells)])
            above = line.label
        parts.append(f"### {table.title}\n\n" + _pipe(["Model(s)", "AIM", *numbers], lines))
    if report.note:
        parts.append(report.note)
    return "\n\n".join(parts) + "\n"


def _pipe(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    plain = [[cell.replace("|", "\\|") for cell in row] for row in (header, *lines)]
    rows = [plain[0], ["-" * max(3, len(name)) for name in header], *plain[1:]]
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in rows)


def to_csv(report: Report) -> str:
    """Return all rows as one CSV: the tables' columns and cells, then what they were made from, unrounded."""
    numbers = [*report.columns, HV]
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n").writerow
    extra = ["Population", "Omega", "Checkpoint", *(f"{name} (unrounded)" for name in numbers)]
    write(["Method", "Model(s)", "AIM", *numbers, *extra])
    for table in (report.sources, *report.methods):
        for line in table.lines if table else ():
            omega = "" if line.row.lineage.omega is None else f"{line.row.lineage.omega:g}"
            values = ["" if cell.value is None else repr(float(cell.value)) for cell in line.cells]
            shown = [line.method, line.label, line.aim, *(cell.text for cell in line.cells)]
            write([*shown, "; ".join(line.population or ()), omega, line.row.model, *values])
    return out.getvalue()
