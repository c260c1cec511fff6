"""One panel of two benchmarks: source models, merges, their AIM rows, and the Pareto fronts of both."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.figures import Marker, ordered_colors
from common.markup import figure_text
from eval.report.labels import Label
from eval.results.rows import MergeGroup, Models, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WITHOUT, WITH, SOURCE = "#0072B2", "#D55E00", "#000000"
"""Blue, vermilion, black of the palette of Okabe and Ito (2008), told apart by all common kinds of colour vision."""
GAINED: dict[str, Any] = {"facecolor": "#009E7340", "edgecolor": "none", "lw": 0}
LOST: dict[str, Any] = {"facecolor": "#CC79A738", "edgecolor": "#CC79A799", "hatch": "/////", "lw": 0}
"""Green for gains, pink for losses, with their opacity; the hatch tells one from the other in gray."""
DASHES = (0, (4, 2))
Point = tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """Drawn elements that labels must avoid, in data coordinates: texts to place, markers, points along lines."""

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


@dataclass(frozen=True)
class Variant:
    """AIM rows of one front: at most one of each merge."""

    label: str
    color: str
    rows: tuple[Row, ...]


def variants(models: Models) -> tuple[Variant, ...]:
    """Return the fronts with AIM: one where each merge was relaxed once, else one for each omega.

    The best of several omegas is never set against one merge. Rows at omega 1 beside their merge are that merge.
    """
    relaxed = [_relaxed_rows(family) for family in models.families]
    if all(len(rows) < 2 for rows in relaxed):
        rows = tuple(row for rows in relaxed for row in rows)
        return (Variant("with AIM", WITH, rows),) if rows else ()
    groups: dict[tuple[float, int], list[Row]] = {}
    for rows in relaxed:
        for row in rows:
            omega = row.lineage.omega or 0.0
            before = [other for other in rows[: rows.index(row)] if other.lineage.omega == row.lineage.omega]
            groups.setdefault((omega, len(before)), []).append(row)
    keys = sorted(groups, key=lambda key: (-key[0], key[1]))
    colors = ordered_colors(len(keys))
    labels = [f"AIM, omega {omega:g}" + (f" ({number + 1})" if number else "") for omega, number in keys]
    return tuple(
        Variant(label, color, tuple(groups[key])) for label, color, key in zip(labels, colors, keys, strict=True)
    )


def draw_pair(ax: Axes, models: Models, x: str, y: str, markers: Mapping[str, Marker], named: bool) -> Panel:
    """Draw benchmark `y` over benchmark `x`. `markers`: by method; `named`: label the merges on the fronts too."""

    def at(row: Row | None) -> Point | None:
        return (row.scores[x], row.scores[y]) if row and x in row.scores and y in row.scores else None

    def points(rows: Sequence[Row]) -> list[Point]:
        return [p for p in map(at, rows) if p is not None]

    sources = points(models.sources)
    plain = points([f.unrelaxed for f in models.families if f.unrelaxed is not None])
    sets = variants(models)
    relaxed = {variant.label: points(variant.rows) for variant in sets}
    every = [*sources, *plain, *(point for some in relaxed.values() for point in some)]
    ax.set_xlabel(figure_text(models.unit(x)))
    ax.set_ylabel(figure_text(models.unit(y)))
    if not every:
        return Panel()
    _limits(ax, every)
    front = pareto_front([*sources, *plain])
    fronts = {label: pareto_front([*sources, *some]) for label, some in relaxed.items() if some}
    steps = _draw_fronts(ax, front, [(fronts[v.label], v.color) for v in sets if v.label in fronts])
    path: list[Point] = []
    for family in models.families:
        unrelaxed = points([family.unrelaxed] if family.unrelaxed else [])
        relaxed_points = [
            (p, v.color) for row in _relaxed_rows(family) for v in sets if row in v.rows if (p := at(row)) is not None
        ]
        path += _draw_family(ax, unrelaxed, relaxed_points, markers[family.method], 1.0 if named else 0.8)
    labels = []
    for row in models.sources:
        point = at(row)
        if point is None:
            continue
        base = is_base(row, models)
        ax.plot(
            *point,
            marker="s",
            ms=5.5 if named else 4.5,
            mfc="white" if base else SOURCE,
            mec=SOURCE,
            mew=1.0,
            ls="",
            zorder=5,
        )
        labels.append(Label(figure_text(row.label), point, SOURCE, bold=named))
    if named:
        one_set = len({family.members for family in models.families}) == 1  # then the method tells more
        for family in models.families:
            best = [(at(row), v.color) for v in sets for row in v.rows if row in family.rows]
            best = [(p, color) for p, color in best if any(p in some for some in fronts.values())]
            best += [(at(family.unrelaxed), WITHOUT)] if at(family.unrelaxed) in front else []
            name = figure_text(family.method if one_set else family.label)
            labels += [Label(name, p, color) for p, color in best[:1] if p is not None]
    return Panel(tuple(labels), tuple(every), (*steps, *path))


def _relaxed_rows(family: MergeGroup) -> tuple[Row, ...]:
    """AIM rows apart from those at omega 1 beside their merge, which are that merge."""
    return tuple(row for row in family.relaxed if family.unrelaxed is None or row.lineage.omega != 1.0)


def is_base(row: Row, models: Models) -> bool:
    """True for a source model that is in no merge: the base, or a model for comparison."""
    return not any(row.label in family.members for family in models.families)


def _limits(ax: Axes, points: Sequence[Point]) -> None:
    (left, right), (bottom, top) = ((min(values), max(values)) for values in zip(*points, strict=True))
    ax.set_xlim(left - (0.1 * (right - left) or 1.0), right + (0.1 * (right - left) or 1.0))
    ax.set_ylim(bottom - (0.1 * (top - bottom) or 1.0), top + (0.1 * (top - bottom) or 1.0))


def _draw_fronts(ax: Axes, plain: list[Point], relaxed: Sequence[tuple[list[Point], str]]) -> list[Point]:
    """Draw the fronts as the boundaries of what they dominate; return points along them.

    The area between the front without AIM and a single one with it is tinted, gains unlike losses.
    """
    left, bottom = ax.get_xlim()[0], ax.get_ylim()[0]

    def height(front: list[Point], x: float) -> float:
        return max((py for px, py in front if px >= x), default=bottom)

    def boundary(front: list[Point]) -> tuple[list[float], list[float]]:
        edges = [left, *(px for px, _ in front)]
        xs = [e for pair in itertools.pairwise(edges) for e in pair]
        ys = [h for _, right in itertools.pairwise(edges) for h in (height(front, right),) * 2]
        return [*xs, edges[-1]], [*ys, bottom]

    if len(relaxed) == 1:
        single = relaxed[0][0]
        edges = sorted({left, *(px for px, _ in (*plain, *single))})
        xs = [e for pair in itertools.pairwise(edges) for e in pair]
        old = [height(plain, right) for _, right in itertools.pairwise(edges) for _ in range(2)]
        new = [height(single, right) for _, right in itertools.pairwise(edges) for _ in range(2)]
        ax.fill_between(xs, old, list(map(max, old, new)), **GAINED, zorder=1)
        ax.fill_between(xs, new, list(map(max, old, new)), **LOST, zorder=1)
    for front, color in relaxed:
        ax.plot(*boundary(front), color=color, lw=1.5 if len(relaxed) == 1 else 1.1, zorder=2.2)
    ax.plot(*boundary(plain), color=WITHOUT, lw=1.1, ls=DASHES, zorder=2.4)
    lines = [boundary(front) for front in (plain, *(front for front, _ in relaxed))]
    return [p for xs, ys in lines for a, b in itertools.pairwise(zip(xs, ys, strict=True)) for p in _between(a, b, 24)]


def _draw_family(
    ax: Axes, unrelaxed: Sequence[Point], relaxed: Sequence[tuple[Point, str]], marker: Marker, scale: float
) -> list[Point]:
    """Draw a merge (hollow), its AIM rows (filled) and arrows along falling omega; return points along these."""
    path: list[Point] = []
    for a, b in itertools.pairwise([*unrelaxed, *(point for point, _ in relaxed)] if unrelaxed else []):
        if a != b:
            arrow = {"arrowstyle": "-|>,head_width=0.13,head_length=0.3", "color": "#8c8c8c", "lw": 0.6}
            ax.annotate("", b, a, arrowprops={**arrow, "shrinkA": 1.5, "shrinkB": 2.2}, zorder=2.8)
            path += _between(a, b, 24)
    look: dict[str, Any] = {"marker": marker, "ms": scale * marker_size(marker), "mew": 0.9 * scale, "ls": ""}
    for point in unrelaxed:
        ax.plot(*point, mfc="white", mec=WITHOUT, zorder=3, **look)
    for point, color in relaxed:
        ax.plot(*point, mfc=color, mec=color, zorder=4, **look)
    return path


def marker_size(marker: Marker) -> float:
    """Size in points at which markers of different shapes look alike."""
    return 6.0 if isinstance(marker, tuple) or marker == "*" else {"P": 5.2, "X": 5.2, "D": 3.7}.get(marker, 4.5)


def _between(a: Point, b: Point, n: int) -> list[Point]:
    return [(a[0] + (b[0] - a[0]) * i / n, a[1] + (b[1] - a[1]) * i / n) for i in range(n + 1)]
