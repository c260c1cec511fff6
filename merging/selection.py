"""The k largest of a value computed for every entry of a tensor, exactly, without sorting or holding it whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from console.errors import CheckpointError
from merging.tensors import Block, TensorGroup

SAMPLE = 1 << 16
"""Values looked at to bracket a threshold before the counting pass; no result depends on it."""

Values: TypeAlias = Callable[[Block], Tensor]
"""Gives the values of a block, (rows, ...) fp32, none of them negative."""


@dataclass(frozen=True)
class Threshold:
    """The k-th largest value of a tensor and how many entries equal to it are selected.

    `equal_before[block.start]` is the number of equal entries in the blocks before, so that each block can be selected
    from alone and the result does not depend on the blocks.
    """

    value: float
    equal: int
    equal_kept: int
    equal_before: dict[int, int]


def share(fraction: float, count: int) -> int:
    """Return floor(fraction * count), the fraction being the decimal that was written.

    0.57 of 100 is 57, though 0.57 * 100 is below 57 in binary.
    """
    return floor(Fraction(repr(fraction)) * count)


def top_threshold(group: TensorGroup, values: Values, keep: int) -> Threshold | None:
    """Find the threshold of the `keep` largest values, in two passes over the blocks.

    A sample brackets the k-th value; one pass counts what lies above the bracket and collects what lies in it. Returns
    None where everything is kept. Raises CheckpointError for NaN among the values.
    """
    if keep >= group.elements:
        return None
    low, high = _bracket(group, values, keep)
    above, inside = _collect(group, values, low, high)
    if not above < keep <= above + sum(map(len, inside.values())):  # the sample misled; take everything
        above, inside = _collect(group, values, -1.0, np.inf)
    candidates = np.concatenate(list(inside.values()))
    if len(candidates) < keep - above:  # NaN compares with nothing
        raise CheckpointError(f"Tensor {group.name} holds NaN in the base or in a model; it cannot be trimmed.")
    value = np.partition(candidates, len(candidates) - (keep - above))[len(candidates) - (keep - above)]
    larger = above + int((candidates > value).sum())
    equal_before, seen = {}, 0
    for start, found in inside.items():
        equal_before[start] = seen
        seen += int((found == value).sum())
    return Threshold(float(value), seen, keep - larger, equal_before)


def _flat(values: Values, block: Block) -> np.ndarray:
    return values(block).flatten().cpu().numpy()


def _bracket(group: TensorGroup, values: Values, keep: int) -> tuple[float, float]:
    """Return values that hold the k-th largest between them, very likely, from an evenly spaced sample."""
    if group.elements <= 4 * SAMPLE or keep == 0:
        return -1.0, np.inf
    stride = group.elements // SAMPLE
    pieces = []
    for block in group.blocks():
        first = -block.offset % stride
        pieces.append(_flat(values, block)[first::stride])
    sample = np.sort(np.concatenate(pieces))[::-1]
    part = keep / group.elements
    centre, margin = part * len(sample), 6 * np.sqrt(len(sample) * part * (1 - part)) + 8
    upper, lower = int(centre - margin), int(centre + margin)
    high = float(sample[upper]) if upper >= 0 else np.inf
    low = float(sample[lower]) if lower < len(sample) else -1.0
    return low, high


def _collect(group: TensorGroup, values: Values, low: float, high: float) -> tuple[int, dict[int, np.ndarray]]:
    """Return how many values exceed `high`, and those in [low, high] by the start of their block."""
    above, inside = 0, {}
    for block in group.blocks():
        flat = _flat(values, block)
        above += int((flat > high).sum())
        inside[block.start] = flat[(flat >= low) & (flat <= high)]
    return above, inside


def select(values: Tensor, threshold: Threshold | None, block: Block) -> Tensor:
    """Return which values of a block are selected, bool: those above the threshold, and a part of those equal to it.

    Equal entry number r of E is selected where floor((r + 1) K / E) > floor(r K / E), K being how many are: spread
    evenly in index order.
    """
    if threshold is None:
        return torch.ones_like(values, dtype=torch.bool)
    chosen = values > threshold.value
    if threshold.equal_kept == threshold.equal:
        chosen |= values == threshold.value
    elif threshold.equal_kept:
        chosen |= spread(
            values == threshold.value, threshold.equal_before[block.start], threshold.equal_kept, threshold.equal
        )
    return chosen


def spread(mask: Tensor, before: int, keep: int, total: int) -> Tensor:
    """Return an evenly spread part of a block's True entries: `keep` of `total`, `before` of them in earlier blocks."""
    positions = mask.flatten().nonzero().squeeze(1)
    rank = torch.arange(len(positions), device=positions.device) + before
    kept = torch.zeros_like(mask)
    kept.view(-1)[positions[(rank + 1) * keep // total > rank * keep // total]] = True
    return kept
