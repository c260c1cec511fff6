"""Equality of answers as the paper's evaluation has it: strings without case, numbers leniently, then mathematics.

The leniencies are the reference's, listed in REPRODUCTION.md: a factor of 100 either way, 1e-4 relative, commas dropped
from numbers. What needs sympy runs in grader.py's worker.
"""

from __future__ import annotations

import re

from eval.maths.comparison import same_answers
from eval.maths.values import PAPER

RELATIVE_TOLERANCE = PAPER.relative
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?")
_BASED = re.compile(r"([0-9A-Za-z]+)_\{?(\d+)\}?")


def number(text: str) -> float | None:
    """Read a plain number: commas dropped, a trailing % divides by 100; None for anything else."""
    plain = text.replace(",", "").strip()
    percent = plain.endswith("%")
    plain = plain.removesuffix("%").removesuffix("\\")
    if not _NUMBER.fullmatch(plain):
        return None
    return float(plain) / 100 if percent else float(plain)


def quickly_equal(answer: str, gold: str) -> bool | None:
    """Decide by strings and numbers; None where only mathematics can tell.

    A number also equals gold/100 and gold x 100: the reference's leniency for percentages, kept in its preset.
    """
    if answer.lower() == gold.lower():
        return bool(answer)
    if not answer or not gold:
        return False
    based = based_equal(answer, gold)
    if based is not None:
        return based
    a, g = number(answer), number(gold)
    if a is None or g is None:
        return None
    return any(abs(a - value) <= RELATIVE_TOLERANCE * abs(value) for value in (g, g / 100, g * 100))


def based_equal(answer: str, gold: str) -> bool | None:
    """Compare numerals with their base, such as 1011_2, digit by digit; None where neither is one."""
    a, g = _BASED.fullmatch(answer), _BASED.fullmatch(gold)
    if not any(match and match[1][0].isdigit() for match in (a, g)):
        return None
    return a is not None and g is not None and a.groups() == g.groups()


def equal(answer: str, gold: str) -> bool:
    """Return whether two normalised answers are equal; may take arbitrarily long, so that callers use the worker."""
    quick = quickly_equal(answer, gold)
    return same_answers(answer, gold, PAPER) if quick is None else quick
