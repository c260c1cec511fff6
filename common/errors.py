"""Exceptions of the project, which `common.cli.run` prints as one sentence."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class ProjectError(Exception):
    """Base of all errors meant for the user; the message is one clear sentence."""

    exit_code = 1


class UsageError(ProjectError):
    """An invalid flag, name or path. Exit code 2."""

    exit_code = 2


class FailureError(ProjectError):
    """A valid request that failed: a broken file, no disk space. Exit code 1."""


class InterruptedWorkError(FailureError):
    """A failure of a valid command after which finished work is kept for --resume."""


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
    """The tensors of a checkpoint are unknown before its weights are downloaded."""


class NotANumberError(CheckpointError):
    """An input has NaN where numbers are compared; the caller determines which input."""


class CalibrationError(FailureError):
    """Calibration text or activations that cannot be used."""


class EvaluationError(FailureError):
    """A benchmark or model that cannot be evaluated."""


class BadInputError(EvaluationError):
    """An invalid results file, benchmark data or server of an evaluation. Exit code 2."""

    exit_code = 2


def nearest(word: str, valid_words: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the valid word closest to `word`, or an empty string."""
    if len(word) > 100:  # a text, no misspelled word
        return ""
    original = {k.lower(): k for k in valid_words}
    match = difflib.get_close_matches(word.lower(), original, n=1, cutoff=0.5)
    return f" Did you mean {original[match[0]]!r}?" if match else ""


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no details'}"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its chain of causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
