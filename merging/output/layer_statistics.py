"""Layer statistics of a merge: norms of the task vectors and the merged one, sign conflicts, dropped entries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from common.files.json_values import JsonObject, JsonValue
from common.markup import markdown
from merging.checkpoints.tensor_names import in_order, layer_of


def by_layer(tensors: Iterable[tuple[str, Mapping[str, JsonValue]]], count: int) -> list[JsonObject]:
    """Add up the tensors' sums layer by layer; returns one row per layer, and one per tensor outside of layers.

    The rows are in the order of their names, layer 2 before layer 10.

    A row has norms (one for each of the recipe's `count` models, None for one that has no part in it), merged (the
    norm), and as shares: conflicts (of the entries that any model moved), dropped (per model, of the entries that it
    moved; None where the method drops nothing), changed (of all entries).
    """
    groups: dict[str, list[Mapping[str, JsonValue]]] = {}
    for name, sums in tensors:
        layer = layer_of(name)
        groups.setdefault(f"{layer[0]}{layer[1]}" if layer else name, []).append(sums)
    return [_row(group, groups[group], count) for group in sorted(groups, key=in_order)]


def _row(layer: str, parts: Sequence[Mapping[str, JsonValue]], count: int) -> JsonObject:
    positions = parts[0]["positions"]  # the same for all tensors of a layer
    columns = {position: i for i, position in enumerate(positions)}
    has_base = all(part["has_base"] for part in parts)
    drops = [part for part in parts if part["dropped"] is not None]
    norms = [math.sqrt(sum(part["squares"][i] for part in parts)) for i in range(len(positions))]
    dropped = [
        _share(sum(p["dropped"][i] for p in drops), sum(p["nonzero"][i] for p in drops)) for i in range(len(positions))
    ]
    elements = sum(p["elements"] for p in parts)
    return {
        "layer": layer,
        "norms": [norms[columns[i]] if i in columns else None for i in range(count)],
        "merged": math.sqrt(sum(part["merged"] for part in parts)),
        "conflicts": _share(sum(p["conflicts"] for p in parts), sum(p["moved"] for p in parts)) if has_base else None,
        "dropped": [dropped[columns[i]] if i in columns else None for i in range(count)] if drops else None,
        "changed": _share(sum(p["changed"] for p in parts), elements) if has_base and elements else None,
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def as_markdown(rows: Sequence[Mapping[str, JsonValue]], models: Sequence[str]) -> str:
    """Return the table, a sentence on what its columns are, and the layers that did not change."""
    has_base = any(row["conflicts"] is not None for row in rows)
    what = "task vector" if has_base else "weights"
    legend = "; ".join(f"{i} is {name}" for i, name in enumerate(models, 1))
    shows_drops = any(row["dropped"] for row in rows)
    heads = ["layer", *(f"norm {i}" for i in range(1, len(models) + 1)), "norm merged"]
    heads += ["sign conflicts"] if has_base else []
    heads += [f"dropped {i}" for i in range(1, len(models) + 1)] if shows_drops else []
    heads += ["changed"] if has_base else []
    lines = []
    for row in rows:
        cells = [
            row["layer"],
            *("-" if norm is None else f"{norm:.4g}" for norm in row["norms"]),
            f"{row['merged']:.4g}",
        ]
        cells += [_percent(row["conflicts"])] if has_base else []
        cells += [_percent(x) for x in row["dropped"] or [None] * len(models)] if shows_drops else []
        cells += [_percent(row["changed"])] if has_base else []
        lines.append(cells)
    table = markdown(heads, lines)
    still = [row["layer"] for row in rows if row["changed"] == 0]
    unchanged = f"Unchanged: {', '.join(still)}." if still else "Every layer changed." if has_base else ""
    return f"Norm of each {what}; {legend}.\n\n{table}\n\n{unchanged}".rstrip()


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
