"""A summary of importance as a figure: each figure over the layers, a line for each kind of module."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

from aim.report.summary import Row, Summary
from common.figures import COLORS, DPI, MARKERS, WIDTH, Marker, in_style, legend_rows
from common.markup import figure_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

PANELS = {
    "mean": "mean s = mean(a / max a)",
    "top_share": "share of the top 1 % of channels",
    "maximum": "largest activation",
    "entropy": "entropy (1: channels alike)",
    "stability": "stability (two halves)",
}


class Look(TypedDict):
    """Properties of a line, by matplotlib's names."""

    marker: Marker
    color: str
    ms: float
    lw: float
    label: str


def plot_summary(summary: Summary, title: str) -> Figure:
    """Draw a panel for each figure, the mean of s first, which sets how strongly a layer is relaxed.

    Modules outside of layers (the last norm, the head) stand behind the last layer.
    """
    from matplotlib.figure import Figure

    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in summary.rows:
        kinds.setdefault((row.stack, row.kind), []).append(row)
    stacks = len({row.stack for row in summary.rows if row.stack})
    layers = [row.layer for row in summary.rows if row.layer is not None]
    behind = max(layers, default=0) + max(1, round(0.04 * len(set(layers))))
    with in_style():
        names = [f"{stack}{kind}" if stacks > 1 and stack else kind for stack, kind in kinds]
        longest = max(map(len, names), default=1)
        columns = max(1, min(3, round(78 / (longest + 8))))
        figure = Figure(figsize=(WIDTH, 5.3 + legend_rows(names, columns)), dpi=DPI, layout="constrained")
        figure.suptitle(figure_text(title, 70))
        axes = figure.subplots(3, 2, sharex=True).flatten()
        axes[-1].set_axis_off()
        looks = zip(itertools.cycle(MARKERS), itertools.cycle(COLORS), strict=False)
        handles = []
        for label, rows, (marker, color) in zip(names, kinds.values(), looks, strict=False):
            look: Look = {"marker": marker, "color": color, "ms": 3.0, "lw": 1.0, "label": label}
            lines = [_draw(ax, name, rows, behind, look) for ax, name in zip(axes, PANELS, strict=False)]
            handles.append(lines[0])
        for ax, (name, label) in zip(axes, PANELS.items(), strict=False):
            _finish(ax, name, label, layers, behind, summary.rows)
        for ax in axes[len(PANELS) - 2 : len(PANELS)]:
            ax.set_xlabel("layer")
            ax.tick_params(labelbottom=True)
        figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    return figure


def _draw(ax: Axes, name: str, rows: Sequence[Row], behind: int, look: Look) -> Line2D:
    """One kind's line in one panel; layers where the figure is not defined are gaps."""
    points = sorted((behind if row.layer is None else row.layer, getattr(row, name)) for row in rows)
    x = [place for place, _ in points]
    y = [float("nan") if value is None else value for _, value in points]
    return ax.plot(x, y, **look)[0]


def _finish(ax: Axes, name: str, label: str, layers: Sequence[int], behind: int, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.set_title(label)
    if name == "maximum":
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if name == "mean":
        ax.set_ylim(0, 1.05 * max((row.mean for row in rows), default=1.0))
    if name == "top_share":
        ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        ax.set_ylim(bottom=0)
    ticks = [int(t) for t in MaxNLocator(6, integer=True).tick_values(0, max(layers, default=0)) if t in layers]
    outside = any(row.layer is None for row in rows)
    ax.set_xticks([*ticks, *([behind] if outside else [])], [*map(str, ticks), *(["after"] if outside else [])])
