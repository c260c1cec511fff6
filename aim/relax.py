"""AIM's relaxation: pull merged weights back to the base where the base's activations are large. arXiv:2502.02421.

    theta = theta_m - (1 - omega) * s * (theta_m - theta_0),   s = a / max(a)

a (d_in,) is the base's mean absolute input per channel, s its importance in [0, 1] on the weight's input axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from merging.ops.consensus import add_to


def importance(activation: Tensor) -> Tensor:
    """Return s = a / max(a); zeros where nothing was active, so that nothing is relaxed there.

    (d_in,) -> (d_in,); (experts, d_in) -> (experts, d_in), each expert by its own maximum.
    """
    largest = activation.amax(-1, keepdim=True)
    return torch.where(largest > 0, activation / largest.where(largest > 0, 1.0), 0.0)


def along_rows(s: Tensor, shape: Sequence[int], axis: int, start: int, stop: int, dimensions: int) -> Tensor:
    """Return s so that it broadcasts to rows start:stop of a weight.

    s (channels,) along `axis` of a weight of `shape`, or (experts, channels) for a stack along axis 0. dimensions: 2
    for a weight of three or more whose leading axes are read as one long axis of rows, else the weight's own number.
    """
    axis %= len(shape)
    if dimensions == len(shape) and s.dim() == 1:
        part = s[start:stop] if axis == 0 else s
        return part.reshape([-1 if i == axis else 1 for i in range(dimensions)])
    if dimensions == len(shape):
        return s[start:stop].reshape(stop - start, *[-1 if i == axis else 1 for i in range(1, dimensions)])
    rows = torch.arange(start, stop, device=s.device)
    last = axis == len(shape) - 1
    if s.dim() == 1:
        return s if last else s[_index(rows, shape, axis)][:, None]
    row_index = _index(rows, shape, 0)
    return s[row_index] if last else s[row_index, _index(rows, shape, axis)][:, None]


def _index(rows: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """The index along an axis of rows that count all axes but the last."""
    return rows.div(math.prod(shape[axis + 1 : -1]), rounding_mode="floor") % shape[axis]


def relax_tensor(base: Tensor, merged: Tensor, s: Tensor, omega: float) -> Tensor:
    """Interpolate between merged (s = 0 or omega = 1) and base (s = 1 and omega = 0), exact at both ends.

    base, merged (rows, ...) fp32; s broadcastable to them -> (rows, ...). The sum is anchored at the nearer end: far
    from it, theta_m - (theta_m - theta_0) would not give theta_0 back in floating point.
    """
    pull = s * (1.0 - omega)
    difference = merged - base
    relaxed = torch.where(pull <= 0.5, merged - difference * pull, add_to(base, difference * (1.0 - pull)))
    # the ends themselves bit for bit: x - 0 * y loses the sign of a zero x
    return torch.where(pull == 0, merged, torch.where(pull == 1, base, relaxed))


def relax_reference(base: Tensor, merged: Tensor, activation: Tensor, omega: float) -> Tensor:
    """The original's arithmetic: a bf16 task vector, fp32 factors and sum, bf16 result; activation broadcastable.

    At omega 1 this is not always the merged tensor, because the task vector was rounded.
    """
    s = activation / activation.max()
    return (base + (merged - base) * (1 - s * (1 - omega))).to(torch.bfloat16)
