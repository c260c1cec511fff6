"""The k largest of a value computed for every entry of a tensor, exactly, without sorting or holding it whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import floor, inf
from typing import TypeAlias

import torch
from torch import Tensor

from console.errors import NotANumberError
from merging.magnitudes import Magnitudes
from merging.parallel import in_order
from merging.ranks import LOWER_BINS, UPPER_BINS, locate, lower_counts, upper_counts, value_of, within
from merging.tensors import Block, TensorGroup, cut

COLLECTED = 1 << 22
"""Most values that are held at once; no result depends on it."""

COUNTED = 1 << 21
"""Values that are counted at a time; no result depends on it."""

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
    """Find the threshold of the `keep` largest values, in two passes over the blocks, or three.

    The first pass finds the bin of `merging.ranks` that holds the `keep`-th; the second collects that bin, unless it
    holds more than COLLECTED values (equal ones, mostly): then it is counted, and a third counts the equal ones.
    Returns None where everything is kept. Raises NotANumberError where fewer than `keep` values are numbers.
    """
    if keep >= group.elements:
        return None
    if keep == 0:
        return Threshold(inf, 0, 0, {})
    counts = torch.zeros(UPPER_BINS, dtype=torch.int64)
    for found in _each(values, lambda block: _upper_counts(values, block), cut(group.shape, COUNTED)):
        counts += found
    if int(counts.sum()) < keep:
        raise NotANumberError(f"Tensor {group.name} holds NaN and cannot be trimmed")
    upper, above = locate(counts, keep)
    if int(counts[upper]) > COLLECTED:
        value, larger, equal = _counted(group, values, upper, keep - above)
    else:
        value, larger, equal = _collected(group, values, upper, keep - above)
    return Threshold(value, sum(equal.values()), keep - above - larger, running(equal))


def _each(values: Values, work: Callable[[Block], Tensor], blocks: Iterable[Block]) -> Iterable[Tensor]:
    return in_order(work, blocks) if isinstance(values, Magnitudes) and values.compiled else map(work, blocks)


def _upper_counts(values: Values, block: Block) -> Tensor:
    return values.upper_counts(block) if isinstance(values, Magnitudes) else upper_counts(values(block))


def _within(values: Values, block: Block, upper: int) -> Tensor:
    return values.within(block, upper) if isinstance(values, Magnitudes) else within(values(block), upper)


def _collected(group: TensorGroup, values: Values, upper: int, keep: int) -> tuple[float, int, dict[int, int]]:
    """Return the `keep`-th largest value of a bin, how many in it are larger, and how many are equal in each block."""
    blocks = list(group.blocks())
    found_in = _each(values, lambda block: _within(values, block, upper), blocks)
    inside = {block.start: found for block, found in zip(blocks, found_in, strict=True)}
    candidates = torch.cat(list(inside.values()))
    value = torch.kthvalue(candidates, len(candidates) - keep + 1).values
    larger = int((candidates > value).sum())
    return value.item(), larger, {start: int((found == value).sum()) for start, found in inside.items()}


def _counted(group: TensorGroup, values: Values, upper: int, keep: int) -> tuple[float, int, dict[int, int]]:
    """Return the same without holding the bin."""
    counts = torch.zeros(LOWER_BINS, dtype=torch.int64)
    for block in group.blocks():
        counts += lower_counts(values(block), upper)
    lower, larger = locate(counts, keep)
    value = value_of(upper, lower)
    return value, larger, equal_entries(group, values, value)


def equal_entries(group: TensorGroup, values: Values, value: float) -> dict[int, int]:
    """Return how many values of each block, by its start, are equal to `value`."""
    return {block.start: int((values(block) == value).sum()) for block in group.blocks()}


def running(counts: Mapping[int, int], before: int = 0) -> dict[int, int]:
    """Return, for each block, how many were counted in the blocks before it; `before` before the first."""
    totals = {}
    for start, count in counts.items():
        totals[start] = before
        before += count
    return totals


def select(values: Tensor, threshold: Threshold | None, block: Block) -> Tensor:
    """Return which values of a block are selected, bool: those above the threshold, and a part of those equal to it.

    Equal entry number r of E is selected where floor((r + 1) K / E) > floor(r K / E), K being how many are: spread
    evenly in index order.
    """
    if threshold is None:
        return torch.ones_like(values, dtype=torch.bool)
    chosen = values > threshold.value
    if 0 < threshold.equal_kept == threshold.equal:
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
