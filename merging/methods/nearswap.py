"""NearSwap: take the model where it hardly differs from the base. alchemonaut 2024 (QuartetAnemoi-70B-t0.0001)."""

from __future__ import annotations

from torch import Tensor

from merging.methods.contract import Method
from merging.ops.consensus import add_to


def nearswap(base: Tensor, finetuned: Tensor, *, t: float) -> Tensor:
    """Return theta_0 + w (theta_1 - theta_0), w = min(1, t / max(|theta_1 - theta_0|, 1e-6)).

    base (rows, ...), finetuned (1, rows, ...) -> (rows, ...): no entry changes by more than t.
    """
    task_vector = finetuned[0] - base
    return add_to(base, task_vector * (t / task_vector.abs().clamp(min=1e-6)).clamp(0, 1))


METHOD = Method(merge_block=nearswap, elementwise=True)
