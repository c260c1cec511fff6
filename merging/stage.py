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
from console.errors import FailureError, ProjectError, StoppedError, UsageError
from merging.target import check_target

JOURNAL, LOCK = "journal.jsonl", "writing.lock"
JOURNALS = "journal*.jsonl"


def journal_name(rank: int) -> str:
    """Return the file in which a process of a run keeps what it has finished."""
    return f"journal-{rank}.jsonl" if rank else JOURNAL


def stage_of(save_path: Path) -> Path:
    """Return the folder in which what will be `save_path` is made."""
    target = save_path.resolve()
    return target.with_name(f".{target.name}.partial")


class Journal:
    """The finished tensors of a run, one JSON line each, in the order of the plan; the first line is the run's key.

    Where several processes make a result, each has a journal of its own part.
    """

    def __init__(self, file: Path, key: str, processes: int = 1) -> None:
        self.file = file
        self.entries: list[dict[str, Any]] = []
        lines = _whole_lines(file) if file.is_file() else []
        self.entries = lines[1:]
        first = {"key": key} | ({"processes": processes} if processes > 1 else {})
        self._write(lines or [first])  # a last line that a crash cut short is gone then

    def add(self, entry: Mapping[str, Any]) -> None:
        """Append a finished tensor."""
        self.entries.append(dict(entry))
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")

    def hold(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Have the entries of all processes, without writing them down once more."""
        self.entries = [dict(entry) for entry in entries]

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
    save_path: Path, overwrite: bool, key: str, resume: bool = False, quiet: bool = False,
    parts: Sequence[str] = (".",), processes: int = 1,
) -> Iterator[list[Stage]]:  # fmt: skip
    """Yield stages beside `save_path` that take its place together at the end: itself, or folders in it (`parts`).

    On an error of the project's own it vanishes; where the run is interrupted (or the disk full, or a process killed)
    and tensors are finished, it stays, and a later run with `resume`, the same key and as many processes goes on in it.
    Raises UsageError where the target may not be replaced or the interrupted run was another one, FailureError where
    another process is writing there.
    """
    check_target(save_path, overwrite, resume=resume)
    target, folder = save_path.resolve(), stage_of(save_path)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    with _only_writer(folder, save_path):
        _prepare(folder, save_path, key, resume, quiet, parts, processes)
        stages = [Stage(folder / part, Journal(folder / part / JOURNAL, key, processes)) for part in parts]
        try:
            yield stages
            take_place(folder, target)
            for part in parts:
                for journal in (target / part).glob(JOURNALS):
                    journal.unlink()
            (target / LOCK).unlink()
        except BaseException as error:
            done = _finished(folder, parts)
            wrong = isinstance(error, ProjectError) and not (isinstance(error, StoppedError) and error.keeps)
            if wrong or not done:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                say(f"{_tensors(done)} done: the same command with --resume goes on from there.", quiet)
            raise


def _finished(folder: Path, parts: Sequence[str]) -> int:
    """How many tensors of every result are finished, by whichever process."""
    return min(sum(max(0, len(_whole_lines(file)) - 1) for file in (folder / part).glob(JOURNALS)) for part in parts)


def _tensors(count: int) -> str:
    return "1 tensor is" if count == 1 else f"{count} tensors are"


@contextmanager
def _only_writer(folder: Path, save_path: Path) -> Iterator[None]:
    """Hold the lock of a stage, which a process that dies lets go."""
    with (folder / LOCK).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FailureError(f"Another process is writing {save_path}; wait for it or give another folder.") from None
        yield


def _prepare(
    folder: Path, save_path: Path, key: str, resume: bool, quiet: bool, parts: Sequence[str], processes: int
) -> None:
    """Check that an interrupted run may be taken up, or clear what it left."""
    file = folder / parts[-1] / JOURNAL  # the last to be made: where it stands, all do
    lines = _whole_lines(file) if file.is_file() else []
    if resume and lines and lines[0].get("key") != key:
        raise UsageError(
            f"The interrupted run for {save_path} had another recipe, other inputs or versions; "
            "start anew without --resume, or give the command that was interrupted."
        )
    if resume and lines and (before := lines[0].get("processes", 1)) != processes:
        raise UsageError(
            f"The interrupted run for {save_path} was shared by {before} process{'es' if before > 1 else ''}, each "
            f"with its own part, and this one by {processes}: go on with {before}, or start anew without --resume."
        )
    if resume and lines:
        say(f"Going on with the interrupted run: {_tensors(_finished(folder, parts))} done.", quiet)
        return
    if resume:
        say("There is no interrupted run to resume; starting from the beginning.", quiet)
    elif lines and _finished(folder, parts):
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
