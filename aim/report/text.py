"""A summary of importance as text: tables by kind and by layer, what is not relaxed, and what it was measured on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from textwrap import fill

from aim.calibration.packing import summary as calibration_text
from aim.importance import Importance
from aim.report.summary import Summary, by_kind
from common.markup import markdown
from merging.output.records.card import public_name

HEADS = {
    "channels": "channels",
    "tokens": "tokens",
    "top_share": "top 1 %",
    "maximum": "maximum",
    "mean": "mean s",
    "entropy": "entropy",
    "stability": "stability",
}
LEGEND = (
    "top 1 %: share of the sum of activations in the largest 1 % of the channels (at least one); maximum: largest "
    "activation; mean s: mean importance, the fraction of the merge that omega 0 reverts; entropy: of the channels' "
    "shares, 1 for equal shares; stability: rank correlation between two halves of the calibration set."
)
EXPERTS = "Experts of a layer are one row: means, the largest maximum, the lowest stability, the fewest tokens."


def as_text(importance: Importance, summary: Summary) -> str:
    """Return the whole summary, as it is printed."""
    legend_text = fill(legend(summary), 120)
    return "\n\n".join(
        [described(importance), kinds_table(summary), layers_table(summary), legend_text, *left_out(summary)]
    )


def described(importance: Importance) -> str:
    """Say of which base this is and what it was measured on."""
    base, calibration = importance.base, importance.calibration
    commit = f" at commit {base['commit']}" if base.get("commit") else ""
    way = ", ".join(str(calibration[key]) for key in ("dtype", "device") if key in calibration)
    numerics = " with the original's arithmetic (sums over blocks)" if importance.numerics == "reference" else ""
    return (
        f"Importance of {public_name(base['name'])}{commit}, measured in {way}{numerics}.\n"
        f"{calibration_text(calibration)}"
    )


def kinds_table(summary: Summary) -> str:
    """Return the table of kinds: medians over the layers, the largest maximum, the lowest stability."""
    columns = [column for column in HEADS if column != "tokens"]
    rows = [
        [row.kind, _cell("layers", row.layers), *(_cell(column, getattr(row, column)) for column in columns)]
        for row in by_kind(summary.rows)
    ]
    heads = ["kind", "layers", *("lowest stability" if c == "stability" else HEADS[c] for c in columns)]
    return markdown(heads, rows)


def layers_table(summary: Summary) -> str:
    """Return the table with a row for every layer and kind."""
    several = len({row.stack for row in summary.rows if row.stack}) > 1
    rows = [
        [
            "-" if row.layer is None else f"{row.stack if several else ''}{row.layer}",
            row.kind,
            *(_cell(column, getattr(row, column)) for column in HEADS),
        ]
        for row in summary.rows
    ]
    return markdown(["layer", "kind", *HEADS.values()], rows, text_columns=2)


def legend(summary: Summary) -> str:
    """Say what the columns are."""
    return f"{LEGEND} {EXPERTS}" if any(row.experts for row in summary.rows) else LEGEND


def left_out(summary: Summary) -> list[str]:
    """Say what is not relaxed and why, layers of one kind together."""
    lines = [f"Not relaxed: {grouped(names)} ({reason})" for reason, names in summary.not_relaxed.items()]
    if summary.few_tokens:
        count = sum(summary.few_tokens.values())
        lines.append(f"Not relaxed: {count} experts with too few tokens, in {grouped(list(summary.few_tokens))}")
    return ["\n".join(f"- {line}." for line in lines)] if lines else []


def grouped(names: Sequence[str]) -> str:
    """Return names with their numbers as *, each with how many it stands for."""
    counts = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    if column == "top_share":
        return f"{100 * value:.1f} %"
    if column == "maximum":
        return f"{value:.3g}"
    if column in ("mean", "entropy", "stability"):
        return f"{value:.3f}"
    return f"{value:g}" if column == "channels" else str(value)
