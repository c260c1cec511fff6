"""The README's figure: HV gain of each merge of the quickstart with AIM against without."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.figures import in_style, method_looks
from eval.results.reader import load
from scripts.dev.document_tables import gain_pairs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path("results/quickstart.json")
FIGURE = Path("docs/figures/quickstart_gain.svg")
SIZE = (5.5, 3.1)


def draw(results: Path) -> Figure:
    """Plot one marker for each merge, above the diagonal where AIM raises its HV gain."""
    from matplotlib.figure import Figure

    pairs = list(gain_pairs(load([results], {}, lambda _: None)))
    looks = method_looks(dict.fromkeys(method for method, *_ in pairs))
    with in_style():
        figure = Figure(figsize=SIZE, layout="constrained")
        figure.patch.set_facecolor("white")
        ax = figure.subplots()
        low = min(min(pair[1:]) for pair in pairs) - 0.02
        high = max(max(pair[1:]) for pair in pairs) + 0.02
        ax.plot([low, high], [low, high], color="#888888", linewidth=0.8, zorder=1)
        for method, (marker, color) in looks.items():
            before, after = zip(*((x, y) for name, x, y in pairs if name == method), strict=True)
            ax.scatter(before, after, marker=marker, s=26, color=color, linewidths=0, label=method, zorder=2)
        ax.set_xlim(low, high)
        ax.set_ylim(low, high)
        ax.set_aspect("equal")
        ax.text(low + 0.01, high - 0.01, "AIM raises HV gain", va="top", color="#555555", fontsize=7)
        ax.text(high - 0.01, low + 0.01, "AIM lowers HV gain", ha="right", color="#555555", fontsize=7)
        ax.set_xlabel("HV gain of the merge")
        ax.set_ylabel("HV gain with AIM, ω = 0.4")
        figure.legend(loc="outside right center", title="merged by", title_fontsize=7)
    return figure
