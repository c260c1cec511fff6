"""Staging of results: written in a work folder beside their target, renamed when complete, resumed when interrupted.

The work folder of `NAME` is `.NAME.partial`: its lock, the journals, and the result in `result/`. Publishing renames
`result/` to `NAME`; with --overwrite the two change places in one step where the system can do that, else the earlier
result waits in `replaced/` until the new one stands. A run that finds the work folder of a killed one completes or
takes back what was begun (`recover`).
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import FailureError, InterruptedWorkError, ProjectError, StoppedError, UsageError, causes
from common.files import atomic
from common.files.bounded_reading import read_json
from common.files.work_folder import WorkFolder, claim, claimed, is_work_folder, remove
from common.logging import logger, message_level
from common.processes.interrupts import deferred
from merging.output.staging.journal import NAMES, Stage, journal_name, read_lines
from merging.output.staging.output_path import check_target

RESULT, REPLACED, PUBLISHING = "result", "replaced", "publishing.json"
MAX_NAME = 255
"""Bytes of a file's name on the usual file systems."""
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


class UnpublishedError(InterruptedWorkError):
    """A complete result that could not take its place, and stays in its work folder."""


def work_folder_of(save_path: Path) -> Path:
    """Return the folder in which what will be `save_path` is made. Raises UsageError for a name too long for it."""
    target = save_path.resolve()
    name = f".{target.name}.partial"
    if (size := len(os.fsencode(name))) > MAX_NAME:
        most = MAX_NAME - size + len(os.fsencode(target.name))
        raise UsageError(f"--save_path {save_path}: a name of at most {most} bytes is needed; give a shorter one.")
    return target.with_name(name)


def result_folders(save_path: Path, parts: Sequence[str]) -> list[Path]:
    """Return the folders in which the results of a run are made, one for each part."""
    return [work_folder_of(save_path) / RESULT / part for part in parts]


def stages_for(save_path: Path, parts: Sequence[str], key: str, rank: int, processes: int) -> list[Stage]:
    """Return the stages of one rank, in folders that exist."""
    work = work_folder_of(save_path)
    folders = result_folders(save_path, parts)
    names = [journal_name(i, rank) for i in range(len(parts))]
    return [Stage(folder, work / name, key, processes) for folder, name in zip(folders, names, strict=True)]


@contextmanager
def staged(
    save_path: Path, overwrite: bool, key: str, resume: bool = False,
    parts: Sequence[str] = (".",), processes: int = 1,
) -> Iterator[list[Stage]]:  # fmt: skip
    """Yield stages beside `save_path` that take its place together at the end: itself, or folders in it (`parts`).

    Where the run fails by what it was given, the stage vanishes. Where it is interrupted, or the system fails (disk
    full, unreadable file, no memory), finished tensors stay, and a later run with `resume`, the same key and as many
    processes goes on with them; the error gets a note that says so.

    Raises:
        UsageError: The target may not be replaced, or the interrupted run was another one.
        FailureError: Another process is writing there, or the target was changed during the run.
    """
    check_target(save_path, overwrite, resume=resume)
    target = save_path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with claimed(work_folder_of(save_path), f"--save_path {save_path}") as work:
        _recover(work, target)
        check_target(save_path, overwrite, resume=resume)  # an earlier result may be back
        before = _signature(target)
        _clear_or_resume(work, save_path, key, resume, parts, processes)
        stages: list[Stage] = []
        try:
            stages += stages_for(save_path, parts, key, 0, processes)
            yield stages
            work.check()
            _publish(work, target, overwrite, before)
        except BaseException as error:
            for stage in stages:
                stage.close()
            _keep_or_discard(work, parts, error)
            raise
        for stage in stages:
            stage.close()
        _remove_rest(work)


def recover(save_path: Path) -> None:
    """Complete or take back what a killed run left half-published or half-removed; nothing while a run is on."""
    work = work_folder_of(save_path)
    begun = (work / PUBLISHING).exists() or (work / REPLACED).exists() or not (work / RESULT).exists()
    if not is_work_folder(work) or not begun:
        return
    with suppress(FailureError), claimed(work, f"--save_path {save_path}") as folder:
        _recover(folder, save_path.resolve())
        if not finished(work) or not (work / RESULT).exists():
            folder.remove()


def written_bytes(save_path: Path) -> int:
    """Return the bytes on the disk that an interrupted run for `save_path` has written."""
    work = work_folder_of(save_path)
    if not is_work_folder(work):
        return 0
    files = [Path(place, name) for place, _, names in os.walk(work / RESULT) for name in names]
    return sum(getattr(info := os.lstat(file), "st_blocks", info.st_size // 512) * 512 for file in files)


def finished(work: Path, parts: int | None = None) -> int:
    """Return how many tensors of every result in a work folder are finished, by whichever rank."""
    counts: dict[str, int] = {}
    for file in work.glob(NAMES):
        part = file.name.split("-")[1]
        counts[part] = counts.get(part, 0) + max(0, len(read_lines(file)) - 1)
    return min(counts.values(), default=0) if parts is None or len(counts) >= parts else 0


def _tensors(count: int) -> str:
    return "1 tensor is" if count == 1 else f"{count} tensors are"


def _keep_or_discard(work: WorkFolder, parts: Sequence[str], error: BaseException) -> None:
    """Remove the work of a run that cannot go on; else note on the error where it is and how the run goes on."""
    if not work.lock.is_valid():
        return
    done = finished(work.path, len(parts))
    if isinstance(error, UnpublishedError):
        return
    if not done or _is_lasting(error):
        work.remove()
        return
    error.add_note(
        f"{_tensors(done)} done and kept in {work.path}: the same command with --resume continues from there."
    )


def _is_lasting(error: BaseException) -> bool:
    """Return whether an error would come again: one of the input or the command, not of the system."""
    if not isinstance(error, ProjectError) or isinstance(error, InterruptedWorkError):
        return False
    if isinstance(error, StoppedError) and error.keeps:
        return False
    return not any(isinstance(cause, OSError | MemoryError) for cause in causes(error))


def _clear_or_resume(
    work: WorkFolder, save_path: Path, key: str, resume: bool, parts: Sequence[str], processes: int
) -> None:
    """Check that an interrupted run may be resumed, or clear what it left."""
    lines = read_lines(work.path / journal_name(len(parts) - 1))  # the last to be made: where it stands, all do
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
    result = work.path / RESULT
    places = [result, *(result / part for part in parts)]
    if resume and lines and all(place.is_dir() and not place.is_symlink() for place in places):
        logger.info(f"Resuming the interrupted run: {_tensors(finished(work.path))} done.")
        return
    if resume:
        logger.info("There is no interrupted run to resume; starting from the beginning.")
    elif lines and finished(work.path):
        logger.info("An interrupted run for this folder is discarded (--resume would have continued it).")
    work.clear()
    _make_result(result, save_path.resolve())
    for part in parts:
        (result / part).mkdir(exist_ok=True)


def _make_result(result: Path, target: Path) -> None:
    """Make the folder of the result, with the group and default permissions of the target's, where that exists."""
    result.mkdir()
    if target.is_dir():
        atomic.copy_attributes(target, result)
        with suppress(OSError):
            os.chmod(result, stat.S_IMODE(os.stat(result).st_mode) | stat.S_IRWXU)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder` at the end, and vanishes on any error.

    What was there before is gone only once the new folder stands; whether it may go is for the caller to know.
    """
    target = folder.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = claim(work_folder_of(folder), str(folder))
    try:
        with message_level(quiet=True):
            _recover(work, target)
        work.clear()
        before = _signature(target)
        _make_result(work.path / RESULT, target)
        yield work.path / RESULT
        _publish(work, target, True, before)
    except BaseException:
        work.remove()
        raise
    _remove_rest(work)


def _publish(work: WorkFolder, target: Path, overwrite: bool, before: object) -> None:
    """Put the result in the place of `target`, which must be as it was `before`."""
    result = work.path / RESULT
    atomic.sync_tree(result)
    with deferred():
        _write_publishing(work, result)
        if _signature(target) != before:
            raise _unpublished(target, result, "was changed during the run")
        if target.is_dir():
            atomic.copy_attributes(target, result)
        if overwrite and target.is_dir() and any(target.iterdir()):
            _swap(work, target)
        else:
            try:
                os.rename(result, target)  # fails where something is there; an empty folder may be replaced
            except OSError as error:
                if error.errno in TAKEN:
                    raise _unpublished(target, result, "appeared during the run") from None
                raise
        atomic.sync_folder(target.parent)


def _remove_rest(work: WorkFolder) -> None:
    """Remove the work folder of a published result, with what was replaced."""
    try:
        with deferred():
            work.remove()
    except OSError as error:
        logger.warning(f"{work.path}, which holds what was replaced, cannot be removed ({error.strerror}); remove it.")


def _unpublished(target: Path, result: Path, what: str) -> UnpublishedError:
    return UnpublishedError(
        f"{target} {what}, and is left as it is: the complete result is in {result}; move what is at the target away "
        "and give the same command with --resume, or move the result where you want it."
    )


def _swap(work: WorkFolder, target: Path) -> None:
    """Exchange the result and the target, in one step where the system can."""
    result, replaced = work.path / RESULT, work.path / REPLACED
    if atomic.exchange(result, target):
        return
    os.rename(target, replaced)
    try:
        os.rename(result, target)
    except OSError:
        os.rename(replaced, target)
        raise


def _write_publishing(work: WorkFolder, result: Path) -> None:
    """Record which folder is the new result, by its inode, which a rename does not change."""
    atomic.write_file(work.path / PUBLISHING, json.dumps({"result": _identity(result)}).encode())


def _recover(work: WorkFolder, target: Path) -> None:
    """Complete a publication that was cut short, or take it back."""
    result, replaced = work.path / RESULT, work.path / REPLACED
    new = _read_publishing(work.path / PUBLISHING)
    is_published = new is not None and _identity(target) == new
    if os.path.lexists(replaced):
        if is_published:
            remove(replaced)
        elif not os.path.lexists(target):
            os.rename(replaced, target)
            atomic.sync_folder(target.parent)
            logger.info(f"{target}: the earlier result, which a killed run had moved away, is restored.")
        else:
            raise UsageError(
                f"{replaced} is the earlier result of {target}, which a killed run moved away, and something else is "
                "there now; move one of them elsewhere."
            )
    if new is None:
        return
    if is_published or (os.path.lexists(result) and _identity(result) != new):  # it holds what was replaced
        logger.info(f"{target}: removing the leftovers of a killed run.")
        work.clear()
    else:
        (work.path / PUBLISHING).unlink()


def _read_publishing(file: Path) -> list[int] | None:
    try:
        inode = read_json(file)["result"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return inode if isinstance(inode, list) else None


def _identity(path: Path) -> list[int] | None:
    """Return device and inode of a path; None where nothing is there."""
    try:
        info = os.lstat(path)
    except OSError:
        return None
    return [info.st_dev, info.st_ino]


def _signature(target: Path) -> list[tuple[object, ...]]:
    """Return what tells whether a folder's content was changed: every file's name, inode, size and time."""
    entries: list[tuple[object, ...]] = []
    for place, folders, names in os.walk(target):
        for name in (*folders, *names):
            info = os.lstat(os.path.join(place, name))
            times = (info.st_size, info.st_mtime_ns) if stat.S_ISREG(info.st_mode) else ()
            entries.append((os.path.relpath(os.path.join(place, name), target), info.st_ino, *times))
    return sorted(entries, key=str)
