"""The project's exceptions: raised where the fact is known, printed once at the edge by `common.cli.run`."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class ProjectError(Exception):
    """Base of all errors meant for the user; the message is one clear sentence."""

    exit_code = 1


class UsageError(ProjectError):
    """What was asked for cannot be right: a flag, a name, a path. Exit code 2."""

    exit_code = 2


class FailureError(ProjectError):
    """What was asked for is right but could not be done: a broken file, no space. Exit code 1."""


class InterruptedWorkError(FailureError):
    """A failure after which finished work stays for --resume, though the command was right."""


class StoppedError(FailureError):
    """Another rank of this run has ended, and this one with it. Without a message where another rank reports it.

    keeps: whether what is done stays for --resume; the exit code is that of the one that ended.
    """

    def __init__(self, message: str, exit_code: int = 1, keeps: bool = True) -> None:
        super().__init__(message)
        self.exit_code, self.keeps = exit_code, keeps


class CheckpointError(FailureError):
    """A checkpoint that cannot be read or written; names the file or tensor."""


class HeadersUnknownError(CheckpointError):
    """What a checkpoint holds cannot be told without downloading it."""


class NotANumberError(CheckpointError):
    """An input holds NaN where numbers are compared; which input it is, is for the caller to find out."""


class CalibrationError(FailureError):
    """Calibration text or activations that cannot be used."""


class EvaluationError(FailureError):
    """A benchmark or model that cannot be evaluated."""


class BadInputError(EvaluationError):
    """What was given to evaluate with cannot be used: a results file, benchmark data, a server. Exit code 2."""

    exit_code = 2


def nearest(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known word closest to `word`, or an empty string."""
    if len(word) > 100:  # a text, no misspelt word
        return ""
    original = {k.lower(): k for k in known}
    match = difflib.get_close_matches(word.lower(), original, n=1, cutoff=0.5)
    return f" Did you mean {original[match[0]]!r}?" if match else ""


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no details'}"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from, down to the first one."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
