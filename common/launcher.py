"""Ranks of a run as a launcher (torchrun, accelerate launch) puts them into the environment."""

from __future__ import annotations

import os

MAX_RANKS = 65_536


class LauncherError(ValueError):
    """The environment contradicts itself; the message is one sentence."""


def launcher_ranks() -> tuple[int, int, int]:
    """Return (rank, number of ranks, rank on this machine); (0, 1, 0) where no launcher has set WORLD_SIZE.

    Raises LauncherError for values that are no numbers, and for several ranks without a RANK of this one.
    """
    count = _number("WORLD_SIZE", 1)
    if count == 1:
        return 0, 1, 0
    if not os.environ.get("RANK"):
        raise LauncherError(
            f"WORLD_SIZE is {count} and RANK is not set: start with torchrun or accelerate launch, or unset WORLD_SIZE "
            "for one process."
        )
    rank = _number("RANK", 0)
    if not 1 <= count <= MAX_RANKS or not 0 <= rank < count:
        raise LauncherError(f"RANK is {rank} and WORLD_SIZE is {count}: ranks are numbered from 0 to WORLD_SIZE - 1.")
    return rank, count, _number("LOCAL_RANK", rank)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise LauncherError(f"The environment variable {name} is {text[:40]!r}, and a whole number was expected.")
    return int(text)
