"""How every figure of the project looks, and how it gets into a file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "^", "D", "v", "P", "X", "p", "<", ">", "*")
STYLE: dict[Any, Any] = {
    "font.size": 8,
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
}
KINDS = {"png": {"Software": None}, "svg": {"Date": None}}
"""Formats, each with the metadata that would make two files of one figure differ."""


@contextmanager
def in_style() -> Iterator[None]:
    """The project's look, while open."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def write_figure(figure: Figure, path: Path) -> None:
    """Write a .png or .svg file in one step."""
    kind = path.suffix.removeprefix(".")
    content = io.BytesIO()
    with in_style():
        figure.savefig(content, format=kind, metadata=KINDS[kind])
    write_whole(path, content.getvalue())
