"""The k-th largest of many fp32 values by counting: exact, in constant memory, in any order of the values.

The bit patterns of non-negative fp32 numbers, read as whole numbers, are ordered as the numbers are. One pass counts
their upper 16 bits and tells which bin holds the k-th; a second counts the lower 16 bits within that bin, where few of
the 65536 occur: what is counted of a part is a short list. Counts of parts add up, so that it does not matter how the
values are cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

UPPER_BINS = 1 << 15
"""The sign bit is zero."""
LOWER_BINS = 1 << 16
INFINITY = 0x7F800000
"""Patterns above it are NaN."""


@dataclass(frozen=True)
class Threshold:
    """The k-th largest value of a tensor, and the number of entries equal to it that are selected.

    Attributes:
        value: the k-th largest value.
        equal: number of entries equal to it.
        equal_kept: number of those that are selected.
        equal_before: number of equal entries in the blocks before each block, by the block's start. A block can then
            be selected from alone, and the result does not depend on the blocks.
    """

    value: float
    equal: int
    equal_kept: int
    equal_before: dict[int, int]


def upper_counts(values: Tensor) -> Tensor:
    """Return the number of non-negative values (fp32, any shape) with each upper half; NaN is left out.

    (UPPER_BINS,) int64 on the CPU.
    """
    return torch.bincount(_patterns(values) >> 16, minlength=UPPER_BINS).cpu()


def lower_counts(values: Tensor, upper: int) -> tuple[Tensor, Tensor]:
    """Return the lower halves that values with that upper half have, ascending, and how many have each; int64, CPU."""
    patterns = _patterns(values)
    counts = torch.bincount(patterns[patterns >> 16 == upper] & 0xFFFF, minlength=LOWER_BINS).cpu()
    lower = counts.nonzero().squeeze(1)
    return lower, counts[lower]


def locate(counts: Tensor, keep: int) -> tuple[int, int]:
    """Return the bin that holds the `keep`-th largest (1 <= keep <= sum of the counts) and how many lie above it."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, keep))
    return len(counts) - 1 - place, int(from_top[place] - counts[len(counts) - 1 - place])


def value_of(upper: int, lower: int) -> float:
    """Return the number with those two halves."""
    return torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32).item()


def halves_of(value: float) -> tuple[int, int]:
    """Return the upper and the lower half of a non-negative number."""
    return divmod(int(torch.tensor(value, dtype=torch.float32).view(torch.int32)), LOWER_BINS)


def _patterns(values: Tensor) -> Tensor:
    """Bit patterns of the values that are not NaN, flattened, int32; -0 is 0."""
    patterns = values.contiguous().view(torch.int32).flatten() & 0x7FFFFFFF
    return patterns if not len(patterns) or int(patterns.max()) <= INFINITY else patterns[patterns <= INFINITY]
