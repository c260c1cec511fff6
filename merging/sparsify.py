"""Making task vectors sparse: trim by magnitude (TIES), drop at random and rescale (DARE)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import floor

import numpy as np
import torch
from torch import Tensor

from console.errors import CheckpointError
from merging.tensors import Block, TensorGroup

SAMPLE = 1 << 16
"""Magnitudes looked at to bracket a threshold before the counting pass; no result depends on it."""


@dataclass(frozen=True)
class Threshold:
    """The k-th largest magnitude of a task vector and how many entries equal to it survive.

    `equal_before[block.start]` is the number of equal entries in the blocks before, so that each block can be trimmed
    alone and the result does not depend on the blocks.
    """

    value: float
    equal: int
    equal_kept: int
    equal_before: dict[int, int]


def kept_count(density: float, elements: int) -> int:
    """Return how many entries of a tensor survive trimming: exactly max(1, floor(density * elements)).

    The density counts as the decimal that was written: 0.57 of 100 is 57, though 0.57 * 100 is below 57 in binary.
    """
    return min(elements, max(1, floor(Fraction(repr(density)) * elements)))


def trim_threshold(group: TensorGroup, model: int, density: float) -> Threshold | None:
    """Find the trim threshold of one model's task vector, exactly, in two passes over its blocks.

    A sample brackets the k-th magnitude; one pass counts what lies above the bracket and collects what lies in it.
    Returns None where nothing is trimmed (density 1). Raises CheckpointError for a tensor with NaN in it.
    """
    keep = kept_count(density, group.elements)
    if keep >= group.elements:
        return None
    magnitudes = partial(_magnitudes, group, model)
    low, high = _bracket(group, magnitudes, keep)
    above, inside = _collect(group, magnitudes, low, high)
    if not above < keep <= above + sum(map(len, inside.values())):  # the sample misled; take everything
        above, inside = _collect(group, magnitudes, -1.0, np.inf)
    candidates = np.concatenate(list(inside.values()))
    if len(candidates) < keep - above:  # NaN compares with nothing
        raise CheckpointError(
            f"Tensor {group.name} holds NaN in the base or in model {model + 1}; it cannot be trimmed."
        )
    value = np.partition(candidates, len(candidates) - (keep - above))[len(candidates) - (keep - above)]
    larger = above + int((candidates > value).sum())
    equal_before, seen = {}, 0
    for start, values in inside.items():
        equal_before[start] = seen
        seen += int((values == value).sum())
    return Threshold(float(value), seen, keep - larger, equal_before)


def _magnitudes(group: TensorGroup, model: int, block: Block) -> np.ndarray:
    return group.task_vector(model, block).abs_().flatten().cpu().numpy()


def _bracket(group: TensorGroup, magnitudes, keep: int) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """Return magnitudes that hold the k-th largest between them, very likely, from an evenly spaced sample."""
    if group.elements <= 4 * SAMPLE:
        return -1.0, np.inf
    stride = group.elements // SAMPLE
    pieces = []
    for block in group.blocks():
        first = -block.offset % stride
        pieces.append(magnitudes(block)[first::stride])
    sample = np.sort(np.concatenate(pieces))[::-1]
    share = keep / group.elements
    centre, margin = share * len(sample), 6 * np.sqrt(len(sample) * share * (1 - share)) + 8
    upper, lower = int(centre - margin), int(centre + margin)
    high = float(sample[upper]) if upper >= 0 else np.inf
    low = float(sample[lower]) if lower < len(sample) else -1.0
    return low, high


def _collect(group: TensorGroup, magnitudes, low: float, high: float):  # type: ignore[no-untyped-def]
    """Return how many magnitudes exceed `high`, and those in [low, high] by the start of their block."""
    above, inside = 0, {}
    for block in group.blocks():
        values = magnitudes(block)
        above += int((values > high).sum())
        inside[block.start] = values[(values >= low) & (values <= high)]
    return above, inside


def trim(task_vector: Tensor, threshold: Threshold | None, block: Block) -> Tensor:
    """Set to zero what lies below the threshold; of the entries equal to it, keep an evenly spread part.

    task_vector (rows, ...) fp32 -> the same shape. Equal entry number r of E is kept where
    floor((r + 1) K / E) > floor(r K / E), K being how many survive: spread evenly in index order.
    """
    if threshold is None:
        return task_vector
    magnitude = task_vector.abs()
    keep = magnitude > threshold.value
    if threshold.equal_kept == threshold.equal:
        keep |= magnitude == threshold.value
    elif threshold.equal_kept:
        positions = (magnitude == threshold.value).flatten().nonzero().squeeze(1)
        rank = torch.arange(len(positions), device=positions.device) + threshold.equal_before[block.start]
        step = threshold.equal_kept
        survives = (rank + 1) * step // threshold.equal > rank * step // threshold.equal
        keep.view(-1)[positions[survives]] = True
    return task_vector * keep


def keep_mask(block: Block, shape: torch.Size, *, name: str, model: int, density: float, seed: int) -> Tensor:
    """Return DARE's mask (rows, ...) bool on the CPU: True with probability `density`, entry by entry.

    The mask is a function of seed, model position, tensor name and element index alone: element i takes the i-th
    32-bit word of a Philox stream (Salmon et al. 2011, counter-based) whose key is the digest of the other three.
    """
    words_per_step = 8  # one Philox counter step gives 256 bits
    digest = hashlib.sha256(f"{seed}|{model}|{name}".encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    generator.advance(block.offset // words_per_step)
    skipped = block.offset % words_per_step
    words = np.random.Generator(generator).integers(
        0, 1 << 64, size=(skipped + block.elements + 1) // 2, dtype=np.uint64
    )
    drawn = words.astype("<u8", copy=False).view("<u4")[skipped : skipped + block.elements]
    return torch.from_numpy(drawn < np.uint64(round(density * 2**32))).reshape(shape)
