"""Dtypes of result tensors: a tensor that every input stores in a wider dtype than its other tensors keeps it.

Routers' correction biases, Mamba's A and D and some norms are stored in float32 next to bfloat16 matrices for range or
precision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.storage import CODES, DTYPES, FLOATS, TensorInfo, tensor_bytes


def width(dtype: str) -> int:
    """Return the bytes of one element."""
    return DTYPES[CODES[dtype]][1]


def main_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """Return the floating-point dtype of most bytes of a checkpoint; float32 where it has no such tensors."""
    sizes: Counter[str] = Counter()
    for info in tensors.values():
        if info.dtype in FLOATS:
            sizes[info.dtype] += tensor_bytes(info.shape, info.dtype)
    return sizes.most_common(1)[0][0] if sizes else "float32"


class WideTensors:
    """Dtypes of result tensors that every input stores in a wider dtype than most of its weights."""

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self._main = {id(checkpoint): main_dtype(checkpoint.tensors) for checkpoint in checkpoints}

    def dtype_of(self, sources: Sequence[tuple[Checkpoint, str]], default: str) -> str:
        """Return the dtype of a result tensor: the narrowest stored one where all sources store it wider.

        Dequantized tensors, and those that an adapter changes, do not count as wider.

        Args:
            sources: (checkpoint, stored name) of each input.
            default: Dtype of the result's other tensors.
        """
        infos = [checkpoint.tensors[name] for checkpoint, name in sources]
        stored = [info.dtype for info in infos]
        wide = all(
            width(info.dtype) > width(self._main[id(checkpoint)]) and not info.is_calculated
            for info, (checkpoint, _) in zip(infos, sources, strict=True)
        )
        narrowest = min(stored, key=width)
        return narrowest if wide and width(narrowest) > width(default) else default
