"""How much memory there is."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def available(device: torch.device) -> int:
    """Return the bytes that can still be used on a device: free memory of a GPU, or what the system (or the control
    group of this process) has left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    memory = Path("/proc/meminfo")
    if memory.is_file():
        lines = dict(line.split(":", 1) for line in memory.read_text().splitlines() if ":" in line)
        free = int(lines.get("MemAvailable", f"{free // 1024} kB").split()[0]) * 1024
    return min([free, *_left_in_group()])


def _left_in_group() -> list[int]:
    """What a container's limit leaves, if there is one."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        group = Path("/sys/fs/cgroup")
        try:
            return [max(0, int((group / limit).read_text()) - int((group / used).read_text()))]
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return []
