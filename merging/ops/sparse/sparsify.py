"""Sparsification of task vectors: trimming by magnitude (TIES), random masks (DARE, DELLA)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from merging.ops.order_statistics import Threshold
from merging.ops.selection import Magnitudes, select, share, top_thresholds
from merging.ops.tensor_blocks import Block, TensorGroup


def kept_count(density: float, elements: int) -> int:
    """Return the number of entries that survive trimming: max(1, floor(density * elements))."""
    return min(elements, max(1, share(density, elements)))


def trim_thresholds(group: TensorGroup, density: Sequence[float]) -> list[Threshold | None]:
    """Return the threshold that trims each model's task vector to its density; None where nothing is trimmed.

    Raises NotANumberError for a tensor with NaN in it.
    """
    counts = [kept_count(d, group.elements) for d in density]
    return top_thresholds(group, [(Magnitudes(group, i), keep) for i, keep in enumerate(counts)])


def trim(task_vector: Tensor, threshold: Threshold | None, block: Block) -> Tensor:
    """Return the task vector with the dropped entries set to zero; task_vector (rows, ...) fp32 -> the same shape."""
    return task_vector if threshold is None else task_vector * select(task_vector.abs(), threshold, block)


def mask_limit(density: float) -> int:
    """Return the number of 32-bit words, of 2^32, below which an entry with probability `density` is kept."""
    return round(density * 2**32)


def stream_key(name: str, model: int, seed: int) -> int:
    """Return the 128-bit key of the random stream of one tensor of one model."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{model}|{name}".encode()).digest()[:16], "little")


def keep_mask(block: Block, shape: torch.Size, *, name: str, model: int, density: float | Tensor, seed: int) -> Tensor:
    """Return DARE's mask (rows, ...) bool on the CPU: True with probability `density`, entry by entry.

    `density` may be a tensor (rows, ...) of probabilities. The mask is a function of seed, model position, tensor name
    and element index alone: element i takes the i-th 32-bit word of a Philox stream (Salmon et al. 2011, counter-based)
    whose key is the digest of the other three.
    """
    words_per_step = 8  # one Philox counter step gives 256 bits
    generator = np.random.Philox(key=stream_key(name, model, seed))
    generator.advance(block.offset // words_per_step)
    skipped = block.offset % words_per_step
    words = np.random.Generator(generator).integers(
        0, 1 << 64, size=(skipped + block.elements + 1) // 2, dtype=np.uint64
    )
    random_words = words.astype("<u8", copy=False).view("<u4")[skipped : skipped + block.elements]
    if isinstance(density, Tensor):
        return torch.from_numpy(random_words < np.round(density.double().cpu().numpy().reshape(-1) * 2**32)).reshape(
            shape
        )
    return torch.from_numpy(random_words < np.uint64(mask_limit(density))).reshape(shape)
