"""Results -> tables in the form of the AIM paper's: which rows and cells there are. tables.py writes them down."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from common.errors import UsageError, nearest
from eval.results.conditions import column_conflicts, column_differences, listed
from eval.results.result import Score
from eval.results.rows import Models, Row, Warn
from eval.stats.gains import HV, Gains, Measure, all_gains, not_counted
from eval.stats.significance import Interval
from eval.stats.uncertainty import Uncertainty, uncertainty

SIGNIFICANT, MEASURED = "†", "‡"


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    Attributes:
        number: The number as printed, "-" for none.
        value: The number, not rounded.
        change: Its relative change to the merge without AIM, as printed; None where nothing changed or compares.
        better: True where that change is an improvement, False where it is a loss, None where that is not known.
        lead: True for the best of its column, and for all that print alike.
        is_significant: True where the change is statistically significant, None where that is not known.
        interval: 95 % interval of the number.
        change_interval: 95 % interval of the difference to the merge without AIM.
    """

    number: str = "-"
    value: float | None = None
    change: str | None = None
    better: bool | None = None
    lead: bool = False
    is_significant: bool | None = None
    interval: Interval | None = None
    change_interval: Interval | None = None

    @property
    def text(self) -> str:
        """The cell as the paper prints it."""
        return f"{self.number} ({self.change})" if self.change else self.number


@dataclass(frozen=True)
class Line:
    """One row of a table; `aim` is "-", "No", "Yes", "Yes (omega)", or a variant with its omega."""

    row: Row
    method: str
    label: str
    aim: str
    population: tuple[str, ...] | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Lines under one title."""

    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Report:
    """The tables: source models first (where any have results), then one table per method.

    `mixed`: published rows beside measured ones.
    """

    columns: tuple[str, ...]
    sources: Table | None
    methods: tuple[Table, ...]
    note: str
    gains: Gains
    uncertainty: Uncertainty
    mixed: bool = False

    @property
    def lines(self) -> tuple[Line, ...]:
        """All lines, source models first."""
        tables = (*((self.sources,) if self.sources else ()), *self.methods)
        return tuple(line for table in tables for line in table.lines)


def make_report(models: Models, measure: Measure, warn: Warn, seed: int = 0) -> Report:
    """Compute gains and significance, and fill the cells. `warn` receives the reason a cell stays empty.

    `seed` is that of the bootstrap and the permutations. Raises UsageError for a measure that does not fit the models.
    """
    measure.check(models)
    gains = all_gains(models, measure, warn)
    noise = uncertainty(models, gains, measure, warn, seed)
    omegas = sorted({row.lineage.omega for f in models.families for row in f.relaxed if row.lineage.omega is not None})
    fill = _Filler(models, gains, noise, measure.root, warn)
    sources = [Line(row, "-", row.label, "-", None, fill.cells(row, None)) for row in models.sources]
    merged = []
    for family in models.families:
        for row in family.rows:
            unrelaxed = family.unrelaxed if row is not family.unrelaxed else None
            omega = row.lineage.omega
            aim = "No" if omega is None else "Yes" if len(omegas) == 1 else f"Yes ({omega:g})"
            if row.lineage.variant:
                aim = f"{row.lineage.variant} ({omega:g})"
            population = gains.populations.get(row.key)
            merged.append(Line(row, family.method, family.label, aim, population, fill.cells(row, unrelaxed)))
    as_published = measure.population == "paper" and all(row.published for row in models.rows)
    sources, merged = (_lead(lines, models, as_published) for lines in (sources, merged))
    titles = dict.fromkeys(line.method for line in merged)
    published = {row.published for row in models.rows}
    return Report(
        models.columns,
        Table("Base Models", tuple(sources)) if sources else None,
        tuple(Table(title, tuple(line for line in merged if line.method == title)) for title in titles),
        "\n\n".join(_notes(models, measure, noise, omegas, as_published)),
        gains,
        noise,
        mixed=len(published) == 2,
    )


@dataclass(frozen=True)
class _Filler:
    models: Models
    gains: Gains
    uncertainty: Uncertainty
    root: float | None
    warn: Warn

    def cells(self, row: Row, unrelaxed: Row | None) -> tuple[Cell, ...]:
        cells = []
        for column in self.models.columns:
            score = row.result.scores.get(column)
            number = None if score is None else printed(score)
            before = unrelaxed.result.scores.get(column) if unrelaxed else None
            change, better = None, None
            if score and number and unrelaxed and before and self._alike(row, unrelaxed, column):
                # Percentages of benchmarks are those of the printed values, as in the paper; a reader can check them.
                change = percentage(float(printed(before)), float(number))
                rise = score.value > before.value
                better = None if score.higher_is_better is None else rise == score.higher_is_better
            cells.append(self._cell(row, column, number, score.value if score else None, change, better))
        gain, was = self.gains.values.get(row.key), self.gains.values.get(unrelaxed.key) if unrelaxed else None
        populations = [set(self.gains.populations.get(r.key, ())) for r in (row, unrelaxed) if r]
        one = len(populations) == 2 and populations[0] == populations[1]
        change = percentage(was, gain) if gain is not None and was is not None and one else None
        number = None if gain is None else f"{gain:.2f}" if self.root is None else f"{gain:.3g}"
        cells.append(self._cell(row, HV, number, gain, change, (gain or 0.0) > (was or 0.0)))
        return tuple(cells)

    def _alike(self, row: Row, unrelaxed: Row, column: str) -> bool:
        """True where the two scores compare; otherwise the remark names what differs."""
        unlike = column_differences(unrelaxed.result, row.result, column)
        if unlike:
            self.warn(f"{column} of {row.model} and of {unrelaxed.model} do not compare: {listed(unlike)}.")
        return not unlike

    def _cell(
        self, row: Row, column: str, number: str | None, value: float | None, change: str | None, better: bool | None
    ) -> Cell:
        if number is None:
            return Cell()
        place = row.key, column
        change_interval = self.uncertainty.changes.get(place)
        is_significant = None if change_interval is None else place in self.uncertainty.significant
        interval = self.uncertainty.intervals.get(place)
        return Cell(number, value, change, better if change else None, False, is_significant, interval, change_interval)


def printed(score: Score) -> str:
    """A score as tables print it: percent with 2 decimals, other numbers with 4 digits."""
    return f"{score.value:.2f}" if score.is_fraction else f"{score.value:.4g}"


def percentage(before: float, after: float) -> str | None:
    """Relative change as printed, `+4.65%` or `+inf%`; None where nothing changed, to 2 decimals of a percent."""
    if before == 0.0:
        return None if after == 0.0 else f"{math.copysign(math.inf, after):+}%"
    text = f"{100.0 * (after - before) / abs(before):+.2f}%"
    return None if text in ("+0.00%", "-0.00%") else text


def _lead(lines: Sequence[Line], models: Models, as_published: bool) -> list[Line]:
    """Mark the best of each column, and all equal to it (scores as printed); the published tables mark the last.

    Columns of which more is not better, that are no fractions, or whose rows were evaluated under several conditions
    have no best. Gains are ranked within a population, unless the published tables are printed as they are.
    """
    out = [list(line.cells) for line in lines]
    for at in range(len(lines[0].cells) if lines else 0):
        last = at == len(lines[0].cells) - 1
        if not last:
            column = models.columns[at]
            results = [line.row.result for line in lines]
            if column not in models.gain_columns or column_conflicts(results, column):
                continue
        groups: dict[object, list[int]] = {}
        for i, line in enumerate(lines):
            if line.cells[at].value is not None:
                by_population = last and not as_published
                groups.setdefault(frozenset(line.population or ()) if by_population else None, []).append(i)
        for group in groups.values():
            values = {i: v for i in group if (v := lines[i].cells[at].value) is not None}
            if len(values) < 2:
                continue
            best = max(values, key=lambda i: (values[i] if last else round(values[i], 2), i))
            for i in values:
                alike = values[i] == values[best] if last else round(values[i], 2) == round(values[best], 2)
                if i == best or (alike and not as_published):
                    out[i][at] = replace(out[i][at], lead=True)
    return [replace(line, cells=tuple(cells)) for line, cells in zip(lines, out, strict=True)]


def ranking(report: Report, column: str) -> list[Line]:
    """The lines that have a number in a column, the best first.

    Raises UsageError for an unknown column, for rows that were evaluated under several conditions, and for HV gains
    over different populations: they do not compare.
    """
    names = [*report.columns, HV]
    if column not in names:
        raise UsageError(f"--rank {column}: there is no such column.{nearest(column, names)}")
    at = names.index(column)
    lines = [line for line in report.lines if line.cells[at].value is not None]
    populations = {frozenset(line.population or ()): line.population or () for line in lines}
    if column == HV and len(populations) > 1:
        sets = "; ".join(f"{{{', '.join(labels)}}}" for labels in populations.values())
        raise UsageError(
            f"--rank {HV}: these gains are over different populations ({sets}) and do not compare; give one population "
            "for all rows with --population FILE, or take the rows of one set of models with --only."
        )
    results = [line.row.result for line in lines]
    unlike = column_conflicts(results, column)
    if unlike:
        raise UsageError(
            f"--rank {column}: its rows were evaluated under several conditions ({listed(unlike)}) and do not compare; "
            "give results of one kind."
        )
    directions = {r.scores[column].higher_is_better for r in results if column in r.scores} if column != HV else {True}
    if directions - {True, False} or len(directions) > 1:
        raise UsageError(f"--rank {column}: its direction (higher or lower is better) is unknown.")
    sign = 1 if directions == {False} else -1
    return sorted(lines, key=lambda line: sign * (line.cells[at].value or 0.0))


def _notes(
    models: Models, measure: Measure, noise: Uncertainty, omegas: Sequence[float], as_published: bool
) -> Iterator[str]:
    """Notes below the tables: numbers of items, significance, definition of HV gain, omega."""
    if models.samples is not None:
        listed = ", ".join(f"{column} {count}" for column, count in models.samples.items())
        items = f" ({listed} items)" if listed else ""
        yield f"Samples, not whole benchmarks{items}, by --limit. Scores of different items do not compare."
    if len({row.published for row in models.rows}) == 2:
        yield f"{MEASURED} measured here; rows without it are the paper's."
    yield from _column_notes(models)
    if not models.families:
        return
    if noise.compared:
        without = noise.pairs - noise.compared
        yield (
            f"{SIGNIFICANT} The change from the merge without AIM is statistically significant: benchmarks by "
            "paired tests per item, 5 % level, corrected by Holm for the benchmarks of a row; HV gain by a bootstrap "
            "over items, 95 % interval."
            + (f" {without} of {noise.pairs} AIM rows have no outcomes per item to tell." if without else "")
        )
    d = len(models.gain_columns)
    if not d:
        return
    corner = _corner(measure, models.gain_columns)
    k = float(d if measure.root is None else measure.root)
    root = {1.0: "", 2.0: "square root of the ", 3.0: "cube root of the "}.get(k, f"{k:g}th root of the ")
    over = {
        "merged": '"merged", the fine-tuned models merged in the row',
        "paper": '"paper", as in the published tables',
    }.get(measure.population if isinstance(measure.population, str) else "", "from the file")
    yield (
        f"{HV}: {root}hypervolume that a model adds to its population ({d} scores as fractions, reference "
        f"{corner}). Population {over}; the table names it for each gain. Gains over different "
        "populations do not compare"
        + (", although the published tables print the largest of all in bold." if as_published else ".")
        + (f" AIM at omega {omegas[0]:g}." if len(omegas) == 1 else "")
    )


def _column_notes(models: Models) -> Iterator[str]:
    """Sentences on columns that have no best score: other directions and scales, rows under several conditions."""
    excluded = [f"{c} ({not_counted(models, c)})" for c in models.columns if c not in models.gain_columns]
    if excluded:
        yield f"Scores are percentages, higher is better, except {'; '.join(excluded)}: no bold, no part in {HV}."
    conditions: dict[str, list[str]] = {}
    for column in models.columns:
        for name, pair in column_conflicts([row.result for row in models.rows], column).items():
            conditions.setdefault(listed({name: pair}), []).append(column)
    if conditions:
        conditions_text = "; ".join(
            f"{text} ({'all' if len(columns) == len(models.columns) > 1 else ', '.join(columns)})"
            for text, columns in conditions.items()
        )
        yield (
            f"Evaluated under several conditions: {conditions_text}. Scores under different conditions do not "
            "compare: no bold in a column of a table that holds both, no change between them."
        )


def _corner(measure: Measure, columns: Sequence[str]) -> str:
    corner = measure.corner(columns)
    if not any(corner):
        return "at the origin"
    if isinstance(measure.reference, Mapping):
        return "at " + ", ".join(f"{c} {value:g}" for c, value in zip(columns, corner, strict=True) if value)
    return f"at {corner[0]:g} in each"
