"""Hardware of this machine: cores, bfloat16 support, available memory, out-of-memory errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BFLOAT16 = ("avx512_bf16", "amx_bf16", "arm_bf16", "sve_bf16", "bf16")
"""torch's names of instruction sets with bfloat16 products."""
OUT_OF_MEMORY = ("outofmemoryerror", "out of memory", "can't allocate memory", "not enough memory", "bad_alloc")


def usable_cores() -> int:
    """Return the number of CPU cores available to this process (its affinity)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def multiplies_bfloat16() -> bool:
    """Return True where the processor has instructions for bfloat16 products.

    Without them torch emulates such products, which is much slower than float32.
    """
    import torch

    get_capabilities = getattr(torch.cpu, "get_capabilities", None)  # torch 2.12 and later
    if get_capabilities is not None:
        capabilities = get_capabilities()
        return any(capabilities.get(name) for name in BFLOAT16)
    checks = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    return any(check is not None and check() for check in checks)


def product_dtype(device_type: str) -> str:
    """Return the default dtype of a model's forward pass: bfloat16, or float32 on CPUs that emulate bfloat16."""
    return "float32" if device_type == "cpu" and not multiplies_bfloat16() else "bfloat16"


def available(device: torch.device) -> int:
    """Return the available bytes of a device: free GPU memory, or free memory of the system or control group."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    memory = Path("/proc/meminfo")
    if memory.is_file():
        lines = dict(line.split(":", 1) for line in memory.read_text().splitlines() if ":" in line)
        free = int(lines.get("MemAvailable", f"{free // 1024} kB").split()[0]) * 1024
    return min([free, *_free_in_control_group()])


def _free_in_control_group() -> list[int]:
    """Return the free bytes below the memory limit of the control group; empty without a limit."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        group = Path("/sys/fs/cgroup")
        try:
            return [max(0, int((group / limit).read_text()) - int((group / used).read_text()))]
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return []


def ran_out(error: BaseException) -> bool:
    """Return True for an out-of-memory error of Python or torch, on GPU or CPU."""
    if isinstance(error, MemoryError):
        return True
    text = f"{type(error).__name__}: {error}".lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY)
