"""The k largest of a value computed for every entry of a tensor, exactly, without sorting or holding it whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor, inf
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from common.errors import NotANumberError
from common.threads import in_order, threads
from merging.ops.magnitudes import Magnitudes
from merging.ops.order_statistics import LOWER_BINS, UPPER_BINS, halves_of, locate, lower_counts, upper_counts, value_of
from merging.ops.tensor_blocks import BLOCK_ELEMENTS, Block, TensorGroup, cut

MOST_COUNTED = 1 << 22
"""Most values that are counted at a time: a table of 32768 counts is filled and added up for each."""
HELD = 1 << 20
"""Most counts that are held until the threshold is known; no result depends on it."""

Inside: TypeAlias = tuple[Tensor, Tensor]
Item = TypeVar("Item")
Result = TypeVar("Result")
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
    """Return `top_thresholds` of one kind of values."""
    return top_thresholds(group, [(values, keep)])[0]


def top_thresholds(group: TensorGroup, wanted: Sequence[tuple[Values, int]]) -> list[Threshold | None]:
    """Find the threshold of the `keep` largest of each of the values, in two passes over the blocks (three past HELD).

    The first pass finds the bin of `merging.ops.order_statistics` that holds the `keep`-th, the second counts what that
    bin holds. A threshold is None where everything is kept. Raises NotANumberError where fewer than `keep` values are
    numbers.
    """
    found: list[Threshold | None] = [None if keep else Threshold(inf, 0, 0, {}) for _, keep in wanted]
    ranked = [i for i, (_, keep) in enumerate(wanted) if 0 < keep < group.elements]
    of = list({id(wanted[i][0]): wanted[i][0] for i in ranked}.values())
    histograms = dict(zip(map(id, of), upper_histograms(group, of), strict=True))
    places = []
    for values, keep in (wanted[i] for i in ranked):
        if int(histograms[id(values)].sum()) < keep:
            raise NotANumberError(f"Tensor {group.name} holds NaN and cannot be trimmed")
        places.append(locate(histograms[id(values)], keep))
    bins = [(wanted[i][0], upper) for i, (upper, _) in zip(ranked, places, strict=True)]
    counts = torch.zeros(len(bins), LOWER_BINS, dtype=torch.int64)
    seen: list[dict[int, Inside]] = [{} for _ in bins]
    held = 0
    for j, block, inside in inside_bins(group, bins):
        counts[j, inside[0]] += inside[1]
        held += len(inside[0])
        if held <= HELD:
            seen[j][block.start] = inside
    for j, (upper, above) in enumerate(places):
        values, keep = wanted[ranked[j]]
        place, larger = locate(counts[j], keep - above)
        value = value_of(upper, place)
        equal = _equal(seen[j].items(), place) if held <= HELD else equal_entries(group, values, value)
        found[ranked[j]] = Threshold(value, int(counts[j, place]), keep - above - larger, running(equal))
    return found


def upper_histograms(group: TensorGroup, of: Sequence[Values]) -> list[Tensor]:
    """Return `ranks.upper_counts` of a whole tensor for each of the values."""
    found = [torch.zeros(UPPER_BINS, dtype=torch.int64) for _ in of]

    def work(item: tuple[Block, int]) -> tuple[int, Tensor]:
        block, i = item
        values = of[i]
        return i, values.upper_counts(block) if isinstance(values, Magnitudes) else upper_counts(values(block))

    each = group.elements * len(of) // (4 * threads()) if _counted(of) else 0
    blocks = cut(group.shape, min(max(each, BLOCK_ELEMENTS), MOST_COUNTED))
    for i, counts in _each(of, work, itertools.product(blocks, range(len(of)))):
        found[i] += counts
    return found


def inside_bins(group: TensorGroup, of: Sequence[tuple[Values, int]]) -> Iterator[tuple[int, Block, Inside]]:
    """Yield, for each block and each (values, bin), which it is and `ranks.lower_counts` of its values in the bin."""

    def work(item: tuple[Block, int]) -> tuple[int, Block, Inside]:
        block, i = item
        values, upper = of[i]
        if isinstance(values, Magnitudes):
            return i, block, values.lower_counts(block, upper)
        return i, block, lower_counts(values(block), upper)

    yield from _each([values for values, _ in of], work, itertools.product(group.blocks(), range(len(of))))


def _each(of: Sequence[Values], work: Callable[[Item], Result], items: Iterable[Item]) -> Iterable[Result]:
    return in_order(work, items) if _counted(of) else map(work, items)


def _counted(of: Sequence[Values]) -> bool:
    """Whether kernels count all of the values as they are stored: in threads, and without memory for them."""
    return all(isinstance(values, Magnitudes) and values.compiled for values in of)


def equal_entries(group: TensorGroup, values: Values, value: float) -> dict[int, int]:
    """Return how many values of each block, by its start, are equal to `value`."""
    upper, place = halves_of(value)
    return _equal(((block.start, inside) for _, block, inside in inside_bins(group, [(values, upper)])), place)


def _equal(found: Iterable[tuple[int, Inside]], place: int) -> dict[int, int]:
    return {start: int(number[lower == place].sum()) for start, (lower, number) in found}


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
