"""Results -> tables in the form of the AIM paper's: which rows and cells there are. tables.py writes them down."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from console.errors import UsageError, nearest
from eval.results.rows import Models, Remark, Row
from eval.stats.gains import HV, Gains, Measure, all_gains
from eval.stats.significance import Interval
from eval.stats.uncertainty import Uncertainty, uncertainty

BEYOND, MEASURED = "†", "‡"


@dataclass(frozen=True)
class Cell:
    """One number: as printed ("-" for none) and unrounded; its change to the merge without AIM, as printed; whether it
    leads its column. `beyond`: whether the change is beyond noise, None where that is not known. 95 % intervals of the
    number and of the change, where known.
    """

    number: str = "-"
    value: float | None = None
    change: str | None = None
    lead: bool = False
    beyond: bool | None = None
    interval: Interval | None = None
    change_interval: Interval | None = None

    @property
    def text(self) -> str:
        """The cell as the paper prints it."""
        return f"{self.number} ({self.change})" if self.change else self.number


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
    """The tables: source models first (where any have results), then one table per method. `mixed`: published rows
    beside measured ones."""

    columns: tuple[str, ...]
    sources: Table | None
    methods: tuple[Table, ...]
    note: str
    gains: Gains
    noise: Uncertainty
    mixed: bool = False

    @property
    def lines(self) -> tuple[Line, ...]:
        """All lines, source models first."""
        tables = (*((self.sources,) if self.sources else ()), *self.methods)
        return tuple(line for table in tables for line in table.lines)


def make_report(models: Models, measure: Measure, remark: Remark, seed: int = 0) -> Report:
    """Compute gains and what is beyond noise, and fill the cells. `remark` hears why a cell stays empty.

    `seed` is that of the bootstrap and the permutations. Raises UsageError for a measure that does not fit the models.
    """
    measure.check(models)
    gains = all_gains(models, measure, remark)
    noise = uncertainty(models, gains, measure, remark, seed)
    omegas = sorted({row.lineage.omega for f in models.families for row in f.relaxed if row.lineage.omega is not None})
    fill = _Filler(models.columns, gains, noise, measure.root)
    sources = [Line(row, "-", row.label, "-", None, fill.cells(row, None)) for row in models.sources]
    merged = []
    for family in models.families:
        for row in family.rows:
            twin = family.twin if row is not family.twin else None
            omega = row.lineage.omega
            aim = "No" if omega is None else "Yes" if len(omegas) == 1 else f"Yes ({omega:g})"
            population = gains.populations.get(row.key)
            merged.append(Line(row, family.method, family.label, aim, population, fill.cells(row, twin)))
    as_published = measure.population == "paper" and all(row.published for row in models.rows)
    sources, merged = _lead(sources, as_published), _lead(merged, as_published)
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
    columns: Sequence[str]
    gains: Gains
    noise: Uncertainty
    root: float | None

    def cells(self, row: Row, twin: Row | None) -> tuple[Cell, ...]:
        cells = []
        for column in self.columns:
            value = row.scores.get(column)
            before = twin.scores.get(column) if twin else None
            # Percentages of benchmarks are those of the printed values, as in the paper; a reader can check them.
            change = None if value is None or before is None else percentage(round(before, 2), round(value, 2))
            cells.append(self._cell(row, column, None if value is None else f"{value:.2f}", value, change))
        gain, before = self.gains.values.get(row.key), self.gains.values.get(twin.key) if twin else None
        change = None if gain is None or before is None else percentage(before, gain)
        number = None if gain is None else f"{gain:.2f}" if self.root is None else f"{gain:.3g}"
        cells.append(self._cell(row, HV, number, gain, change))
        return tuple(cells)

    def _cell(self, row: Row, column: str, number: str | None, value: float | None, change: str | None) -> Cell:
        if number is None:
            return Cell()
        place = row.key, column
        moved = self.noise.changes.get(place)
        beyond = None if moved is None else place in self.noise.beyond
        return Cell(number, value, change, False, beyond, self.noise.intervals.get(place), moved)


def percentage(before: float, after: float) -> str | None:
    """Relative change as printed, `+4.65%` or `+inf%`; None where nothing changed, to 2 decimals of a percent."""
    if before == 0.0:
        return None if after == 0.0 else f"{math.copysign(math.inf, after):+}%"
    shown = f"{100.0 * (after - before) / before:+.2f}%"
    return None if shown in ("+0.00%", "-0.00%") else shown


def _lead(lines: Sequence[Line], as_published: bool) -> list[Line]:
    """Mark the maximum of each column; of equal ones (as printed, HV gain unrounded) the last, as in the paper.

    Gains are ranked within a population, unless the published tables are printed as they are.
    """
    out = [list(line.cells) for line in lines]
    for at in range(len(lines[0].cells) if lines else 0):
        last = at == len(lines[0].cells) - 1
        groups: dict[object, list[int]] = {}
        for i, line in enumerate(lines):
            if line.cells[at].value is not None:
                own = last and not as_published
                groups.setdefault(frozenset(line.population or ()) if own else None, []).append(i)
        for group in groups.values():
            values = {i: v if last else round(v, 2) for i in group if (v := lines[i].cells[at].value) is not None}
            if len(values) > 1:
                best = max(values, key=lambda i: (values[i], i))
                out[best][at] = replace(out[best][at], lead=True)
    return [replace(line, cells=tuple(cells)) for line, cells in zip(lines, out, strict=True)]


def ranking(report: Report, column: str) -> list[Line]:
    """The lines that have a number in a column, the largest first.

    Raises UsageError for an unknown column, and for HV gains over different populations: they do not compare.
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
    return sorted(lines, key=lambda line: -(line.cells[at].value or 0.0))


def _notes(
    models: Models, measure: Measure, noise: Uncertainty, omegas: Sequence[float], as_published: bool
) -> Iterator[str]:
    """What stands beside the tables: how many items, what is beyond noise, what the gain is, which omega."""
    if models.samples is not None:
        listed = ", ".join(f"{column} {count}" for column, count in models.samples.items())
        items = f" ({listed} items)" if listed else ""
        yield f"Samples, not whole benchmarks{items}, by --limit. Scores of different items do not compare."
    if len({row.published for row in models.rows}) == 2:
        yield f"{MEASURED} measured here; rows without it are the paper's."
    if not models.families:
        return
    if noise.compared:
        without = noise.pairs - noise.compared
        yield (
            f"{BEYOND} The change to the merge without AIM is beyond noise: benchmarks by paired tests per item, 5 % "
            "level, corrected by Holm for the benchmarks of a row; HV gain by a bootstrap over items, 95 % interval."
            + (f" {without} of {noise.pairs} AIM rows have no outcomes per item to tell." if without else "")
        )
    d = len(models.columns)
    k = float(d if measure.root is None else measure.root)
    root = {1.0: "", 2.0: "square root of the ", 3.0: "cube root of the "}.get(k, f"{k:g}th root of the ")
    over = {
        "merged": '"merged", the fine-tuned models merged in the row',
        "paper": '"paper", as in the published tables',
    }.get(measure.population if isinstance(measure.population, str) else "", "from the file")
    yield (
        f"{HV}: {root}hypervolume that a model adds to its population ({d} scores as fractions, reference "
        f"{_corner(measure, models.columns)}). Population {over}; it stands beside each gain. Gains over different "
        "populations do not compare"
        + (", although the published tables print the largest of all in bold." if as_published else ".")
        + (f" AIM at omega {omegas[0]:g}." if len(omegas) == 1 else "")
    )


def _corner(measure: Measure, columns: Sequence[str]) -> str:
    corner = measure.corner(columns)
    if not any(corner):
        return "at the origin"
    if isinstance(measure.reference, Mapping):
        return "at " + ", ".join(f"{c} {value:g}" for c, value in zip(columns, corner, strict=True) if value)
    return f"at {corner[0]:g} in each"
