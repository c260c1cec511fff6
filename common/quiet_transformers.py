"""Silencing of transformers and of native libraries for the duration of a call."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silent_descriptors() -> Iterator[None]:
    """Discard what native libraries write to standard output and error, which may contain foreign text."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        copies = [os.dup(number) for number in (1, 2)]
    except OSError:  # closed by the parent process
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            for number in (1, 2):
                os.dup2(nowhere.fileno(), number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor_copy in zip((1, 2), copies, strict=True):
            os.dup2(descriptor_copy, number)
            os.close(descriptor_copy)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Disable transformers' progress bars and warnings. Raises ImportError where it is not installed."""
    from transformers.utils import logging as library

    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity(logging.CRITICAL)
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()
