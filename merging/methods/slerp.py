"""Spherical linear interpolation between the base and one model. Shoemake 1985 (SIGGRAPH), on whole weight tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from merging.methods.contract import Method
from merging.ops.block_arguments import BlockArguments, ConstantArguments
from merging.ops.gram import gram, norms
from merging.ops.tensor_blocks import TensorGroup

COLLINEAR = 0.9995
"""Beyond this |cosine| the arc is as good as a line, and its formula loses all digits."""


def tensor_statistics(group: TensorGroup, *, t: float) -> BlockArguments:
    """Compute the two coefficients from the angle between the base's and the model's whole tensors."""
    products = gram(group, with_base=True)
    length = [x if x > 1e-8 else 1.0 for x in norms(products).tolist()]
    cosine = max(-1.0, min(1.0, float(products[0, 1]) / (length[0] * length[1])))
    pair = (1.0 - t, t)
    if abs(cosine) <= COLLINEAR:
        theta = math.acos(cosine)
        pair = (math.sin((1.0 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta))
    return ConstantArguments(coefficients=pair)


def slerp(base: Tensor, finetuned: Tensor, *, coefficients: Sequence[float]) -> Tensor:
    """Return sin((1 - t) phi) / sin(phi) theta_0 + sin(t phi) / sin(phi) theta_1, phi the angle between them.

    base (rows, ...), finetuned (1, rows, ...) -> (rows, ...); a straight line where they are collinear.
    """
    return base * coefficients[0] + finetuned[0] * coefficients[1]


METHOD = Method(merge_block=slerp, tensor_statistics=tensor_statistics, elementwise=True)
