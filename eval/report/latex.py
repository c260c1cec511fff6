r"""Tables as LaTeX: a document that compiles, and a part of another one by \input."""

from __future__ import annotations

import re

from common.markup import one_line
from eval.report.report import Cell, Line, Report, Table
from eval.report.tables import OVER, as_printed, over, shown_label
from eval.stats.gains import HV

_GREEK = (
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"),
    *("nu", "xi", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega"),
)
SPECIAL = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "[": "{[}",  # after a line end or a rule it would begin an argument
    "]": "{]}",
    "*": "{*}",
    "`": r"\textasciigrave{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    **{letter: rf"$\{name}$" for letter, name in zip("αβγδεζηθικλμνξπρστυφχψω", _GREEK, strict=True)},
    "–": "--",
    "—": "---",
    "−": "$-$",
    "∞": r"$\infty$",
}
HEAD = r"""% Compiles as it is; or \input it into a document that loads booktabs, graphicx and \usepackage[T1]{fontenc}.
% Labels in other scripts than Latin and Greek need LuaLaTeX or XeLaTeX and a font that has them.
\expandafter\ifx\csname @twoclasseserror\endcsname\documentclass
  \let\aimend\relax
\else
  \documentclass[a4paper]{article}
  \usepackage[T1]{fontenc}
  \IfFileExists{lmodern.sty}{\usepackage{lmodern}}{}
  \usepackage{booktabs,graphicx}
  \usepackage[margin=2cm]{geometry}
  \def\aimend{\end{document}}
  \begin{document}
\fi
"""
TAIL = "\\aimend\n"


def escaped(text: str) -> str:
    """Return text as LaTeX sets it, character by character; runs of hyphens and commas are no ligatures."""
    line = "".join(SPECIAL.get(character, character) for character in one_line(text))
    return re.sub(r"-(?=-)|,(?=,)", r"\g<0>{}", line)


def to_latex(report: Report, intervals: bool = False) -> str:
    """Return the notes, then one table environment for the source models and for each method.

    Populations have a column unless each is the models merged in the row, which the notes say.
    """
    tables = [*([report.sources] if report.sources else []), *report.methods]
    parts = [_table(report, table, intervals, sources=table is report.sources) for table in tables]
    notes = "\n\n".join(escaped(note) for note in report.note.split("\n\n") if note)
    small = [f"{{\\footnotesize\\noindent\n{notes}\\par}}"] if notes else []
    return HEAD + "\n" + "\n\n".join([*small, *parts]) + "\n\n" + TAIL


def _table(report: Report, table: Table, intervals: bool, sources: bool) -> str:
    own_population = all(
        line.population is None or set(line.population) == set(line.row.members) for line in report.lines
    )
    numbers = [*report.columns, *([] if sources else [HV] if own_population else [HV, OVER])]
    header = " & ".join(map(escaped, ["Model(s)", *([] if sources else ["AIM"]), *numbers]))
    rows, above = [], None
    for line in table.lines:
        label = shown_label(line, report)
        if above is not None and label != above and not sources:
            rows.append(r"\addlinespace")
        row = _row("" if label == above else label, line, intervals, sources)
        rows.append(" & ".join(row[: len(numbers) + (1 if sources else 2)]) + r" \\")
        above = label
    columns = (
        "l"
        + ("" if sources else "l")
        + "r" * len(report.columns)
        + ("" if sources else "r" if own_population else "rl")
    )
    name = re.sub(r"[^a-z0-9]+", "-", table.title.lower()).strip("-")
    same = [t for t in report.methods if re.sub(r"[^a-z0-9]+", "-", t.title.lower()).strip("-") == name]
    if len(same) > 1 or not name:  # two labels of one name would be an error
        name = f"{name}-{report.methods.index(table) + 1}" if table in report.methods else name
    lines = [
        r"\begin{table*}[htbp]",
        r"\centering\small\setlength{\tabcolsep}{3pt}",
        rf"\caption{{{escaped(table.title)}}}\label{{tab:aim-{name}}}\vspace{{4pt}}",
        rf"\resizebox{{\ifdim\width>\textwidth\textwidth\else\width\fi}}{{!}}{{\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        header + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table*}",
    ]
    return "\n".join(lines)


def _row(label: str, line: Line, intervals: bool, sources: bool) -> list[str]:
    cells = [_cell(cell, intervals) for cell in line.cells]
    ends = cells[:-1] if sources else [*cells, escaped(over(line))]
    return [escaped(label), *([] if sources else [escaped(line.aim)]), *ends]


def _cell(cell: Cell, intervals: bool) -> str:
    if cell.value is None:
        return "--"
    number = rf"\textbf{{{cell.number}}}" if cell.lead else escaped(cell.number)
    text = f" [{as_printed(cell, 0)}, {as_printed(cell, 1)}]" if intervals and cell.interval else ""
    text += f" ({cell.change})" if cell.change else ""
    behind = "".join(SPECIAL.get(c, c) for c in text.replace("-", "−").replace("inf", "∞"))
    return number + (rf"\,{{\tiny{behind}}}" if behind else "") + (escaped("†") if cell.is_significant else "")
