"""One panel of two benchmarks: source models, merges, their AIM rows, and the Pareto fronts of both."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval.report.labels import Label
from eval.results.rows import Family, Models, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WITHOUT, WITH, SOURCE = "#0072B2", "#D55E00", "#000000"
"""Blue, vermilion, black of the palette of Okabe and Ito (2008), told apart by all common kinds of colour vision."""
GAINED: dict[str, Any] = {"facecolor": f"{WITH}38", "edgecolor": "none", "lw": 0}
LOST: dict[str, Any] = {"facecolor": f"{WITHOUT}2E", "edgecolor": f"{WITHOUT}66", "hatch": "/////", "lw": 0}
"""Tints with their opacity; the hatch tells one from the other in grey."""
DASHES = (0, (4, 2))
Point = tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """What was drawn, in data coordinates, as far as labels must know: texts to place, markers, points along lines."""

    labels: tuple[Label, ...] = ()
    markers: tuple[Point, ...] = ()
    lines: tuple[Point, ...] = ()


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one equals or beats in both coordinates, by rising x (and so falling y)."""
    front: list[Point] = []
    for x, y in sorted(set(points), reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def draw_pair(ax: Axes, models: Models, x: str, y: str, markers: Mapping[str, str], named: bool) -> Panel:
    """Draw benchmark `y` over benchmark `x`. `markers`: by method; `named`: label the merges on the fronts too."""

    def at(row: Row | None) -> Point | None:
        return (row.scores[x], row.scores[y]) if row and x in row.scores and y in row.scores else None

    def points(rows: Sequence[Row]) -> list[Point]:
        return [p for p in map(at, rows) if p is not None]

    sources = points(models.sources)
    plain = points([f.twin for f in models.families if f.twin is not None])
    relaxed = points([row for f in models.families for row in _moved(f)])
    every = [*sources, *plain, *relaxed]
    ax.set_xlabel(f"{x} (%)")
    ax.set_ylabel(f"{y} (%)")
    if not every:
        return Panel()
    _limits(ax, every)
    fronts = {"plain": pareto_front([*sources, *plain]), "relaxed": pareto_front([*sources, *relaxed])}
    steps = _draw_fronts(ax, fronts["plain"], fronts["relaxed"], both=bool(relaxed))
    path: list[Point] = []
    for family in models.families:
        twin = points([family.twin] if family.twin else [])
        path += _draw_family(ax, twin, points(_moved(family)), markers[family.method])
    labels = []
    for row in models.sources:
        point = at(row)
        if point is None:
            continue
        base = is_base(row, models)
        ax.plot(*point, marker="s", ms=5.5, mfc="white" if base else SOURCE, mec=SOURCE, mew=1.0, ls="", zorder=5)
        labels.append(Label(row.label, point, SOURCE, bold=True))
    if named:
        one_set = len({family.members for family in models.families}) == 1  # then the method tells more
        for family in models.families:
            best = [(at(row), WITH) for row in _moved(family) if at(row) in fronts["relaxed"]]
            best += [(at(family.twin), WITHOUT)] if at(family.twin) in fronts["plain"] else []
            labels += [
                Label(family.method if one_set else family.label, p, colour) for p, colour in best[:1] if p is not None
            ]
    return Panel(tuple(labels), tuple(every), (*steps, *path))


def _moved(family: Family) -> tuple[Row, ...]:
    """AIM rows apart from those at omega 1 beside their merge, which are that merge."""
    return tuple(row for row in family.relaxed if family.twin is None or row.lineage.omega != 1.0)


def is_base(row: Row, models: Models) -> bool:
    """Whether a source model is in no merge: the base, or a model for comparison."""
    return not any(row.label in family.members for family in models.families)


def _limits(ax: Axes, points: Sequence[Point]) -> None:
    (left, right), (bottom, top) = ((min(values), max(values)) for values in zip(*points, strict=True))
    ax.set_xlim(left - (0.1 * (right - left) or 1.0), right + (0.1 * (right - left) or 1.0))
    ax.set_ylim(bottom - (0.1 * (top - bottom) or 1.0), top + (0.1 * (top - bottom) or 1.0))


def _draw_fronts(ax: Axes, plain: list[Point], relaxed: list[Point], both: bool) -> list[Point]:
    """Draw the fronts as the boundaries of what they dominate, and tint the difference; return points along them."""
    left, bottom = ax.get_xlim()[0], ax.get_ylim()[0]

    def height(front: list[Point], x: float) -> float:
        return max((py for px, py in front if px >= x), default=bottom)

    def boundary(front: list[Point]) -> tuple[list[float], list[float]]:
        edges = [left, *(px for px, _ in front)]
        xs = [e for pair in itertools.pairwise(edges) for e in pair]
        ys = [h for _, right in itertools.pairwise(edges) for h in (height(front, right),) * 2]
        return [*xs, edges[-1]], [*ys, bottom]

    if both:
        edges = sorted({left, *(px for px, _ in (*plain, *relaxed))})
        xs = [e for pair in itertools.pairwise(edges) for e in pair]
        old = [height(plain, right) for _, right in itertools.pairwise(edges) for _ in range(2)]
        new = [height(relaxed, right) for _, right in itertools.pairwise(edges) for _ in range(2)]
        ax.fill_between(xs, old, list(map(max, old, new)), **GAINED, zorder=1)
        ax.fill_between(xs, new, list(map(max, old, new)), **LOST, zorder=1)
        ax.plot(*boundary(relaxed), color=WITH, lw=1.5, zorder=2.2)
    ax.plot(*boundary(plain), color=WITHOUT, lw=1.1, ls=DASHES, zorder=2.4)
    lines = [boundary(front) for front in ((plain, relaxed) if both else (plain,))]
    return [p for xs, ys in lines for a, b in itertools.pairwise(zip(xs, ys, strict=True)) for p in _between(a, b, 24)]


def _draw_family(ax: Axes, twin: Sequence[Point], relaxed: Sequence[Point], marker: str) -> list[Point]:
    """Draw a merge (hollow), its AIM rows (filled) and arrows along falling omega; return points along these."""
    path: list[Point] = []
    for a, b in itertools.pairwise([*twin, *relaxed] if twin else []):
        if a != b:
            arrow = {"arrowstyle": "-|>,head_width=0.13,head_length=0.3", "color": "#8c8c8c", "lw": 0.6}
            ax.annotate("", b, a, arrowprops={**arrow, "shrinkA": 1.5, "shrinkB": 2.2}, zorder=2.8)
            path += _between(a, b, 24)
    size = {"P": 5.2, "X": 5.2, "D": 3.7, "*": 6.0}.get(marker, 4.5)
    for points, fill, edge, order in ((twin, "white", WITHOUT, 3), (relaxed, WITH, WITH, 4)):
        for point in points:
            ax.plot(*point, marker=marker, ms=size, mfc=fill, mec=edge, mew=0.9, ls="", zorder=order)
    return path


def _between(a: Point, b: Point, n: int) -> list[Point]:
    return [(a[0] + (b[0] - a[0]) * i / n, a[1] + (b[1] - a[1]) * i / n) for i in range(n + 1)]
