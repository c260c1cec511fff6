"""The values of omega: one, or several for a sweep."""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import UsageError
from common.terminal_text import quoted


def omega_text(omega: float) -> str:
    """Return an omega as short as it can be without printing like another: 0.4, 1, 0.30000000000000004."""
    short = f"{omega:g}"
    return short if float(short) == omega else repr(omega)


def omega_folder(omega: float) -> str:
    """Return the folder of one omega of several: omega-0.4, with all the digits that tell it from others."""
    return f"omega-{omega_text(omega)}"


def check_omegas(omegas: Sequence[float]) -> None:
    """Raise UsageError for an omega outside [0, 1], none at all, or one that is given twice."""
    if not omegas:
        raise UsageError("--omega needs at least one value in [0, 1].")
    for omega in omegas:
        if not 0.0 <= omega <= 1.0:
            raise UsageError(
                f"--omega must be in [0, 1] (1 leaves the merge as it is, 0 relaxes most), found {omega:g}."
            )
    if len(set(omegas)) < len(omegas):
        raise UsageError(f"--omega has {', '.join(map(omega_text, omegas))}: one value is given twice.")


def parse_omegas(value: object) -> tuple[float, ...]:
    """Return the numbers of 0.4, "0.4", "0,0.2,0.4" or a list. Raises UsageError for what is no number in [0, 1]."""
    parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
    try:
        if any(isinstance(part, bool) for part in parts):
            raise TypeError
        omegas = tuple(float(part) for part in parts if str(part).strip())
    except (TypeError, ValueError):
        raise UsageError(
            f"--omega must be a number in [0, 1], or several with commas between, found {quoted(value)}."
        ) from None
    check_omegas(omegas)
    return omegas
