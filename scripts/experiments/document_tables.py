"""Tables of an experiment's collected results for the documents: differences to AIM, per method and per recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from common.markup import markdown
from eval.stats.gains import HV
from scripts.experiments.paired import AIM, ALL, MINUS_MERGE, Difference, Row, curves, differences
from scripts.experiments.results import read_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OMEGA = 0.4
"""The paper's omega, at which methods and recipes are compared."""
UNITS = {"mean": "mean score, percentage points", HV: "HV gain"}
MERGE = f"{AIM}{MINUS_MERGE}"


def curves_of_results(file: Path) -> Figure:
    """Draw the differences of collected results over omega."""
    return curves(differences(read_rows(file)))


def controls(file: Path) -> str:
    """Return the differences of AIM to its merge and its controls: per omega, per method and per recipe."""
    rows = read_rows(file)
    pairs = differences(rows)
    replicates = max(pair.replicates for pair in pairs)
    parts = [
        f"AIM minus each control, {replicates} families; mean over the families with the 95 % interval (Student's t). "
        "**Bold**: the interval excludes 0. The intervals are not corrected for their number."
    ]
    for quantity, unit in UNITS.items():
        chosen = [pair for pair in pairs if pair.quantity == quantity and pair.method == ALL]
        omegas = sorted({pair.omega for pair in chosen})
        parts.append(_table(f"{unit}, by omega", chosen, lambda pair: f"{pair.omega:g}", [f"{o:g}" for o in omegas]))
    at_omega = [pair for pair in pairs if pair.omega == OMEGA]
    methods = sorted({pair.method for pair in pairs} - {ALL})
    for quantity, unit in UNITS.items():
        chosen = [pair for pair in at_omega if pair.quantity == quantity and pair.method != ALL]
        parts.append(_table(f"{unit}, by method at omega {OMEGA:g}", chosen, lambda pair: pair.method, methods))
    parts.append(_by_recipe(rows))
    return "\n\n".join(parts)


def _table(
    title: str, pairs: Sequence[Difference], column_of: Callable[[Difference], str], columns: Sequence[str],
    first_row: Sequence[str] = (),
) -> str:  # fmt: skip
    """A row for each difference to AIM, the merge first; a column for each omega, method or recipe."""
    cells = {(pair.what, column_of(pair)): _cell(pair) for pair in pairs if pair.what.startswith(f"{AIM} minus")}
    names = [MERGE, *sorted({what for what, _ in cells} - {MERGE})]
    body = [[name, *(cells.get((name, column), "") for column in columns)] for name in names]
    return markdown([title, *columns], [first_row, *body] if first_row else body)


def _cell(pair: Difference) -> str:
    digits = 3 if pair.quantity == HV else 2
    text = f"{pair.value:+.{digits}f} ({pair.low:+.{digits}f} to {pair.high:+.{digits}f})"
    return f"**{text}**" if pair.is_significant else text


def _by_recipe(rows: Sequence[Row]) -> str:
    """Differences at the paper's omega for each training recipe, with the mean score of its merges."""
    keys = sorted({key for row in rows for key in row if key.startswith("family.")})
    recipes: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: [row[key] for key in keys]):
        label = ", ".join(f"{key.removeprefix('family.').removesuffix('_scale')} x{row[key]:g}" for key in keys)
        recipes.setdefault(label, []).append(row)
    pairs: list[Difference] = []
    scores = []
    for label, of_recipe in recipes.items():
        merges = [row["mean"] for row in of_recipe if row.get("method") and not row.get("relaxation")]
        scores.append(f"{mean(merges):.2f}")
        pairs += [
            replace(pair, method=label)
            for pair in differences(of_recipe)
            if pair.omega == OMEGA and pair.method == ALL and pair.quantity == "mean"
        ]
    title = f"mean score, percentage points, by fine-tuning at omega {OMEGA:g}"
    return _table(title, pairs, lambda pair: pair.method, list(recipes), ["mean score of the merges", *scores])
