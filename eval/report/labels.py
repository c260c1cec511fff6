"""Labels of points in a plot, placed so that none hides another, a marker, or more of a line than it must.

CONTRIBUTING.md compares this with adjustText.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.figures import SMALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

Point = tuple[float, float]
Box = tuple[float, float, float, float]
DIRECTIONS = 24
DISTANCES = (0.0, 5.0, 12.0, 20.0, 30.0, 45.0, 65.0, 90.0)
"""Gaps tried between a marker and its label, in points of 1/72 inch; nearer ones first."""


@dataclass(frozen=True)
class Label:
    """Text at a point, in data coordinates."""

    text: str
    point: Point
    color: str
    bold: bool = False


def place(
    ax: Axes,
    labels: Sequence[Label],
    markers: Sequence[Point],
    lines: Sequence[Point],
    width: int = 20,
    radius: float = 3.2,
) -> int:
    """Write `labels` beside their points; `markers` and points along `lines` are in data coordinates, like the labels'.

    `width`: characters of a line, at which a label is broken between words; `radius`: of a marker, in points.

    The axes' layout must be final. Greedy, in the given order: of 24 directions and 8 distances the cheapest that
    touches no marker and no label and lies inside the axes. A label that fits nowhere is left out; returns how many.
    """
    scale = ax.figure.dpi / 72.0
    frame = ax.get_window_extent()
    inside: Box = (frame.x0, frame.y0, frame.x1, frame.y1)
    to_pixels = ax.transData.transform
    occupied = [_box_around(float(px), float(py), radius * scale, radius * scale) for px, py in map(to_pixels, markers)]
    dots = [(float(px), float(py)) for px, py in map(to_pixels, lines)]
    left_out = 0
    for label in labels:
        x, y = map(float, to_pixels(label.point))
        text = _write(ax, label, (0.0, 0.0), width, leader=False)
        extent = text.get_window_extent()
        text.remove()
        spot = _spot(x, y, extent.width, extent.height, scale, inside, occupied, dots)
        if spot is None:
            left_out += 1
            continue
        dx, dy, distance = spot
        _write(ax, label, (dx / scale, dy / scale), width, leader=distance >= 5.0)
        occupied.append(_box_around(x + dx, y + dy, extent.width / 2, extent.height / 2))
    return left_out


def _write(ax: Axes, label: Label, offset: tuple[float, float], width: int, leader: bool) -> Annotation:
    """Write a label with its centre `offset` (1/72 inch) from its point, with a thin line to it where asked."""
    return ax.annotate(
        textwrap.fill(label.text, width, break_long_words=len(label.text) > 2 * width),
        label.point,
        xytext=offset,
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=SMALL,
        linespacing=0.95,
        color=label.color,
        fontweight="bold" if label.bold else "normal",
        bbox={
            "boxstyle": "square,pad=0.1",
            "fc": "white",
            "alpha": 0.75,
            "lw": 0,
        },  # an outline would end text as text in SVG
        arrowprops={"arrowstyle": "-", "color": label.color, "lw": 0.5, "shrinkA": 0.0, "shrinkB": 2.5}
        if leader
        else None,
        zorder=6,
        annotation_clip=False,
    )


def _spot(
    x: float,
    y: float,
    width: float,
    height: float,
    scale: float,
    inside: Box,
    occupied: Sequence[Box],
    dots: Sequence[Point],
) -> tuple[float, float, float] | None:
    """Offset (pixels) of a label's centre from (x, y), and its distance class; None where there is no free place."""
    best: tuple[float, float, float, float] | None = None
    for distance in DISTANCES:
        for turn in range(DIRECTIONS):
            angle = 2.0 * math.pi * turn / DIRECTIONS
            gap = (distance + 4.5) * scale
            # On the edge of a rectangle around the marker, so that text sits close at the sides and above alike.
            dx = math.cos(angle) * gap + max(-1.0, min(1.0, 1.6 * math.cos(angle))) * width / 2
            dy = math.sin(angle) * gap + max(-1.0, min(1.0, 1.6 * math.sin(angle))) * height / 2
            box = _box_around(x + dx, y + dy, width / 2 + scale, height / 2 + 0.5 * scale)
            within = inside[0] <= box[0] and inside[1] <= box[1] and box[2] <= inside[2] and box[3] <= inside[3]
            if not within or any(_touch(box, other) for other in occupied):
                continue
            crossed = sum(box[0] < px < box[2] and box[1] < py < box[3] for px, py in dots)
            cost = distance + 6.0 * crossed
            if best is None or cost < best[0]:
                best = (cost, dx, dy, distance)
    return best[1:] if best else None


def _box_around(x: float, y: float, half_width: float, half_height: float) -> Box:
    return (x - half_width, y - half_height, x + half_width, y + half_height)


def _touch(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
