"""What this machine's processor computes in."""

from __future__ import annotations

import os

BFLOAT16 = ("avx512_bf16", "amx_bf16", "arm_bf16", "sve_bf16", "bf16")
"""Names under which torch lists instructions for products of bfloat16 numbers."""


def usable_cores() -> int:
    """Return how many cores this process may use, which a container or a queue may have bound it to."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16 numbers.

    Without them torch emulates such products: large ones at a seventh of float32's speed on an AVX2 machine.
    """
    import torch

    listed = getattr(torch.cpu, "get_capabilities", None)  # torch 2.12 and later
    if listed is not None:
        found = listed()
        return any(found.get(name) for name in BFLOAT16)
    asked = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    return any(ask is not None and ask() for ask in asked)


def product_dtype(device_type: str) -> str:
    """Return the dtype for the products of a model where nobody says: bfloat16, or float32 where that is emulated."""
    return "float32" if device_type == "cpu" and not multiplies_bfloat16() else "bfloat16"
