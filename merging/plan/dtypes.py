"""Output dtypes: a tensor that every input stores in a wider dtype than the rest keeps it.

Routers' correction biases, Mamba's A and D and some norms are stored in float32 beside bfloat16 matrices, since their
range or precision matters.
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
    """Return the floating-point dtype that most bytes of a checkpoint are stored in; float32 where it has none."""
    sizes: Counter[str] = Counter()
    for info in tensors.values():
        if info.dtype in FLOATS:
            sizes[info.dtype] += tensor_bytes(info.shape, info.dtype)
    return sizes.most_common(1)[0][0] if sizes else "float32"


class WideTensors:
    """Finds the tensors that every input stores in a wider dtype than most of its weights."""

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self._main = {id(checkpoint): main_dtype(checkpoint.tensors) for checkpoint in checkpoints}

    def dtype_of(self, sources: Sequence[tuple[Checkpoint, str]], otherwise: str) -> str:
        """Return the dtype of an output tensor: the narrowest that its sources store, where all store it wider.

        sources: (checkpoint, stored name). otherwise: the dtype of the result's other tensors. Tensors that are
        dequantized, or that an adapter is added to, are stored in no wider dtype.
        """
        infos = [checkpoint.tensors[name] for checkpoint, name in sources]
        stored = [info.dtype for info in infos]
        wide = all(
            width(info.dtype) > width(self._main[id(checkpoint)]) and not info.is_calculated
            for info, (checkpoint, _) in zip(infos, sources, strict=True)
        )
        narrowest = min(stored, key=width)
        return narrowest if wide and width(narrowest) > width(otherwise) else otherwise
