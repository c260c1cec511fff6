"""Figures of the benchmarks as Markdown, for the screen and for the documents."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.files.json_values import JsonObject


def performance(report: JsonObject) -> str:
    """Return the figures of scripts/benchmarks/bench_merge.py as a table."""
    heads = ["work", "ours s", "CPU s", "peer s", "CPU s", "of peer", "CPU of peer", "limit s", "of limit",
             "net of limit", "MiB", "peer MiB", "of peer"]  # fmt: skip
    start = report["start"]["wall"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for name, entry in report["work"].items():
        ours, peer, limit = entry["ours"], entry["peer"], report["limits"][entry["moved"]]
        line, memory = [name, _seconds(ours), f"{ours['cpu']:.1f}"], [f"{ours['anonymous_mib']:.0f}"]
        if peer:
            line += [_seconds(peer), f"{peer['cpu']:.1f}", _ratio(ours, peer, "wall"), _ratio(ours, peer, "cpu")]
            memory += [f"{peer['anonymous_mib']:.0f}", _ratio(ours, peer, "anonymous_mib")]
        line += ["" for _ in range(7 - len(line))]
        line += [_seconds(limit), _ratio(ours, limit, "wall"), f"{(ours['wall'] - start) / limit['wall']:.1f}"]
        lines.append([*line, *memory, *["" for _ in range(3 - len(memory))]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _seconds(cost: JsonObject) -> str:
    """Median with least and most, where there were several runs."""
    spread = f" ({cost['least']:.1f}-{cost['most']:.1f})" if cost["runs"] > 1 else ""
    return f"{cost['wall']:.1f}{spread}"


def _ratio(project: JsonObject, peer: JsonObject, what: str) -> str:
    return f"{project[what] / peer[what]:.3f}" if peer[what] else ""
