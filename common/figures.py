"""Look, size and files of every figure of the project."""

from __future__ import annotations

import io
import math
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common.errors import UsageError
from common.files.paths import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Marker = str | tuple[int, Literal[0, 1, 2], int]
WIDTH = 5.5
"""Width of every figure in inches, that of a column of text; smallest text 7 pt."""
SMALL = 7.0
"""Size in points of the smallest text."""
DPI = 300
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS: tuple[Marker, ...] = (
    *("o", "^", "D", "v", "P", "X", "p", "h", "<", ">", "*", "d", "H", "8"),
    *((4, 1, 0), (6, 1, 0), (3, 1, 0), (4, 1, 45), (5, 0, 180), (3, 0, 45), (7, 1, 0), (5, 1, 180)),
    *((3, 1, 180), (3, 0, -45), (8, 1, 0), (7, 0, 0), (9, 1, 0), (6, 1, 30)),
)
_POLYGONS: dict[str, tuple[int, Literal[0, 1, 2], float]] = {
    "^": (3, 0, 0), "v": (3, 0, 180), "<": (3, 0, 90), ">": (3, 0, -90), "D": (4, 0, 0), "p": (5, 0, 0),
    "h": (6, 0, 0), "H": (6, 0, 30), "8": (8, 0, 22.5), "*": (5, 1, 0),
}  # fmt: skip
_CROSSES = {"P": 0, "X": 45}
VIRIDIS = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
"""Anchors of matplotlib's color map of that name."""
METHODS = (
    *("taskarithmetic", "tiesmerging", "daretaskarithmetic", "dareties", "widen", "linear", "breadcrumbs"),
    *("breadcrumbsties", "della", "dellalinear", "slerp", "nuslerp", "multislerp", "karcher", "modelstock"),
    *("arceefusion", "nearswap", "passthrough", "ram", "ramplustl", "sce", "isoc", "tsvmerge", "wudi"),
)
"""Names of merge methods (letters alone) in the order of their markers."""
ALIASES = {"ties": "tiesmerging", "darelinear": "daretaskarithmetic"}
"""Methods that the paper's tables call otherwise."""
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "figure.titlesize": 9,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.4,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: searchable, and edited with the fonts at hand
    "svg.hashsalt": "aim",  # the same results give the same bytes
    "pdf.fonttype": 42,  # TrueType, which publishers ask for
}
KINDS = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""Formats, each with the metadata that would make two files of one figure differ."""


def method_looks(methods: Iterable[str]) -> dict[str, tuple[Marker, str]]:
    """Return the marker and color of each method, the same in every figure.

    A method that is not in `METHODS` gets those of a digest of its name, or the next free ones of the figure.
    """
    looks: dict[str, int] = {}
    unknown = []
    for method in dict.fromkeys(methods):
        name = re.sub(r"[^a-z0-9]", "", method.lower())
        name = ALIASES.get(name, name)
        if name in METHODS and METHODS.index(name) not in looks.values():
            looks[method] = METHODS.index(name)
        else:
            unknown.append(method)
    for method in sorted(unknown):
        free = [i for i in range(len(MARKERS)) if i not in looks.values()] or list(range(len(MARKERS)))
        digest_position = len(METHODS) + zlib.crc32(method.encode("utf-8", "replace")) % max(
            1, len(MARKERS) - len(METHODS)
        )
        looks[method] = digest_position if digest_position in free else free[digest_position % len(free)]
    return {method: (MARKERS[i], COLORS[i % len(COLORS)]) for method, i in looks.items()}


def ordered_colors(count: int) -> list[str]:
    """Return `count` colors from dark to light, in an order that the eye and a gray print keep (viridis)."""
    return [_on_scale(0.88 * i / max(1, count - 1)) for i in range(count)]


def _on_scale(place: float) -> str:
    """The color at a place between 0 and 1, between the two anchors around it."""
    first, share = divmod(place * (len(VIRIDIS) - 1), 1.0)
    pair = VIRIDIS[int(first) : int(first) + 2]
    low, high = (tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in (pair[0], pair[-1]))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))


def marker_polygon(marker: Marker) -> list[tuple[float, float]] | None:
    """Return the corners of a marker within a circle of radius 1, y upwards; None for a disc."""
    if marker == "o":
        return None
    if isinstance(marker, str) and marker in _CROSSES:
        arm, turn = 0.36, math.radians(_CROSSES[marker])
        half = [(-arm, 1.0), (arm, 1.0), (arm, arm), (1.0, arm), (1.0, -arm), (arm, -arm)]
        plus = [*half, *((-x, -y) for x, y in half)]
        return [(x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)) for x, y in plus]
    if marker == "d":
        return [(0.0, 1.0), (0.6, 0.0), (0.0, -1.0), (-0.6, 0.0)]
    corners, style, angle = _POLYGONS[marker] if isinstance(marker, str) else marker
    radii = [1.0, 0.45] if style == 1 else [1.0]
    steps = corners * len(radii)
    turns = [math.radians(90 + angle + 360 * i / steps) for i in range(steps)]
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(turns)]


def legend_rows(labels: Sequence[object], columns: int) -> float:
    """Return the height in inches of a legend of so many columns."""
    return 0.17 * -(-len(labels) // columns) + 0.08 if labels else 0.0


@contextmanager
def in_style() -> Iterator[None]:
    """The project's look, while open; characters that no font has are drawn as boxes, without a warning for each."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def check_figure_file(path: Path | None, flag: str) -> None:
    """Raise UsageError for a file that is none of `KINDS`."""
    if path is not None and (path.suffix.removeprefix(".").lower() not in KINDS or path.is_dir()):
        raise UsageError(f"{flag} must be a .png, .svg or .pdf file, found {path}.")


def write_figure(figure: Figure, path: Path) -> None:
    """Write a .png, .svg or .pdf file in one step."""
    kind = path.suffix.removeprefix(".").lower()
    content = io.BytesIO()
    with in_style():
        figure.savefig(content, format=kind, metadata=KINDS[kind])
    write_whole(path, content.getvalue())
