"""Choice of the torch device: the one that --device names, one GPU per rank."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from common.distributed import SINGLE_PROCESS, ProcessGroup
from common.errors import UsageError

if TYPE_CHECKING:
    import torch


def check_device(name: str) -> None:
    """Raise UsageError for a name that is no device; imports no torch."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, found {name!r}.")


def resolve_device(name: str, process_group: ProcessGroup = SINGLE_PROCESS) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `cuda:n`; each rank of a machine takes a GPU.

    Raises UsageError where it does not exist.
    """
    check_device(name)
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and process_group.world_size > 1:
        if device.index is not None:
            raise UsageError(
                f"--device {name}: {process_group.world_size} ranks take a GPU each; leave out the number."
            )
        device = torch.device("cuda", process_group.local_rank)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices.")
    return device


def check_device_here(name: str, process_group: ProcessGroup = SINGLE_PROCESS) -> None:
    """Raise UsageError for a GPU that is asked for by name and not there; torch is loaded only for such a name."""
    if name.startswith("cuda"):
        resolve_device(name, process_group)
