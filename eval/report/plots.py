"""Pareto fronts and omega curves, for the screen and for print: each kind differs by shape as well as by color."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.figures import DPI, KINDS, WIDTH, Marker, in_style, legend_rows, method_looks, write_figure
from common.markup import figure_text
from eval.report.fronts import DASHES, GAINED, LOST, SOURCE, WITH, WITHOUT, draw_pair, is_base, marker_size, variants
from eval.report.labels import place
from eval.results.rows import MergeGroup, Models, Row, Warn
from eval.stats.gains import HV
from eval.stats.significance import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

STANDARD = ("png", "svg")
"""Formats that are written where none is named."""


def plot_pareto(models: Models, pairs: Sequence[tuple[str, str]], warn: Warn) -> Figure:
    """Draw one panel for each pair of benchmarks: source models, merges, an arrow from each merge to its AIM rows.

    A front is that of the source models together with the merges, once without AIM, and once with it or once for each
    omega where a merge was relaxed at several; the area that AIM adds or takes away is tinted where there is one. A
    single panel also names the merges on the fronts. `warn` receives labels left out.
    """
    from matplotlib.figure import Figure

    single = len(pairs) == 1
    with in_style():
        columns = min(3, len(pairs))
        rows = math.ceil(len(pairs) / columns)
        markers = {method: marker for method, (marker, _) in method_looks(f.method for f in models.families).items()}
        kinds, methods = _kind_handles(models), _method_handles(markers)
        height = 4.2 if single else {1: 3.4, 2: 2.4}.get(columns, 1.95) * rows
        height += legend_rows(kinds, 3) + legend_rows(methods, 3) + 0.1
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        panels = [draw_pair(ax, models, x, y, markers, single) for ax, (x, y) in zip(axes, pairs, strict=False)]
        for ax in axes[len(pairs) :]:
            ax.set_axis_off()
        options: dict[str, Any] = {"handletextpad": 0.4, "columnspacing": 1.2, "labelspacing": 0.35, "ncols": 3}
        figure.legend(handles=kinds, loc="outside upper center", **options)
        if methods:
            figure.legend(handles=methods, loc="outside lower center", **options)
        figure.draw_without_rendering()  # fixes the layout, so that labels are placed where the points will be
        figure.set_layout_engine("none")
        for ax, panel in zip(axes, panels, strict=False):
            left_out = place(ax, panel.labels, panel.markers, panel.lines, 20 if single else 11, 3.2 if single else 2.6)
            if left_out:
                warn(f"{ax.get_ylabel()} over {ax.get_xlabel()}: no room for {left_out} of the labels.")
    return figure


def _kind_handles(models: Models) -> list[Line2D | Patch]:
    """Entries of the legend for kinds of models and fronts."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def dot(marker: Marker, fill: str, edge: str, label: str) -> Line2D:
        return Line2D([], [], marker=marker, ls="", ms=5, mfc=fill, mec=edge, mew=0.9, label=label)

    handles: list[Line2D | Patch] = []
    if any(not is_base(r, models) for r in models.sources):
        handles.append(dot("s", SOURCE, SOURCE, "fine-tuned model"))
    if any(is_base(r, models) for r in models.sources):
        handles.append(dot("s", "white", SOURCE, "base"))
    if any(family.unrelaxed for family in models.families):
        handles.append(dot("o", "white", WITHOUT, "merge without AIM"))
        handles.append(Line2D([], [], color=WITHOUT, lw=1.1, ls=DASHES, label="front without AIM"))
    sets = variants(models)
    if len(sets) == 1:
        handles.append(dot("o", WITH, WITH, "merge with AIM"))
        handles.append(Line2D([], [], color=WITH, lw=1.5, label="front with AIM"))
        handles += [Patch(**GAINED, label="gained by AIM"), Patch(**LOST, label="lost by AIM")]
    else:
        for variant in sets:
            look: dict[str, Any] = {"marker": "o", "ms": 4.5, "mfc": variant.color, "mec": variant.color}
            handles.append(Line2D([], [], color=variant.color, lw=1.1, label=f"front with {variant.label}", **look))
    return handles


def _method_handles(markers: Mapping[str, Marker]) -> list[Line2D]:
    from matplotlib.lines import Line2D

    gray = "#6e6e6e"
    return [
        Line2D([], [], marker=m, ls="", ms=marker_size(m) + 0.5, mfc=gray, mec=gray, label=figure_text(method, 26))
        for method, m in markers.items()
    ]


def plot_omega_curves(
    models: Models, gains: Mapping[str, float], intervals: Mapping[tuple[str, str], Interval] | None = None
) -> Figure:
    """Draw HV gain and each score against omega, a block of panels for each set of merged models.

    Only families with at least two omegas are drawn; their merge without AIM stands at omega 1, where AIM changes
    nothing, as a hollow point.

    Args:
        models: The rows.
        gains: HV gain by row (its key), from `eval.stats.gains.all_gains`.
        intervals: 95 % intervals by (key of a row, column), from `eval.stats.uncertainty`; drawn as bands.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    families = curved(models)
    sets = list(dict.fromkeys(family.label for family in families))
    quantities = [HV, *models.columns]
    with in_style():
        looks = method_looks(f.method for f in models.families)
        methods = dict.fromkeys(family.method for family in families)
        handles: list[Any] = [
            Line2D([], [], color=looks[m][1], marker=looks[m][0], ms=4, lw=1.1, label=figure_text(m)) for m in methods
        ]
        hollow: dict[str, Any] = {"ls": "", "marker": "o", "mfc": "white", "mec": "#6e6e6e", "ms": 4}
        handles.append(Line2D([], [], label="without AIM (omega 1)", **hollow))
        if intervals:
            handles.append(Patch(facecolor="#6e6e6e40", label="95 % interval"))
        columns = min(3, len(quantities))
        rows = math.ceil(len(quantities) / columns)
        height = len(sets) * (1.55 * rows + 0.3) + legend_rows(handles, 3) + 0.1
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        blocks = figure.subfigures(len(sets), 1, squeeze=False).flatten()
        for block, label in zip(blocks, sets, strict=True):
            block.suptitle(figure_text(label, 70), fontsize=8, fontweight="bold")
            axes = block.subplots(rows, columns, squeeze=False, sharex=True).flatten()
            for ax, quantity in zip(axes, quantities, strict=False):
                for family in (f for f in families if f.label == label):
                    _draw_curve(ax, family, quantity, gains, intervals or {}, looks[family.method])
                ax.set_xlim(-0.04, 1.04)
                ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
                ax.set_title(figure_text(models.unit(quantity)))
            for ax in axes[len(quantities) :]:
                ax.set_axis_off()
            for ax in axes[max(0, len(quantities) - columns) : len(quantities)]:
                ax.set_xlabel("omega")
                ax.tick_params(labelbottom=True)
        figure.legend(handles=handles, loc="outside upper center", ncols=3, columnspacing=1.2, labelspacing=0.35)
    return figure


def _draw_curve(
    ax: Axes,
    family: MergeGroup,
    quantity: str,
    gains: Mapping[str, float],
    intervals: Mapping[tuple[str, str], Interval],
    look: tuple[Marker, str],
) -> None:
    """Draw one family in one panel: its curve, the band of its intervals, the merge at omega 1 as a hollow point."""
    marker, color = look
    rows = _curve(family, quantity, gains)
    if not rows:
        return
    points = [(omega, value) for omega, value, _ in rows]
    ends = [intervals.get((row.key, quantity)) for _, _, row in rows]
    style: dict[str, Any] = {"color": color, "marker": marker, "ms": marker_size(marker) - 0.5, "lw": 1.1, "mew": 0.9}
    banded = [(omega, end) for (omega, _), end in zip(points, ends, strict=True) if end is not None]
    if banded:
        xs = [omega for omega, _ in banded]
        ax.fill_between(xs, [e[0] for _, e in banded], [e[1] for _, e in banded], color=color, alpha=0.15, lw=0)
    ax.plot(*zip(*points, strict=True), **style)
    if family.unrelaxed and rows[-1][2] is family.unrelaxed:
        ax.plot(*points[-1], **{**style, "mfc": "white", "zorder": 3})


def curved(models: Models) -> list[MergeGroup]:
    """Return the families that have a curve: AIM rows at two omegas or more."""
    return [f for f in models.families if len({row.lineage.omega for row in f.relaxed}) > 1]


def _curve(family: MergeGroup, quantity: str, gains: Mapping[str, float]) -> list[tuple[float, float, Row]]:
    """(omega, value, row) by rising omega, with the merge itself at omega 1."""
    points: dict[float, tuple[float, float, Row]] = {}
    for row in family.curve:
        omega = 1.0 if row is family.unrelaxed else row.lineage.omega
        value = gains.get(row.key) if quantity == HV else row.scores.get(quantity)
        if omega is not None and value is not None:
            points.setdefault(omega, (omega, value, row))
    return [points[omega] for omega in sorted(points)]


def save(figure: Figure, out: Path) -> list[Path]:
    """Write a figure and return its files, each written in one step.

    `out` with the ending of a format (.png, .svg, .pdf) is that file, otherwise the stem of a .png and an .svg file.
    """
    files = [out] if out.suffix[1:].lower() in KINDS else [out.with_name(f"{out.name}.{kind}") for kind in STANDARD]
    for path in files:
        write_figure(figure, path)
    return files
