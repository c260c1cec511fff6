"""Tables and plots of the measurements of scripts/benchmarks/bench_growth.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import FailureError
from common.figures import DPI, WIDTH, in_style, method_looks
from common.files.json_values import JsonObject
from common.files.paths import read_json
from common.markup import markdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = JsonObject
"""One command: axis, x, method, shape, models, processes, cached, amounts in bytes, and its cost."""
AXES = {
    "size": "billion parameters", "cold": "billion parameters, from the disk", "models": "fine-tuned models",
    "density": "density", "block": "entries of a block", "ranks": "processes",
}  # fmt: skip
"""What is varied, and what stands below it."""
METHODS = ("task_arithmetic", "ties")
"""What is merged by."""
STRAIGHT = ("size", "cold", "models")
"""Axes along which time should be a straight line."""


def read_growth(file: Path) -> JsonObject:
    """Read the results. Raises CheckpointError or FailureError for a file that is something else."""
    report = read_json(file, f"{file} does not exist; scripts/benchmarks/bench_growth.py writes it.")
    if not isinstance(report.get("points"), list) or "machine" not in report:
        raise FailureError(f"{file} holds no results of scripts/benchmarks/bench_growth.py.")
    return report


def document(file: Path) -> str:
    """Return the results as they stand in docs/scale.md."""
    report = read_growth(file)
    about = report["machine"]
    return f"{about['processor']}, {about['cores']} cores, {about['date']}:\n\n{as_text(report)}"


def as_text(report: JsonObject) -> str:
    """Return a table for each axis, and below it the straight lines through its points."""
    parts = []
    for axis, points in by_axis(report["points"]).items():
        parts.append(_table(axis, points))
        if axis in STRAIGHT:
            lines = [_line(method, series) for method, series in by_method(points).items()]
            parts += [line for line in lines if line]
    parts += [f"Left out: {reason}" for reason in report.get("skipped", [])]
    return "\n\n".join(parts)


def by_axis(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Return the points of each axis that has some, in the order of AXES, and of x."""
    chosen = {axis: [point for point in points if point["axis"] == axis] for axis in AXES}
    return {axis: sorted(some, key=lambda point: point["x"]) for axis, some in chosen.items() if some}


def by_method(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Return the points of each method."""
    methods = dict.fromkeys(point["method"] for point in points)
    return {method: [point for point in points if point["method"] == method] for method in methods}


def fitted(points: Sequence[Point]) -> tuple[float, float, float] | None:
    """Return slope, intercept and R² of the straight line through the seconds; None for fewer than three points.

    Points whose inputs the page cache holds, and points whose inputs it cannot hold, lie on different lines: those
    unlike the first are left out.
    """
    alike = [point for point in points if point["cached"] == points[0]["cached"]]
    if len(alike) < 3:
        return None
    x, y = [float(point["x"]) for point in alike], [point["cost"]["wall"] for point in alike]
    slope, intercept = statistics.linear_regression(x, y)
    constant = min(y) == max(y)
    return slope, intercept, 1.0 if constant else statistics.correlation(x, y) ** 2


def _line(method: str, points: Sequence[Point]) -> str | None:
    line = fitted(points)
    if line is None:
        return None
    slope, intercept, r2 = line
    each = "each model" if points[0]["axis"] == "models" else "each billion parameters"
    return f"{method}: {intercept:.2f} s and {slope:.2f} s for {each}, R² {r2:.4f}."


def _table(axis: str, points: Sequence[Point]) -> str:
    heads = [AXES[axis], "method", "s", "least to most", "peak MiB"]
    rows = []
    for point in points:
        cost = point["cost"]
        spread = f"{cost['least']:.1f} to {cost['most']:.1f}" if cost["runs"] > 1 else "once"
        x = f"{point['x']:.3g}" if axis != "block" else f"{point['x'] >> 10}k"
        note = " (not cached)" if axis == "size" and not point["cached"] else ""
        row = [f"{x}{note}", point["method"], f"{cost['wall']:.1f}", spread, f"{cost['anonymous_mib']:.0f}"]
        rows.append(row)
    return markdown(heads, rows, text_columns=2)


def plots(report: JsonObject) -> dict[str, Figure]:
    """Draw a figure for each axis: seconds on the left, peak memory on the right.

    Lines are fits where time should be a straight line, else they join the points.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figures = {}
    for axis, points in by_axis(report["points"]).items():
        with in_style():
            figure = Figure(figsize=(WIDTH, 2.6), dpi=DPI, layout="constrained")
            time_axes, memory_axes = figure.subplots(1, 2)
            for method, series in by_method(points).items():
                _draw(time_axes, memory_axes, method, series)
            for ax in (time_axes, memory_axes):
                if axis == "block":
                    ax.set_xscale("log", base=2)
                    ax.xaxis.set_major_formatter(FuncFormatter(lambda entries, _: f"{int(entries) >> 10}k"))
                if axis in ("models", "ranks"):
                    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
                ax.set_ylim(0, 1.1 * ax.dataLim.y1)
                ax.set_xlabel(AXES[axis])
            time_axes.set_ylabel("seconds")
            memory_axes.set_ylabel("peak anonymous memory (MiB)")
            handles, labels = time_axes.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=4)
        figures[axis] = figure
    return figures


def _draw(time_axes: Axes, memory_axes: Axes, label: str, points: Sequence[Point]) -> None:
    """Draw one method along one axis, in its color and with its marker."""
    marker, color = method_looks([label])[label]
    look: dict[str, Any] = {"color": color, "marker": marker, "ms": 4}
    x, wall = [point["x"] for point in points], [point["cost"]["wall"] for point in points]
    errors = [[p["cost"]["wall"] - p["cost"]["least"] for p in points],
              [p["cost"]["most"] - p["cost"]["wall"] for p in points]]  # fmt: skip
    line = fitted(points) if points[0]["axis"] in STRAIGHT else None
    time_axes.errorbar(x, wall, yerr=errors, ls="none" if line else "-", lw=1.0, elinewidth=0.8, label=label, **look)
    if line is not None:
        ends = [min(x), max(x)]
        time_axes.plot(ends, [line[1] + line[0] * end for end in ends], lw=1.0, color=color)
    memory_axes.plot(x, [point["cost"]["anonymous_mib"] for point in points], lw=1.0, **look)
