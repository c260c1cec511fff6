"""The processes of one evaluation, as `accelerate launch` or `torchrun` start them; one process otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from common.errors import UsageError
from common.launcher import LauncherError, launcher_ranks

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's number, how many there are, and its number on this machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def of_run(cls) -> Ranks:
        """What the launcher put into the environment."""
        try:
            return cls(*launcher_ranks())
        except LauncherError as error:
            raise UsageError(str(error)) from error

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Every count-th item from this process's number on: together the processes have each once."""
        return list(items[self.rank :: self.count])

    def wait(self) -> None:
        """Return when every process is here. One may take hours longer; a process that dies ends the launch."""
        if self.count == 1:
            return
        from torch import distributed

        if not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=timedelta(weeks=4))
        distributed.monitored_barrier(timeout=timedelta(weeks=4))
