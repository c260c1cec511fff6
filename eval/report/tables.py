"""Tables as text: Markdown for reading, CSV for computing, LaTeX for a paper, columns for the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from eval.report.report import BEYOND, MEASURED, Cell, Line, Report
from eval.stats.gains import HV

OVER = "HV over"


def to_markdown(report: Report, intervals: bool = False) -> str:
    """Return the tables as Markdown, ready for a README; with `intervals`, the 95 % interval behind each number."""
    numbers = [*report.columns, HV]
    parts = []
    if report.sources:
        lines = [["-", shown_label(line, report), "-", *_cells(line, intervals)] for line in report.sources.lines]
        parts.append(f"## {report.sources.title}\n\n" + pipes(["Method", "Model(s)", "AIM", *numbers], lines))
    if report.methods:
        parts.append("## Merged Models")
    for table in report.methods:
        lines, above = [], None
        for line in table.lines:
            label = shown_label(line, report)
            lines.append(["" if label == above else label, line.aim, *_cells(line, intervals), over(line)])
            above = label
        parts.append(f"### {table.title}\n\n" + pipes(["Model(s)", "AIM", *numbers, OVER], lines))
    if report.note:
        parts.append(report.note)
    return "\n\n".join(parts) + "\n"


def to_ranking(report: Report, lines: Sequence[Line], column: str, intervals: bool = False) -> str:
    """Return the lines of `eval.report.report.ranking` as a Markdown table."""
    at = [*report.columns, HV].index(column)
    header = ["", "Method", "Model(s)", "AIM", column, *([OVER] if column == HV else [])]
    rows = [
        [str(i), line.method, shown_label(line, report), line.aim, markdown_cell(line.cells[at], intervals, bold=False)]
        + ([over(line)] if column == HV else [])
        for i, line in enumerate(lines, 1)
    ]
    return f"## Ranking by {column}\n\n{pipes(header, rows)}\n"


def over(line: Line) -> str:
    """The population of a line's gain as a cell; an empty one is said to be that."""
    return "-" if line.population is None else ", ".join(line.population) or "none"


def shown_label(line: Line, report: Report) -> str:
    """The label, marked where the row was measured and others are published."""
    return f"{line.label} {MEASURED}" if report.mixed and not line.row.published else line.label


def _cells(line: Line, intervals: bool) -> list[str]:
    return [markdown_cell(cell, intervals, bold=True) for cell in line.cells]


def markdown_cell(cell: Cell, intervals: bool, bold: bool) -> str:
    """A cell with its change, the mark of one beyond noise, and with `intervals` its 95 % interval."""
    number = f"**{cell.number}**" if cell.lead and bold else cell.number
    return number + _behind(cell, intervals)


def _behind(cell: Cell, intervals: bool) -> str:
    """What follows a number: its interval, its change, and the mark of a change beyond noise."""
    shown = f" [{as_printed(cell, 0)}, {as_printed(cell, 1)}]" if intervals and cell.interval else ""
    shown += f" ({cell.change})" if cell.change else ""
    return shown + (BEYOND if cell.beyond else "")


def as_printed(cell: Cell, end: int) -> str:
    """An end of a cell's interval with as many decimals as the number has, at most two."""
    assert cell.interval is not None
    return f"{cell.interval[end]:.2f}" if "e" not in cell.number else f"{cell.interval[end]:.3g}"


def pipes(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    plain = [[cell.replace("|", "\\|") for cell in row] for row in (header, *lines)]
    rows = [plain[0], ["-" * max(3, len(name)) for name in header], *plain[1:]]
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in rows)


def to_csv(report: Report) -> str:
    """Return all rows as one CSV: the tables' columns and cells, then what they were made from, unrounded.

    `low` and `high` are 95 % intervals: of the number, and of its difference to the merge without AIM.
    """
    numbers = [*report.columns, HV]
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n").writerow
    extra = ["Population", "Omega", "Checkpoint", "Published", *(f"{name} (unrounded)" for name in numbers)]
    noise = ("low", "high", "change low", "change high", "beyond noise")
    write(["Method", "Model(s)", "AIM", *numbers, *extra, *(f"{name} ({what})" for name in numbers for what in noise)])
    for line in report.lines:
        omega = "" if line.row.lineage.omega is None else f"{line.row.lineage.omega:g}"
        values = ["" if cell.value is None else repr(float(cell.value)) for cell in line.cells]
        published = "yes" if line.row.published else "no"
        shown = [line.method, line.label, line.aim, *(cell.text for cell in line.cells)]
        made = ["; ".join(line.population or ()), omega, line.row.model, published, *values]
        write([*shown, *made, *(text for cell in line.cells for text in _noise(cell))])
    return out.getvalue()


def _noise(cell: Cell) -> list[str]:
    ends = [f"{end:.6g}" for found in (cell.interval, cell.change_interval) for end in found or ()]
    ends = ends if len(ends) == 4 else [*(ends if cell.interval else ["", ""]), "", ""]
    return [*ends, "" if cell.beyond is None else "yes" if cell.beyond else "no"]
