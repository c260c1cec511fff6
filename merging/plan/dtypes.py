"""Dtypes of result tensors: a tensor that every input stores in a wider dtype than its other tensors keeps it.

Routers' correction biases, Mamba's A and D and some norms are stored in float32 next to bfloat16 matrices for range or
precision.
"""

from __future__ import annotations

from collections.abc import Sequence

from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.storage import CODES, DTYPES


def width(dtype: str) -> int:
    """Return the bytes of one element."""
    return DTYPES[CODES[dtype]][1]


def wider_dtype(sources: Sequence[tuple[Checkpoint, str]], default: str) -> str:
    """Return the dtype of a result tensor: the narrowest stored one where all sources store it wider.

    A dtype is wider where it is wider than that of most bytes of the checkpoint. Dequantized tensors, and those that an
    adapter changes, do not count as wider.

    Args:
        sources: (checkpoint, stored name) of each input.
        default: Dtype of the result's other tensors.
    """
    infos = [checkpoint.tensors[name] for checkpoint, name in sources]
    wide = all(
        width(info.dtype) > width(checkpoint.main_dtype) and not info.is_calculated
        for info, (checkpoint, _) in zip(infos, sources, strict=True)
    )
    narrowest = min((info.dtype for info in infos), key=width)
    return narrowest if wide and width(narrowest) > width(default) else default
