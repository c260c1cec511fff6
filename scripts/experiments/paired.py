"""Paired differences over replicates: each relaxation against its merge, and AIM against each of its controls."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from common.figures import COLORS, DPI, WIDTH, in_style, legend_rows, write_figure
from common.files.paths import write_whole
from common.markup import markdown
from eval.stats.gains import HV
from scripts.experiments.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
AIM = "AIM"
ALL = "all methods"
QUANTITIES = ("mean", HV)
LEAST_REPLICATES = 3
MINUS_MERGE = " minus merge"
LEGEND_COLUMNS = 4


@dataclass(frozen=True)
class Difference:
    """Mean of a paired difference over replicates with its 95 % interval (Student's t over replicates).

    Each replicate counts once, with the mean over its merges.
    """

    what: str
    method: str
    omega: float
    quantity: str
    replicates: int
    value: float
    low: float
    high: float

    @property
    def is_significant(self) -> bool:
        """True where the interval excludes 0."""
        return self.low > 0 or self.high < 0


def differences(rows: Sequence[Row], varied: Sequence[str] = ()) -> list[Difference]:
    """Return every relaxation minus its merge, and AIM minus every other relaxation, per method, omega and quantity.

    varied: the parameters of methods in which merges differ.
    """

    def merge_key(row: Row) -> tuple[object, ...]:
        return tuple(row.get(key) for key in ("replicate", "method", "models", *varied))

    merges = {merge_key(row): row for row in rows if row.get("method") and not row.get("relaxation")}
    relaxed = [row for row in rows if row.get("relaxation")]
    aim = {(*merge_key(row), row["omega"]): row for row in relaxed if row["relaxation"] == AIM}
    pairs: dict[tuple[str, float], list[tuple[Row, Row]]] = {}
    for row in relaxed:
        merge = merges.get(merge_key(row))
        if merge is not None:
            pairs.setdefault((f"{_label(row)} minus merge", row["omega"]), []).append((row, merge))
        other = aim.get((*merge_key(row), row["omega"]))
        if other is not None and _label(row) != AIM:
            pairs.setdefault((f"AIM minus {_label(row)}", row["omega"]), []).append((other, row))
    result = []
    for (what, omega), couples in pairs.items():
        methods = sorted({str(row["method"]) for row, _ in couples})
        for method in [ALL, *(methods if len(methods) > 1 else [])]:
            chosen = [c for c in couples if method in (ALL, c[0]["method"])]
            for quantity in QUANTITIES:
                difference = _difference(what, method, omega, quantity, chosen)
                if difference is not None:
                    result.append(difference)
    return result


def _label(row: Row) -> str:
    """The relaxation, with the calibration where that varies."""
    varied = [f"{key.removeprefix('calibration.')}={row[key]}" for key in sorted(row) if key.startswith("calibration.")]
    return " ".join([str(row["relaxation"]), *varied])


def _difference(
    what: str, method: str, omega: float, quantity: str, couples: Iterable[tuple[Row, Row]]
) -> Difference | None:
    by_replicate: dict[str, list[float]] = {}
    for one, other in couples:
        if quantity in one and quantity in other:
            by_replicate.setdefault(str(one["replicate"]), []).append(one[quantity] - other[quantity])
    values = [mean(v) for v in by_replicate.values()]
    if not values:
        return None
    center, half = mean(values), interval_half(values)
    return Difference(what, method, omega, quantity, len(values), center, center - half, center + half)


def interval_half(values: Sequence[float]) -> float:
    """Return half the width of the 95 % t interval of a mean; infinite for one value."""
    if len(values) < 2:
        return math.inf
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def write_summary(plan: Plan, rows: Sequence[Row], out: Path) -> list[Path]:
    """Write summary.md, differences.json and curves.png where there are replicates enough for intervals."""
    varied = tuple(dict.fromkeys(key for method in plan.experiment.methods for key in method.varied))
    pairs = differences(rows, varied)
    if not pairs or max(d.replicates for d in pairs) < LEAST_REPLICATES:
        return []
    write_whole(out / "differences.json", (json.dumps([vars(d) for d in pairs], indent=0) + "\n").encode())
    write_whole(out / "summary.md", summary(plan, pairs).encode())
    write_figure(curves(pairs), out / "curves.png")
    return [out / "summary.md", out / "curves.png"]


def summary(plan: Plan, pairs: Sequence[Difference]) -> str:
    """Return the differences as Markdown: over all methods first, then per method."""
    parts = [
        f"# {plan.experiment.title}",
        "Paired differences: mean over replicates, 95 % interval (Student's t over replicates, each with the mean over "
        "its merges). **Bold** where the interval excludes 0. No correction for the number of rows.",
    ]
    for quantity in QUANTITIES:
        unit = "percentage points of the mean score" if quantity == "mean" else "HV gain"
        chosen = [d for d in pairs if d.quantity == quantity]
        for method in dict.fromkeys([ALL, *(d.method for d in chosen)]):
            lines = [d for d in chosen if d.method == method]
            table = [
                [
                    d.what,
                    f"{d.omega:g}",
                    str(d.replicates),
                    _bold(f"{d.value:+.3f}", d),
                    f"{d.low:+.3f} to {d.high:+.3f}",
                ]
                for d in sorted(lines, key=lambda d: (d.what, d.omega))
            ]
            heads = ["difference", "omega", "replicates", unit, "95 % interval"]
            if table:
                parts.append(f"## {unit}, {method}\n\n{markdown(heads, table)}")
    return "\n\n".join(parts) + "\n"


def _bold(text: str, d: Difference) -> str:
    return f"**{text}**" if d.is_significant else text


def curves(pairs: Sequence[Difference]) -> Figure:
    """Draw the differences over omega, with their intervals over replicates.

    A row of panels for AIM and its variants and one for AIM and its controls, each minus the merge; then one for AIM
    minus each control.
    """
    from matplotlib.figure import Figure

    chosen = [d for d in pairs if d.method == ALL]
    names = [d.what.removesuffix(MINUS_MERGE) for d in chosen if d.what.endswith(MINUS_MERGE)]
    variants = list(dict.fromkeys(name for name in names if name.startswith(AIM)))
    controls = list(dict.fromkeys(name for name in names if not name.startswith(AIM)))
    # Each row of panels: its y labels, and the color and the difference of each line.
    changes = ("change of the mean score (points)", "change of the HV gain")
    rows = [(changes, {name: (at, name + MINUS_MERGE) for at, name in enumerate(variants)})]
    if controls:
        of_controls = {name: (at, name + MINUS_MERGE) for at, name in enumerate([AIM, *controls])}
        aim_minus = {name: (at, f"{AIM} minus {name}") for at, name in enumerate(controls, start=1)}
        rows = [*(rows if len(variants) > 1 else []), (changes, of_controls)]
        rows.append((("AIM minus control: mean score (points)", "AIM minus control: HV gain"), aim_minus))
    with in_style():
        height = sum(2.2 + legend_rows(list(lines), LEGEND_COLUMNS) for _, lines in rows) + 0.2
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
        for part, (y_labels, lines) in zip(parts, rows, strict=True):
            axes = part.subplots(1, len(QUANTITIES), squeeze=False)[0]
            for ax, quantity, y_label in zip(axes, QUANTITIES, y_labels, strict=True):
                _draw_panel(ax, lines, [d for d in chosen if d.quantity == quantity])
                ax.set_xlabel("ω")
                ax.set_ylabel(y_label)
            part.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=LEGEND_COLUMNS)
    return figure


def _draw_panel(ax: Axes, lines: Mapping[str, tuple[int, str]], differences_of_panel: Sequence[Difference]) -> None:
    """Draw a line for each difference, its intervals next to those of the others."""
    for place, (label, (color, what)) in enumerate(lines.items()):
        points = sorted((d for d in differences_of_panel if d.what == what), key=lambda d: d.omega)
        shift = 0.014 * (place - (len(lines) - 1) / 2)
        ax.errorbar(
            [d.omega + shift for d in points], [d.value for d in points], [d.high - d.value for d in points],
            label=label, color=COLORS[color % len(COLORS)], lw=1.6 if label == AIM else 0.8, marker="o",
            ms=3.5 if label == AIM else 2.5, ls="-" if color < len(COLORS) else "--", elinewidth=0.6,
        )  # fmt: skip
    ax.axhline(0, color="#6e6e6e", lw=0.8)
