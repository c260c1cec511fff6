"""AIM's relaxation: pull merged weights back to the base where the base's activations are large. arXiv:2502.02421.

    theta = theta_m - (1 - omega) * s * (theta_m - theta_0),   s = a / max(a)

a (d_in,) is the base's mean absolute input per channel, s its importance in [0, 1] on the weight's input axis.
"""

from __future__ import annotations

import torch
from torch import Tensor


def importance(activation: Tensor) -> Tensor:
    """Return s = a / max(a); zeros where nothing was active, so that nothing is relaxed there. (d_in,) -> (d_in,)."""
    largest = activation.max()
    return activation / largest if largest > 0 else torch.zeros_like(activation)


def relax(base: Tensor, merged: Tensor, s: Tensor, omega: float) -> Tensor:
    """Interpolate between merged (s = 0 or omega = 1) and base (s = 1 and omega = 0), exact at both ends.

    base, merged (rows, ...) fp32; s broadcastable to them -> (rows, ...). The sum is anchored at the nearer end: far
    from it, theta_m - (theta_m - theta_0) would not give theta_0 back in floating point.
    """
    pull = s * (1.0 - omega)
    difference = merged - base
    relaxed = torch.where(pull <= 0.5, merged - difference * pull, base + difference * (1.0 - pull))
    # the ends themselves bit for bit: x - 0 * y loses the sign of a zero x
    return torch.where(pull == 0, merged, torch.where(pull == 1, base, relaxed))


def relax_reference(base: Tensor, merged: Tensor, activation: Tensor, omega: float) -> Tensor:
    """The original's arithmetic: a bf16 task vector, fp32 factors and sum, bf16 result; activation broadcastable.

    At omega 1 this is not always the merged tensor, because the task vector was rounded.
    """
    s = activation / activation.max()
    return (base + (merged - base) * (1 - s * (1 - omega))).to(torch.bfloat16)
