"""A summary of importance as a figure: each figure over the layers, a line for each kind of module."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aim.summary import Row, Summary
from console.figures import COLOURS, MARKERS, in_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {
    "top_share": "share of the top 1 % of channels",
    "maximum": "largest activation",
    "entropy": "entropy (1: channels alike)",
    "stability": "stability (two halves)",
}


def plot_summary(found: Summary, title: str) -> Figure:
    """Draw a panel for each figure. Modules outside of layers (the last norm, the head) stand behind the last layer."""
    from matplotlib.figure import Figure

    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in found.rows:
        kinds.setdefault((row.stack, row.kind), []).append(row)
    stacks = len({row.stack for row in found.rows if row.stack})
    layers = [row.layer for row in found.rows if row.layer is not None]
    behind = max(layers, default=0) + max(1, round(0.04 * len(set(layers))))
    with in_style():
        figure = Figure(figsize=(7.2, 5.4), dpi=200, layout="constrained")
        figure.suptitle(title, fontsize=9)
        axes = figure.subplots(2, 2, sharex=True).flatten()
        looks = zip(itertools.cycle(MARKERS), itertools.cycle(COLOURS), strict=False)
        handles = []
        for ((stack, kind), rows), (marker, colour) in zip(kinds.items(), looks, strict=False):
            label = f"{stack}{kind}" if stacks > 1 and stack else kind
            look: dict[str, Any] = {"marker": marker, "color": colour, "ms": 3.5, "lw": 1.0, "label": label}
            lines = [_draw(ax, name, rows, behind, look) for ax, name in zip(axes, PANELS, strict=True)]
            handles.append(lines[0])
        for ax, (name, label) in zip(axes, PANELS.items(), strict=True):
            _finish(ax, name, label, layers, behind, found.rows)
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=7)
    return figure


def _draw(ax: Any, name: str, rows: Sequence[Row], behind: int, look: dict[str, Any]) -> Any:
    """One kind's line in one panel; layers where the figure is not defined are gaps."""
    points = sorted((behind if row.layer is None else row.layer, getattr(row, name)) for row in rows)
    x = [place for place, _ in points]
    y = [float("nan") if value is None else value for _, value in points]
    return ax.plot(x, y, **look)[0]


def _finish(ax: Any, name: str, label: str, layers: Sequence[int], behind: int, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.set_title(label, fontsize=8)
    if name == "maximum":
        ax.set_yscale("log")
    if name == "top_share":
        ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        ax.set_ylim(bottom=0)
    ticks = [int(t) for t in MaxNLocator(6, integer=True).tick_values(0, max(layers, default=0)) if t in layers]
    outside = any(row.layer is None for row in rows)
    ax.set_xticks([*ticks, *([behind] if outside else [])], [*map(str, ticks), *(["after"] if outside else [])])
    if ax.get_subplotspec().is_last_row():
        ax.set_xlabel("layer")
