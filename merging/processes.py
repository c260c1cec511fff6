"""The processes of one run, as `accelerate launch` or torchrun start them, and what they tell each other."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from common.cli import explain
from common.errors import ProjectError, StoppedError, UsageError
from common.launcher import LauncherError, launcher_ranks

if TYPE_CHECKING:
    from torch import Tensor

    from merging.company import Company


@dataclass(frozen=True)
class Processes:
    """This process's number among `count` of them, and among those of its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0
    company: Company | None = field(default=None, repr=False, compare=False)

    @property
    def leads(self) -> bool:
        """Whether this process finishes what all of them made, and speaks."""
        return self.rank == 0

    def everybody(self, value: Any) -> list[Any]:
        """Return what each process gives, in their order; any object of JSON's types.

        Raises StoppedError, as all of these do, where another process has ended.
        """
        if self.company is None:
            return [value]
        found: list[Any] = json.loads(self.company.exchange(json.dumps(value).encode()))
        return found

    def added(self, tensor: Tensor) -> Tensor:
        """Return the sum of the processes' tensors of one shape and dtype, on the CPU."""
        if self.company is None:
            return tensor
        import torch

        own = tensor.cpu().contiguous()
        found = self.company.exchange(own.numpy().tobytes(), str(own.dtype).removeprefix("torch."))
        return torch.frombuffer(bytearray(found), dtype=own.dtype).reshape(own.shape) if found else own

    def wait(self) -> None:
        """Return when every process has come here."""
        self.everybody(None)

    def check(self) -> None:
        """Raise StoppedError where another process has ended."""
        if self.company is not None:
            self.company.check()

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        """Let the first process through before the others: what it downloads they find, what it refuses they leave."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()


ALONE = Processes()


@contextmanager
def together() -> Iterator[Processes]:
    """Yield the processes that the launcher's environment tells of, joined; one process where it tells of none.

    They end together: an error of one ends all, with its exit code, and is said once, by it; of a process that was
    killed the others say so. Only the first has a standard output.
    """
    try:
        rank, count, local = launcher_ranks()
    except LauncherError as error:
        raise UsageError(str(error)) from error
    if count == 1:
        yield ALONE
        return
    if rank:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from merging.meeting import meet

    company = meet(rank, count, local)
    before = signal.signal(signal.SIGTERM, company.terminated)
    processes = Processes(rank, count, local, company)
    try:
        with _without_output(silent=rank > 0):
            try:
                yield processes
            except SystemExit as leaving:  # --help
                if leaving.code:
                    raise
                processes.wait()
                raise
        processes.wait()
        signal.signal(signal.SIGTERM, before)
    except SystemExit:
        raise
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, once the others have ended
        if isinstance(error, StoppedError):
            raise
        ending = company.fail(explain(error)[1], keeps=not isinstance(error, ProjectError))
        if ending.rank == rank:
            raise
        stopped = company.stopped()
        for note in getattr(error, "__notes__", ()):
            stopped.add_note(note)
        raise stopped from None
    finally:
        company.close()


@contextmanager
def _without_output(silent: bool) -> Iterator[None]:
    if not silent:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield
