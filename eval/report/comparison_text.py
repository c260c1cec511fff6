"""A comparison as text for the terminal, as Markdown, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from common.markup import markdown_text, one_line
from eval.report.tables import pipes
from eval.stats.comparison import BOOTSTRAP, MCNEMAR, PERMUTATION, Comparison, Difference
from eval.stats.gain_comparison import GainDifference
from eval.stats.gains import HV
from eval.stats.power import POWER
from eval.stats.significance import LEVEL, Interval

HEADER = (
    *("benchmark", "items", "A", "B", "B - A", "95 % interval", "detectable", "only A", "only B", "p", "p corrected"),
    "verdict",
)
LEFT = {0, 5, 11}
NOT_SIGNIFICANT = "not significant"


def to_text(comparison: Comparison, gain: GainDifference | None, draws: int, seed: int) -> str:
    """The comparison with its columns aligned."""
    rows = [list(HEADER), *_rows(comparison, gain)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    rows = [[one_line(cell) for cell in row] for row in rows]
    lines = [
        "  ".join(c.ljust(w) if i in LEFT else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join(
        [f"A: {one_line(comparison.a)}", f"B: {one_line(comparison.b)}", "", *(line.rstrip() for line in lines)]
    ) + _below(comparison, gain, draws, seed)


def to_markdown(comparison: Comparison, gain: GainDifference | None, draws: int, seed: int) -> str:
    """The comparison as a Markdown table with what stands below it."""
    header = [name.replace("-", "−") if name == "B - A" else name for name in HEADER]
    rows = [[markdown_text(cell) for cell in row] for row in _rows(comparison, gain)]
    names = f"A: {markdown_text(comparison.a)}  \nB: {markdown_text(comparison.b)}"
    return f"{names}\n\n{pipes(header, rows)}" + _below(comparison, gain, draws, seed)


def to_json(comparison: Comparison, gain: GainDifference | None, draws: int, seed: int) -> str:
    """Everything that is known, unrounded."""
    gain_fields = (
        {**asdict(gain), "difference": gain.b - gain.a, "is_significant": gain.is_significant} if gain else None
    )
    whole = {
        "a": comparison.a,
        "b": comparison.b,
        "level": LEVEL,
        "draws": draws,
        "seed": seed,
        "differences": [_entry(d) for d in comparison.differences],
        "mean": _entry(comparison.mean) if comparison.mean else None,
        "hv_gain": gain_fields,
        "remarks": list(comparison.remarks),
    }
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def _entry(d: Difference) -> dict[str, object]:
    return {**asdict(d), "difference": d.value, "is_significant": d.is_significant}


def _rows(comparison: Comparison, gain: GainDifference | None) -> list[list[str]]:
    rows = [_row(d, verdict(d)) for d in comparison.differences]
    if comparison.mean:
        rows.append([*_row(comparison.mean, "")[:10], "", ""])
    if gain:
        interval = f"[{gain.interval[0]:+.3f}, {gain.interval[1]:+.3f}]"
        direction = _direction(gain.b - gain.a, True) if gain.is_significant else NOT_SIGNIFICANT
        numbers = [f"{gain.a:.3f}", f"{gain.b:.3f}", f"{gain.b - gain.a:+.3f}", interval]
        rows.append(["HV Gain", "", *numbers, "", "", "", "", "", direction])
    return rows


def _row(d: Difference, verdict_text: str) -> list[str]:
    counts = ["" if count is None else str(count) for count in (d.only_a, d.only_b)]
    interval = f"[{d.interval[0]:+.2f}, {d.interval[1]:+.2f}]"
    name = "mean" if d.test == BOOTSTRAP else d.column
    least = "" if d.test == BOOTSTRAP else "none" if d.detectable is None else f"{d.detectable:.2f}"
    cells = [name, str(d.n), f"{d.a:.2f}", f"{d.b:.2f}", f"{d.value:+.2f}", interval, least, *counts]
    return [*cells, shown_p(d.p), shown_p(d.corrected), verdict_text]


def verdict(d: Difference) -> str:
    """Return the corrected test's verdict on a benchmark."""
    return _direction(d.value, d.higher_is_better) if d.is_significant else NOT_SIGNIFICANT


def _direction(value: float, higher_is_better: bool | None) -> str:
    if higher_is_better is None:
        return "B higher" if value > 0 else "B lower"
    return "B better" if (value > 0) == higher_is_better else "B worse"


def summary(differences: Sequence[Difference], gain: tuple[float, Interval] | None) -> str:
    """Return one sentence on the significant differences; `gain`: the difference of HV gains and its 95 % interval."""
    parts = [f"{d.column} ({d.value:+.2f})" for d in differences if d.is_significant]
    if gain is not None and (gain[1][0] > 0 or gain[1][1] < 0):
        parts.append(f"{HV} ({gain[0]:+.3f})")
    if parts:
        rest = "" if gain is None or parts[-1].startswith(HV) else f"; {HV} is not significant ({gain[0]:+.3f})"
        return f"Statistically significant: {', '.join(parts)}{rest}."
    included = "" if gain is None else f", {HV} included"
    return f"No difference between these two models is statistically significant{included}."


def shown_p(p: float) -> str:
    """A p-value as one reads it."""
    return "<0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def _below(comparison: Comparison, gain: GainDifference | None, draws: int, seed: int) -> str:
    family = len(comparison.differences)
    named = {
        test: ", ".join(d.column for d in comparison.differences if d.test == test) for test in (MCNEMAR, PERMUTATION)
    }
    lines = []
    if named[MCNEMAR]:
        lines.append(
            f"{named[MCNEMAR]}: McNemar's exact test on the items that one model alone has right, Tango's interval."
        )
    if named[PERMUTATION]:
        lines.append(
            f"{named[PERMUTATION]}: permutation test (the two answers to an item exchanged), paired bootstrap interval "
            f"({draws} draws, seed {seed})."
        )
    if family > 1:
        lines.append(
            f"Verdicts: p corrected by Holm for {family} benchmarks, below {1 - LEVEL:.2f}. Intervals are for one "
            "benchmark alone. The mean weighs benchmarks alike (paired bootstrap) and is not corrected."
        )
    if gain:
        lines.append(
            f"HV Gain over {{{', '.join(gain.population)}}}: paired bootstrap over items of all models; "
            "significant where its interval excludes 0."
        )
    family_text = f", corrected for {family} benchmarks (Bonferroni)" if family > 1 else ""
    lines.append(
        f"Detectable: the smallest difference in points that these items show with {100 * POWER:.0f} % power at the "
        f"{100 * (1 - LEVEL):.0f} % level{family_text}; smaller true differences are mostly missed."
    )
    result = summary(comparison.differences, (gain.b - gain.a, gain.interval) if gain else None)
    return "\n\n" + "\n".join([result, *lines, *comparison.remarks]) + "\n"
