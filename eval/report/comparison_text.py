"""A comparison as text for the terminal, as Markdown, and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from eval.report.tables import pipes
from eval.stats.comparison import BOOTSTRAP, MCNEMAR, PERMUTATION, Comparison, Difference
from eval.stats.gain_comparison import GainDifference
from eval.stats.significance import LEVEL

HEADER = ("benchmark", "items", "A", "B", "B - A", "95 % interval", "only A", "only B", "p", "p corrected", "verdict")
LEFT = {0, 5, 10}
WITHIN = "within noise"


def to_text(found: Comparison, gain: GainDifference | None, draws: int, seed: int) -> str:
    """The comparison with its columns aligned."""
    rows = [list(HEADER), *_rows(found, gain)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = [
        "  ".join(c.ljust(w) if i in LEFT else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join([f"A: {found.a}", f"B: {found.b}", "", *(line.rstrip() for line in lines)]) + _below(
        found, gain, draws, seed
    )


def to_markdown(found: Comparison, gain: GainDifference | None, draws: int, seed: int) -> str:
    """The comparison as a Markdown table with what stands below it."""
    header = [name.replace("-", "−") if name == "B - A" else name for name in HEADER]
    return f"A: {found.a}  \nB: {found.b}\n\n{pipes(header, _rows(found, gain))}" + _below(found, gain, draws, seed)


def to_json(found: Comparison, gain: GainDifference | None, draws: int, seed: int) -> str:
    """Everything that is known, unrounded."""
    gains = {**asdict(gain), "difference": gain.b - gain.a, "beyond_noise": gain.beyond_noise} if gain else None
    whole = {
        "a": found.a,
        "b": found.b,
        "level": LEVEL,
        "draws": draws,
        "seed": seed,
        "differences": [_entry(d) for d in found.differences],
        "mean": _entry(found.mean) if found.mean else None,
        "hv_gain": gains,
        "remarks": list(found.remarks),
    }
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def _entry(d: Difference) -> dict[str, object]:
    return {**asdict(d), "difference": d.value, "beyond_noise": d.beyond_noise}


def _rows(found: Comparison, gain: GainDifference | None) -> list[list[str]]:
    rows = [_row(d, verdict(d)) for d in found.differences]
    if found.mean:
        rows.append([*_row(found.mean, "")[:9], "", ""])
    if gain:
        interval = f"[{gain.interval[0]:+.3f}, {gain.interval[1]:+.3f}]"
        says = _direction(gain.b - gain.a) if gain.beyond_noise else WITHIN
        numbers = [f"{gain.a:.3f}", f"{gain.b:.3f}", f"{gain.b - gain.a:+.3f}", interval]
        rows.append(["HV Gain", "", *numbers, "", "", "", "", says])
    return rows


def _row(d: Difference, says: str) -> list[str]:
    counts = ["" if count is None else str(count) for count in (d.only_a, d.only_b)]
    interval = f"[{d.interval[0]:+.2f}, {d.interval[1]:+.2f}]"
    name = "mean" if d.test == BOOTSTRAP else d.column
    shown = [name, str(d.n), f"{d.a:.2f}", f"{d.b:.2f}", f"{d.value:+.2f}", interval, *counts]
    return [*shown, shown_p(d.p), shown_p(d.corrected), says]


def verdict(d: Difference) -> str:
    """What the corrected test says of a benchmark."""
    return _direction(d.value) if d.beyond_noise else WITHIN


def _direction(value: float) -> str:
    return "B better" if value > 0 else "B worse"


def shown_p(p: float) -> str:
    """A p-value as one reads it."""
    return "<0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def _below(found: Comparison, gain: GainDifference | None, draws: int, seed: int) -> str:
    family = len(found.differences)
    named = {test: ", ".join(d.column for d in found.differences if d.test == test) for test in (MCNEMAR, PERMUTATION)}
    said = []
    if named[MCNEMAR]:
        said.append(
            f"{named[MCNEMAR]}: McNemar's exact test on the items that one model alone has right, Tango's interval."
        )
    if named[PERMUTATION]:
        said.append(
            f"{named[PERMUTATION]}: permutation test (the two answers to an item exchanged), paired bootstrap interval "
            f"({draws} draws, seed {seed})."
        )
    if family > 1:
        said.append(
            f"Verdicts: p corrected by Holm for {family} benchmarks, below {1 - LEVEL:.2f}. Intervals are for one "
            "benchmark alone. The mean weighs benchmarks alike (paired bootstrap) and is not corrected."
        )
    if gain:
        said.append(
            f"HV Gain over {{{', '.join(gain.population)}}}: paired bootstrap over items of all models; beyond noise "
            "where its interval leaves 0 out."
        )
    moved = [d for d in found.differences if d.beyond_noise]
    changes = ", ".join(f"{d.column} ({d.value:+.2f})" for d in moved)
    result = f"Beyond noise: {changes}." if moved else "No difference between these two models is beyond noise."
    return "\n\n" + "\n".join([result, *said, *found.remarks]) + "\n"
