"""SIGTERM and SIGHUP end a run as Ctrl-C does: what is finished is kept, and temporary files are removed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")

_deferred: list[int] | None = None
"""Signals that came in a part that must not be interrupted; None outside of one."""


class Terminated(KeyboardInterrupt):
    """The process was told to stop by a signal other than Ctrl-C's."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    @property
    def name(self) -> str:
        """The signal's name."""
        return signal.Signals(self.number).name


def handle_stop_signals() -> None:
    """Raise KeyboardInterrupt in the main thread at SIGINT, SIGTERM and SIGHUP; what is ignored (nohup) stays so."""
    if threading.current_thread() is not threading.main_thread():
        return
    for name in STOPPING:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _stop)


def ignore_stop_signals() -> None:
    """Ignore stop signals while the process removes its temporary files and ends."""
    if threading.current_thread() is not threading.main_thread():
        return
    for name in STOPPING:
        number = getattr(signal, name, None)
        if number is not None:
            signal.signal(number, signal.SIG_IGN)


def defer(number: int) -> bool:
    """Note a signal that came within `deferred`, to be handled at its end; False outside of it."""
    if _deferred is None:
        return False
    _deferred.append(number)
    return True


def _stop(number: int, _frame: FrameType | None) -> None:
    if defer(number):
        return
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
    raise Terminated(number)


@contextmanager
def deferred() -> Iterator[None]:
    """Defer stop signals to the end of a short section, such as a rename with its bookkeeping."""
    global _deferred
    if _deferred is not None:
        yield
        return
    _deferred = []
    try:
        yield
    finally:
        waiting, _deferred = _deferred, None
    if waiting:
        handler = signal.getsignal(waiting[0])
        if callable(handler):
            handler(waiting[0], None)
