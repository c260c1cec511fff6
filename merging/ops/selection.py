"""Selection of the k largest of a value computed for every entry of a tensor: exact, without sorting it."""

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
from merging.ops.kernels.kernels import kernels
from merging.ops.order_statistics import (
    LOWER_BINS,
    UPPER_BINS,
    Threshold,
    halves_of,
    locate,
    lower_counts,
    upper_counts,
    value_of,
)
from merging.ops.tensor_blocks import BLOCK_ELEMENTS, Block, TensorGroup, cut

MAX_COUNTED = 1 << 22
"""Most values that are counted at a time: a table of 32768 counts is filled and added up for each."""
MAX_CACHED_COUNTS = 1 << 20
"""Most counts that are cached until the threshold is known; no result depends on it."""

BinCounts: TypeAlias = tuple[Tensor, Tensor]
"""Lower halves that occur in a bin, ascending, and the number of values that have each."""
Item = TypeVar("Item")
Result = TypeVar("Result")
Values: TypeAlias = Callable[[Block], Tensor]
"""Returns the values of a block, (rows, ...) fp32, none of them negative."""


@dataclass(frozen=True)
class Magnitudes:
    """|theta_t - theta_0| of model number `model`, (rows, ...) fp32 when called with a block."""

    group: TensorGroup
    model: int

    def __call__(self, block: Block) -> Tensor:
        """Return the magnitudes of a block."""
        return self.group.task_vector(self.model, block).abs_()

    @property
    def compiled(self) -> bool:
        """True where a kernel counts the stored tensors, several blocks at a time.

        It does so whatever device computes the blocks: a count is the same everywhere, and partial counts from a GPU
        would have to be waited for.
        """
        return kernels() is not None

    def upper_counts(self, block: Block) -> Tensor:
        """Return `order_statistics.upper_counts` of the block's values."""
        compiled = kernels()
        if compiled is not None:
            counts = torch.zeros(UPPER_BINS, dtype=torch.int64)
            if compiled.upper_halves(*self._stored(block), counts):
                return counts
        return upper_counts(self(block))  # NaN is left out

    def lower_counts(self, block: Block, upper: int) -> tuple[Tensor, Tensor]:
        """Return `order_statistics.lower_counts` of the block's values."""
        compiled = kernels()
        return compiled.lower_halves(*self._stored(block), upper) if compiled else lower_counts(self(block), upper)

    def _stored(self, block: Block) -> tuple[Tensor, Tensor]:
        assert self.group.base is not None
        return self.group.base[block.rows], self.group.finetuned[self.model][block.rows]


def share(fraction: float, count: int) -> int:
    """Return floor(fraction * count), the fraction being the decimal that was written.

    0.57 of 100 is 57, though 0.57 * 100 is below 57 in binary.
    """
    return floor(Fraction(repr(fraction)) * count)


def top_threshold(group: TensorGroup, values: Values, keep: int) -> Threshold | None:
    """Return `top_thresholds` of one kind of values."""
    return top_thresholds(group, [(values, keep)])[0]


def top_thresholds(group: TensorGroup, requests: Sequence[tuple[Values, int]]) -> list[Threshold | None]:
    """Return the thresholds of the largest values, in two passes over the blocks (three past MAX_CACHED_COUNTS).

    The first pass finds the bin of `merging.ops.order_statistics` that holds the `keep`-th value, the second counts the
    values in that bin.

    Args:
        group: the tensor.
        requests: pairs of values and the number of entries to keep.

    Returns:
        A threshold for each request; None where everything is kept.

    Raises:
        NotANumberError: if fewer than `keep` values are numbers.
    """
    thresholds: list[Threshold | None] = [None if keep else Threshold(inf, 0, 0, {}) for _, keep in requests]
    ranked = [i for i, (_, keep) in enumerate(requests) if 0 < keep < group.elements]
    distinct = list({id(requests[i][0]): requests[i][0] for i in ranked}.values())
    histograms = dict(zip(map(id, distinct), upper_histograms(group, distinct), strict=True))
    places = []
    for values, keep in (requests[i] for i in ranked):
        if int(histograms[id(values)].sum()) < keep:
            raise NotANumberError(f"Tensor {group.name} holds NaN and cannot be trimmed")
        places.append(locate(histograms[id(values)], keep))
    bins = [(requests[i][0], upper) for i, (upper, _) in zip(ranked, places, strict=True)]
    counts = torch.zeros(len(bins), LOWER_BINS, dtype=torch.int64)
    cached: list[dict[int, BinCounts]] = [{} for _ in bins]
    n_cached = 0
    for j, block, inside in inside_bins(group, bins):
        counts[j, inside[0]] += inside[1]
        n_cached += len(inside[0])
        if n_cached <= MAX_CACHED_COUNTS:
            cached[j][block.start] = inside
    for j, (upper, above) in enumerate(places):
        values, keep = requests[ranked[j]]
        place, larger = locate(counts[j], keep - above)
        value = value_of(upper, place)
        if n_cached <= MAX_CACHED_COUNTS:
            equal = _count_equal(cached[j].items(), place)
        else:
            equal = equal_entries(group, values, value)
        thresholds[ranked[j]] = Threshold(value, int(counts[j, place]), keep - above - larger, running(equal))
    return thresholds


def upper_histograms(group: TensorGroup, all_values: Sequence[Values]) -> list[Tensor]:
    """Return `order_statistics.upper_counts` of a whole tensor for each of the values."""
    histograms = [torch.zeros(UPPER_BINS, dtype=torch.int64) for _ in all_values]

    def count(item: tuple[Block, int]) -> tuple[int, Tensor]:
        block, i = item
        values = all_values[i]
        return i, values.upper_counts(block) if isinstance(values, Magnitudes) else upper_counts(values(block))

    per_thread = group.elements * len(all_values) // (4 * threads()) if _use_kernels(all_values) else 0
    blocks = cut(group.shape, min(max(per_thread, BLOCK_ELEMENTS), MAX_COUNTED))
    for i, counts in _map_blocks(all_values, count, itertools.product(blocks, range(len(all_values)))):
        histograms[i] += counts
    return histograms


def inside_bins(group: TensorGroup, bins: Sequence[tuple[Values, int]]) -> Iterator[tuple[int, Block, BinCounts]]:
    """Yield, for each block and each (values, bin), its index, the block, and the counts of the values in the bin."""

    def count(item: tuple[Block, int]) -> tuple[int, Block, BinCounts]:
        block, i = item
        values, upper = bins[i]
        if isinstance(values, Magnitudes):
            return i, block, values.lower_counts(block, upper)
        return i, block, lower_counts(values(block), upper)

    yield from _map_blocks([values for values, _ in bins], count, itertools.product(group.blocks(), range(len(bins))))


def _map_blocks(
    all_values: Sequence[Values], function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterable[Result]:
    return in_order(function, items) if _use_kernels(all_values) else map(function, items)


def _use_kernels(all_values: Sequence[Values]) -> bool:
    """Return True where kernels count all of the values as they are stored: in threads, and without memory for them."""
    return all(isinstance(values, Magnitudes) and values.compiled for values in all_values)


def equal_entries(group: TensorGroup, values: Values, value: float) -> dict[int, int]:
    """Return the number of values equal to `value` in each block, by the block's start."""
    upper, place = halves_of(value)
    return _count_equal(((block.start, inside) for _, block, inside in inside_bins(group, [(values, upper)])), place)


def _count_equal(by_block: Iterable[tuple[int, BinCounts]], place: int) -> dict[int, int]:
    return {start: int(number[lower == place].sum()) for start, (lower, number) in by_block}


def running(counts: Mapping[int, int], before: int = 0) -> dict[int, int]:
    """Return the running total before each block, `before` before the first."""
    totals = {}
    for start, count in counts.items():
        totals[start] = before
        before += count
    return totals


def select(values: Tensor, threshold: Threshold | None, block: Block) -> Tensor:
    """Return the mask of selected values of a block: those above the threshold, and a part of those equal to it.

    Equal entry number r of E is selected where floor((r + 1) K / E) > floor(r K / E), K being the number selected:
    spread evenly in index order.
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
    part = torch.zeros_like(mask)
    part.view(-1)[positions[(rank + 1) * keep // total > rank * keep // total]] = True
    return part
