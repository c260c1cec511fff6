"""State of an experiment as a folder that people can read: cells/NAME/{command,log,lock,scores,status.json}."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from common.errors import UsageError
from common.files.bounded_reading import UnreadableError, read_json
from common.files.locks import Lock
from common.files.paths import write_whole
from scripts.experiments.plan import Cell, Plan

STATUS, COMMAND, LOG, LOCKS, CLAIM = "status.json", "command", "log", "lock", ".claim"
STATES = ("done", "failed", "skipped", "running", "waiting")


@dataclass(frozen=True)
class Status:
    """State of a cell: waiting, running (or interrupted), done, failed, or skipped because a cell it needs failed."""

    state: str = "waiting"
    seconds: float | None = None
    sentence: str | None = None
    command: str | None = None


class State:
    """The folder of an experiment's state; several processes may use it at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def cell_folder(self, cell: Cell) -> Path:
        """Return the folder of a cell."""
        return self.folder / "cells" / cell.name

    def status(self, cell: Cell) -> Status:
        """Return the status of a cell. Raises UsageError for a status file that is not one of this program's."""
        file = self.cell_folder(cell) / STATUS
        if not file.is_file():
            return Status()
        try:
            saved = Status(**read_json(file))
        except (UnreadableError, TypeError) as error:
            raise UsageError(
                f"{file} is not the status of a cell ({error}); remove the folder to run it again."
            ) from error
        return saved if saved.command in (None, cell.command) else Status(command=saved.command)

    def write(self, cell: Cell, status: Status) -> None:
        """Record the status of a cell."""
        folder = self.cell_folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        record = {key: value for key, value in asdict(status).items() if value is not None} | {"command": cell.command}
        write_whole(folder / STATUS, (json.dumps(record, indent=1) + "\n").encode())

    @contextmanager
    def claimed(self, cell: Cell) -> Iterator[Lock]:
        """Hold a cell while it is run. Raises HeldError where another process does."""
        folder = self.cell_folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock.acquire(folder / CLAIM)
        try:
            yield lock
        finally:
            lock.release()

    def begin(self, cell: Cell) -> None:
        """Write the command of a claimed cell that starts."""
        write_whole(self.cell_folder(cell) / COMMAND, (cell.command + "\n").encode())
        self.write(cell, Status("running"))

    def keep_locks(self, cell: Cell) -> None:
        """Copy the locks of a cell's results into its folder; they rebuild what `keep: scores` deletes."""
        from merging.output.records.lock import LOCK_FILE

        locks = {output.name: output / LOCK_FILE for output in cell.outputs if (output / LOCK_FILE).is_file()}
        for name, lock in locks.items():
            target = self.cell_folder(cell) / (LOCKS if len(locks) == 1 else f"{LOCKS}-{name}")
            shutil.copyfile(lock, target)

    def table(self, plan: Plan) -> str:
        """Return the progress as text: numbers by state, then what runs and what failed."""
        statuses = {cell.name: self.status(cell) for cell in plan.cells}
        counts = {state: sum(s.state == state for s in statuses.values()) for state in STATES}
        lines = [
            ", ".join(f"{count} {state}" for state, count in counts.items() if count) + f" of {len(statuses)} cells."
        ]
        for state in ("running", "failed", "skipped"):
            lines += [
                f"{state}: {name}{f': {status.sentence}' if status.sentence else ''}"
                for name, status in statuses.items()
                if status.state == state
            ]
        return "\n".join(lines)


def missing_outputs(cell: Cell) -> list[Path]:
    """Return the outputs of a cell that do not exist."""
    return [output for output in cell.outputs if not output.exists()]


def clear_partial(cell: Cell, folder: Path) -> None:
    """Remove the outputs of an interrupted cell of which some are missing; only inside the experiment's folder."""
    if not missing_outputs(cell):
        return
    for output in cell.outputs:
        if output.is_dir() and output.is_relative_to(folder / "models"):
            shutil.rmtree(output)
