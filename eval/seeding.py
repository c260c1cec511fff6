"""Random number generators of libraries, set to the seed of the run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from langdetect import DetectorFactory


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """While open, Python's, numpy's and langdetect's generators start from `seed`; the former two are put back after.

    langdetect, which IFEval asks for the language of an answer, draws n-grams from a generator of its own that is
    seeded by the system otherwise: short answers then change their language from run to run.
    """
    import numpy as np

    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    factory = _langdetect()
    language_seed = factory.seed if factory is not None else None
    if factory is not None:
        factory.seed = seed
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        if factory is not None:
            factory.seed = language_seed


def _langdetect() -> type[DetectorFactory] | None:
    """Return langdetect's factory of detectors; None where the library is not installed."""
    try:
        from langdetect import DetectorFactory
    except ImportError:
        return None
    factory: type[DetectorFactory] = DetectorFactory
    return factory
