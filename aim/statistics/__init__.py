"""Statistics of a weight's input over calibration tokens, one per file; running the base is in the parent package."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from common.errors import UsageError, nearest

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT = "mean_abs"
"""The paper's statistic."""


@dataclass(frozen=True)
class Statistic:
    """A statistic per input channel that is a function of a mean over tokens.

    Attributes:
        sum_tokens: Returns the sum of the averaged quantity over axis `dim` of x, in fp32 over the entries, as fp64.
        finish: Returns the statistic from that quantity's mean over tokens (..., channels) fp64.
    """

    sum_tokens: Callable[[Tensor, int], Tensor]
    finish: Callable[[Tensor], Tensor]


@cache
def statistic_names() -> tuple[str, ...]:
    """Return the names of all statistics: the file names of this package, the default first."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return (DEFAULT, *(name for name in names if name != DEFAULT))


def check_statistic(name: object) -> None:
    """Raise UsageError for a name that no file of this package has."""
    names = statistic_names()
    if name not in names:
        raise UsageError(f"--statistic must be one of {', '.join(names)}, found {name!r}.{nearest(str(name), names)}")


def find_statistic(name: str) -> Statistic:
    """Return a statistic by its name. Raises UsageError for an unknown one."""
    check_statistic(name)
    statistic: Statistic = import_module(f"{__name__}.{name}").STATISTIC
    return statistic
