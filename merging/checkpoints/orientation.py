"""Which matrices a checkpoint stores [in, out] in place of torch.nn.Linear's [out, in], told from shapes alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from merging.checkpoints.tensor_names import layer_of


def transposed_names(shapes: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """Return the names of the matrices that are stored [in, out], as GPT-2's Conv1D has them.

    A bias is as long as the output. Where it runs along axis 1 of every matrix of a stack of layers that is not square,
    and along axis 0 of none, the stack stores [in, out], its square matrices too. Tensors are {name: shape}.
    """
    axes: dict[str, dict[str, set[int]]] = defaultdict(dict)
    for name, shape in shapes.items():
        bias, layer = shapes.get(f"{name.removesuffix('weight')}bias"), layer_of(name)
        if layer and name.endswith(".weight") and len(shape) == 2 and bias is not None and len(bias) == 1:
            axes[layer[0]][name] = {axis for axis in (0, 1) if shape[axis] == bias[0]}
    found = [stack for stack in axes.values() if {1} in stack.values() and {0} not in stack.values()]
    return frozenset(name for stack in found for name in stack)
