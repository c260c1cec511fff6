"""transformers without bars and remarks while it is asked something."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silent_descriptors() -> Iterator[None]:
    """Discard what libraries in other languages write to standard output and error, which may be foreign text."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        kept = [os.dup(number) for number in (1, 2)]
    except OSError:  # closed by whoever started this
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
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing bars and remarks. Raises ImportError where it is missing."""
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
