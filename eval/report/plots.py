"""Pareto fronts and omega curves, for the screen and for print: each kind differs by shape as well as by colour."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console.figures import COLOURS, KINDS, MARKERS, in_style, write_figure
from eval.report.fronts import DASHES, GAINED, LOST, SOURCE, WITH, WITHOUT, Point, draw_pair, is_base
from eval.report.labels import place
from eval.results.rows import Family, Models, Remark

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_pareto(models: Models, pairs: Sequence[tuple[str, str]], remark: Remark) -> Figure:
    """Draw one panel for each pair of benchmarks: source models, merges, an arrow from each merge to its AIM rows.

    A front is that of the source models together with the merges, once without and once with AIM; the area that AIM
    adds or takes away is tinted. A single panel also names the merges on the fronts. `remark` hears of labels left out.
    """
    from matplotlib.figure import Figure

    with in_style():
        columns = min(3, len(pairs))
        rows = math.ceil(len(pairs) / columns)
        size = (6.4, 5.2) if len(pairs) == 1 else (2.75 * columns, 2.45 * rows + 0.85)
        figure = Figure(figsize=size, dpi=200, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        markers = _markers(models)
        panels = [
            draw_pair(ax, models, x, y, markers, len(pairs) == 1) for ax, (x, y) in zip(axes, pairs, strict=False)
        ]
        for ax in axes[len(pairs) :]:
            ax.set_axis_off()
        _legend(figure, models, markers, narrow=len(pairs) < 3)
        figure.draw_without_rendering()  # fixes the layout, so that labels are placed where the points will be
        figure.set_layout_engine("none")
        for ax, panel in zip(axes, panels, strict=False):
            left_out = place(ax, panel.labels, panel.markers, panel.lines)
            if left_out:
                remark(f"{ax.get_ylabel()} over {ax.get_xlabel()}: no room for {left_out} of the labels.")
    return figure


def _markers(models: Models) -> dict[str, str]:
    methods = dict.fromkeys(family.method for family in models.families)
    return dict(zip(methods, itertools.cycle(MARKERS), strict=False))


def _legend(figure: Figure, models: Models, markers: Mapping[str, str], narrow: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def dot(marker: str, fill: str, edge: str, label: str) -> Line2D:
        return Line2D([], [], marker=marker, ls="", ms=5, mfc=fill, mec=edge, mew=0.9, label=label)

    plain = any(family.twin for family in models.families)
    relaxed = any(family.relaxed for family in models.families)
    blank = Line2D([], [], ls="", label=" ")
    dashes = Line2D([], [], color=WITHOUT, lw=1.1, ls=DASHES, label="front without AIM")
    columns: list[list[Any]] = [
        [
            dot("s", SOURCE, SOURCE, "fine-tuned model")
            if any(not is_base(r, models) for r in models.sources)
            else blank,
            dot("s", "white", SOURCE, "base") if any(is_base(r, models) for r in models.sources) else blank,
        ]
    ]
    if plain:
        columns.append([dot("o", "white", WITHOUT, "merge without AIM"), dashes])
    if relaxed:
        front = Line2D([], [], color=WITH, lw=1.5, label="front with AIM")
        columns.append([dot("o", WITH, WITH, "merge with AIM"), front])
        columns.append([Patch(**GAINED, label="gained by AIM"), Patch(**LOST, label="lost by AIM")])
    methods = [dot(marker, "#8c8c8c", "#8c8c8c", method) for method, marker in markers.items()]
    options: dict[str, Any] = {"fontsize": 7.5, "handletextpad": 0.4, "columnspacing": 1.4}
    kinds = [handle for column in columns for handle in column]
    figure.legend(handles=kinds, ncols=len(columns), loc="outside upper center", **options)
    if methods:
        figure.legend(handles=methods, ncols=3 if narrow else 6, loc="outside lower center", **options)


def plot_omega_curves(models: Models, gains: Mapping[str, float]) -> Figure:
    """Draw HV gain and each score against omega, a row of panels for each set of merged models.

    Only families with at least two omegas are drawn; their merge without AIM stands at omega 1, where AIM changes
    nothing, as a hollow point. `gains`: HV gain by row, from `eval.stats.gains.all_gains`.
    """
    from matplotlib.figure import Figure

    families = curved(models)
    sets = list(dict.fromkeys(family.label for family in families))
    quantities = ["HV Gain", *models.columns]
    with in_style():
        markers = _markers(models)
        colours = dict(zip(markers, itertools.cycle(COLOURS), strict=False))
        columns = min(4, len(quantities)) if len(sets) == 1 else len(quantities)
        rows = math.ceil(len(quantities) / columns) if len(sets) == 1 else len(sets)
        figure = Figure(figsize=(1.95 * columns + 0.4, 1.75 * rows + 0.7), dpi=200, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
        panels = [(s, q) for s in sets for q in quantities]
        for ax, (label, quantity) in zip(axes.flatten(), panels, strict=False):
            for family in (f for f in families if f.label == label):
                curve = _curve(family, quantity, gains)
                style = {
                    "color": colours[family.method],
                    "marker": markers[family.method],
                    "ms": 4,
                    "lw": 1.1,
                    "mew": 0.9,
                }
                ax.plot(*zip(*curve, strict=True), **style) if curve else None
                if family.twin and curve and curve[-1][0] == 1.0:
                    ax.plot(*curve[-1], **{**style, "mfc": "white", "zorder": 3})
            ax.set_xlim(-0.04, 1.04)
            ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
            ax.set_title(quantity if quantity == "HV Gain" else f"{quantity} (%)", fontsize=8)
            if quantity == "HV Gain":
                ax.set_ylabel(label.replace(" + ", " +\n"), fontsize=7.5, fontweight="bold")
        for ax in axes.flatten()[len(panels) :]:
            ax.set_axis_off()
        for ax in axes[-1]:
            ax.set_xlabel("omega")
        from matplotlib.lines import Line2D

        shown = dict.fromkeys(family.method for family in families)
        handles = [Line2D([], [], color=colours[m], marker=markers[m], ms=4, lw=1.1, label=m) for m in shown]
        handles.append(
            Line2D([], [], ls="", marker="o", mfc="white", mec="#8c8c8c", ms=4, label="without AIM (omega 1)")
        )
        figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=7.5)
    return figure


def curved(models: Models) -> list[Family]:
    """The families that have a curve: AIM rows at two omegas or more."""
    return [f for f in models.families if len({row.lineage.omega for row in f.relaxed}) > 1]


def _curve(family: Family, quantity: str, gains: Mapping[str, float]) -> list[Point]:
    """(omega, value) by rising omega, with the merge itself at omega 1."""
    points: dict[float, float] = {}
    for row in family.rows:
        omega = 1.0 if row is family.twin else row.lineage.omega
        value = gains.get(row.key) if quantity == "HV Gain" else row.scores.get(quantity)
        if omega is not None and value is not None:
            points.setdefault(omega, value)
    return sorted(points.items())


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg, each in one step; return their paths."""
    written = [stem.with_name(f"{stem.name}.{kind}") for kind in KINDS]
    for path in written:
        write_figure(figure, path)
    return written
