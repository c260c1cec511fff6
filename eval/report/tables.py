"""Tables as text: Markdown for reading, CSV for computing, LaTeX for a paper, columns for the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from common.markup import csv_text, markdown_text
from eval.report.report import MEASURED, SIGNIFICANT, Cell, Line, Report
from eval.stats.gains import HV

OVER = "HV over"


def to_markdown(report: Report, intervals: bool = False) -> str:
    """Return the tables as Markdown, ready for a README; with `intervals`, the 95 % interval behind each number."""
    numbers = [*map(markdown_text, report.columns), HV]
    parts = []
    if report.sources:
        lines = [["-", markdown_label(line, report), "-", *_cells(line, intervals)] for line in report.sources.lines]
        parts.append(f"## {report.sources.title}\n\n" + pipes(["Method", "Model(s)", "AIM", *numbers], lines))
    if report.methods:
        parts.append("## Merged Models")
    for table in report.methods:
        lines, above = [], None
        for line in table.lines:
            label = markdown_label(line, report)
            cells = [*_cells(line, intervals), markdown_text(over(line)) if over(line) != "-" else "-"]
            lines.append(["" if label == above else label, line.aim, *cells])
            above = label
        parts.append(f"### {markdown_text(table.title)}\n\n" + pipes(["Model(s)", "AIM", *numbers, OVER], lines))
    if report.note:
        parts.append(report.note)
    return "\n\n".join(parts) + "\n"


def to_ranking(report: Report, lines: Sequence[Line], column: str, intervals: bool = False) -> str:
    """Return the lines of `eval.report.report.ranking` as a Markdown table."""
    at = [*report.columns, HV].index(column)
    header = ["", "Method", "Model(s)", "AIM", markdown_text(column), *([OVER] if column == HV else [])]
    rows = []
    for i, line in enumerate(lines, 1):
        method = "-" if line.method == "-" else markdown_text(line.method)
        number = markdown_cell(line.cells[at], intervals, bold=False)
        rows.append([str(i), method, markdown_label(line, report), line.aim, number])
        rows[-1] += [markdown_text(over(line))] if column == HV else []
    return f"## Ranking by {markdown_text(column)}\n\n{pipes(header, rows)}\n"


def over(line: Line) -> str:
    """The population of a line's gain as a cell; an empty one is said to be that."""
    return "-" if line.population is None else ", ".join(line.population) or "none"


def shown_label(line: Line, report: Report) -> str:
    """The label, marked where the row was measured and others are published."""
    return f"{line.label} {MEASURED}" if report.mixed and not line.row.published else line.label


def markdown_label(line: Line, report: Report) -> str:
    """The label as literal Markdown, marked as `shown_label` does."""
    return markdown_text(shown_label(line, report))


def _cells(line: Line, intervals: bool) -> list[str]:
    return [markdown_cell(cell, intervals, bold=True) for cell in line.cells]


def markdown_cell(cell: Cell, intervals: bool, bold: bool) -> str:
    """Return a cell with its change, the mark of a significant one, and with `intervals` its 95 % interval."""
    number = f"**{cell.number}**" if cell.lead and bold else cell.number
    return number + _behind(cell, intervals)


def _behind(cell: Cell, intervals: bool) -> str:
    """Return the text after a number: its interval, its change, and the mark of a significant change."""
    suffix = f" [{as_printed(cell, 0)}, {as_printed(cell, 1)}]" if intervals and cell.interval else ""
    suffix += f" ({cell.change})" if cell.change else ""
    return suffix + (SIGNIFICANT if cell.is_significant else "")


def as_printed(cell: Cell, end: int) -> str:
    """An end of a cell's interval with as many decimals as the number has, at most two."""
    assert cell.interval is not None
    decimals = len(cell.number.partition(".")[2]) if "e" not in cell.number else None
    return f"{cell.interval[end]:.3g}" if decimals is None else f"{cell.interval[end]:.{min(decimals, 2)}f}"


def pipes(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of cells that are Markdown themselves (see `markdown_text`)."""
    rows = [header, ["-" * max(3, len(name)) for name in header], *lines]
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in rows)


def to_csv(report: Report) -> str:
    """Return all rows as one CSV: the tables' columns and cells, then what they were made from, unrounded.

    `low` and `high` are 95 % intervals: of the number, and of its difference to the merge without AIM.
    """
    numbers = [*report.columns, HV]
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n").writerow
    extra = ["Population", "Omega", "Checkpoint", "Published", *(f"{name} (unrounded)" for name in numbers)]
    statistics = ("low", "high", "change low", "change high", "significant")
    heads = [
        "Method",
        "Model(s)",
        "AIM",
        *numbers,
        *extra,
        *(f"{name} ({what})" for name in numbers for what in statistics),
    ]
    write([csv_text(head) for head in heads])
    for line in report.lines:
        omega = "" if line.row.lineage.omega is None else f"{line.row.lineage.omega:g}"
        values = ["" if cell.value is None else repr(float(cell.value)) for cell in line.cells]
        published = "yes" if line.row.published else "no"
        cells = [csv_text(line.method), csv_text(line.label), line.aim, *(cell.text for cell in line.cells)]
        population = csv_text("; ".join(line.population or ()))
        record = [population, omega, csv_text(line.row.model), published, *values]
        write([*cells, *record, *(text for cell in line.cells for text in _statistics(cell))])
    return out.getvalue()


def _statistics(cell: Cell) -> list[str]:
    ends = [f"{end:.6g}" for bounds in (cell.interval, cell.change_interval) for end in bounds or ()]
    ends = ends if len(ends) == 4 else [*(ends if cell.interval else ["", ""]), "", ""]
    return [*ends, "" if cell.is_significant is None else "yes" if cell.is_significant else "no"]
