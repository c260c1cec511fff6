"""Output folders that appear whole or not at all: staged beside their target, renamed at the end, taken up again."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from console.cli import say
from console.errors import FailureError, ProjectError, UsageError

RECORD = "run_record.json"
"""The file that marks a checkpoint written here and tells how it was made."""
JOURNAL, LOCK = "journal.jsonl", "writing.lock"


def check_target(save_path: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse a target that holds something, or that touches an input. Raises UsageError.

    With `overwrite` a folder is replaced only where it holds a checkpoint that was written here (its run record), and
    never where it is, contains or lies in one of the `inputs` or the current folder.
    """
    target = save_path.resolve()
    if target.is_mount():
        raise UsageError(f"--save_path {save_path} is a mount point, which cannot be replaced; give a folder in it.")
    if target.exists() and not target.is_dir():
        raise UsageError(f"--save_path {save_path} is a file; give a folder.")
    for path in inputs:
        taken = path.resolve()
        if target == taken or target in taken.parents or taken in target.parents:
            raise UsageError(f"--save_path {save_path} would write over or into the input {path}; give another folder.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"--save_path {save_path} is not empty; give another folder or add --overwrite.")
    if not (target / RECORD).is_file() or target in (Path.cwd(), *Path.cwd().parents):
        raise UsageError(
            f"--save_path {save_path} holds something that is no checkpoint written here (it has no {RECORD}); "
            "--overwrite does not replace it: give another folder."
        )


class Journal:
    """The finished tensors of a run, one JSON line each, in the order of the plan; the first line is the run's key."""

    def __init__(self, file: Path, key: str) -> None:
        self.file = file
        self.entries: list[dict[str, Any]] = []
        lines = _whole_lines(file) if file.is_file() else []
        self.entries = lines[1:]
        self._write(lines or [{"key": key}])  # a last line that a crash cut short is gone then

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append a finished tensor."""
        self.entries.append(dict(entry))
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")

    def keep(self, count: int) -> None:
        """Forget all but the first `count` entries."""
        if count < len(self.entries):
            self.entries = self.entries[:count]
            self._write([_whole_lines(self.file)[0], *self.entries])

    def _write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        self.file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _whole_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON lines of a journal; the last may have been cut by a crash."""
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


@dataclass(frozen=True)
class Stage:
    """A folder that will take the target's place, and the journal of what is in it."""

    folder: Path
    journal: Journal


@contextmanager
def staged(
    save_path: Path, overwrite: bool, key: str, resume: bool = False, quiet: bool = False, parts: Sequence[str] = (".",)
) -> Iterator[list[Stage]]:
    """Yield stages beside `save_path` that take its place together at the end: itself, or folders in it (`parts`).

    On an error of the project's own it vanishes; where the run is interrupted (or the disk full, or the process
    killed) and tensors are finished, it stays, and a later run with `resume` and the same key goes on in it. Raises
    UsageError where the target may not be replaced or the interrupted run had another key, FailureError where another
    process is writing there.
    """
    check_target(save_path, overwrite)
    target = save_path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.partial")
    folder.mkdir(exist_ok=True)
    with _only_writer(folder, save_path):
        _prepare(folder, save_path, key, resume, quiet, parts)
        stages = [Stage(folder / part, Journal(folder / part / JOURNAL, key)) for part in parts]
        try:
            yield stages
            take_place(folder, target)
            for part in parts:
                (target / part / JOURNAL).unlink()
            (target / LOCK).unlink()
        except BaseException as error:
            done = min(len(stage.journal.entries) for stage in stages)
            if isinstance(error, ProjectError) or not done:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                say(f"{done} tensors are done: the same command with --resume goes on from there.", quiet)
            raise


@contextmanager
def _only_writer(folder: Path, save_path: Path) -> Iterator[None]:
    """Hold the lock of a stage, which a process that dies lets go."""
    with (folder / LOCK).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FailureError(f"Another process is writing {save_path}; wait for it or give another folder.") from None
        yield


def _prepare(folder: Path, save_path: Path, key: str, resume: bool, quiet: bool, parts: Sequence[str]) -> None:
    """Check that an interrupted run may be taken up, or clear what it left."""
    file = folder / parts[-1] / JOURNAL  # the last to be made: where it stands, all do
    lines = _whole_lines(file) if file.is_file() else []
    if resume and lines and lines[0].get("key") != key:
        raise UsageError(
            f"The interrupted run for {save_path} had another recipe, other inputs or versions; "
            "start anew without --resume, or give the command that was interrupted."
        )
    if resume and lines:
        say(f"Going on with the interrupted run: {len(lines) - 1} tensors are done.", quiet)
        return
    if resume:
        say("There is no interrupted run to resume; starting from the beginning.", quiet)
    elif len(lines) > 1:
        say("An interrupted run for this folder is discarded (--resume would have gone on with it).", quiet)
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for part in parts:
        (folder / part).mkdir(exist_ok=True)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that takes its place at the end, and vanishes on any error.

    What was there before is gone only once the new folder stands; whether it may go is the caller's to know.
    """
    target = folder.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = target.with_name(f".{target.name}.partial-{os.getpid()}")
    stage.mkdir()
    try:
        yield stage
        take_place(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def take_place(stage: Path, target: Path) -> None:
    """Put a finished folder, safely on the disk, in the place of `target`."""
    for file in stage.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    replaced = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    if target.exists():
        target.rename(replaced)
    try:
        stage.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
