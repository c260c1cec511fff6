"""The processes of one run, as `accelerate launch` or torchrun start them, and what they tell each other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process's number among `count` of them, and among those of its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process writes what all of them made."""
        return self.rank == 0

    def everybody(self, value: Any) -> list[Any]:
        """Return what each process gives, in their order; any object that pickles."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def added(self, tensor: Tensor) -> Tensor:
        """Return the sum of the processes' tensors of one shape, on the CPU."""
        if self.count == 1:
            return tensor
        import torch.distributed as dist

        device = f"cuda:{self.local}" if dist.get_backend() == "nccl" else "cpu"
        total = tensor.to(device, copy=True)
        dist.all_reduce(total)
        return total.cpu()

    def wait(self) -> None:
        """Return when every process has come here."""
        self.everybody(None)


def processes_of_run() -> Processes:
    """Join the processes that the launcher's environment tells of; one process where it tells of none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())  # without a GPU nobody else says that they are several
    return Processes(state.process_index, state.num_processes, state.local_process_index)
