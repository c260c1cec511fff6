"""Where a run computes: the device that a flag names, and which of a machine's GPUs a process takes."""

from __future__ import annotations

import torch

from console.errors import UsageError
from merging.processes import ALONE, Processes


def resolve_device(name: str, processes: Processes = ALONE) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `cuda:n`; of several processes of a machine each takes a GPU.

    Raises UsageError where it does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, found {name!r}.") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, found {name!r}.")
    if device.type == "cuda" and processes.count > 1:
        if device.index is not None:
            raise UsageError(f"--device {name}: {processes.count} processes take a GPU each; leave out the number.")
        device = torch.device("cuda", processes.local)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices.")
    return device
