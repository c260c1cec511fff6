"""Regular expressions out of foreign files, matched within a time limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

from common.files.bounded_reading import LimitError, UnreadableError
from common.terminal_text import quoted

MAX_PATTERN = 1000
"""Characters of a pattern."""
MAX_COUNT = 10_000
"""The product of all counts in repetitions such as a{100}: nested ones take time and memory of their product."""
SECONDS = 0.2
"""Time of one match; real patterns take microseconds."""


class _Pattern(Protocol):
    """A compiled expression of the `regex` package."""

    def match(self, text: str, *, timeout: float) -> object | None:
        """Return a match at the beginning of a text, or None. Raises TimeoutError."""

    def search(self, text: str, *, timeout: float) -> object | None:
        """Return a match anywhere in a text, or None. Raises TimeoutError."""


def matches_end(pattern: str, name: str, source: str) -> bool:
    """Return whether a foreign regular expression matches a dotted name, or the end of it after a dot, as PEFT does.

    Args:
        pattern: the expression, in the syntax of Python's re.
        name: what is matched.
        source: the file or key that the pattern is from, for messages.

    Raises:
        UnreadableError: it is no regular expression, or too long.
        LimitError: the match took longer than SECONDS.
    """
    return _bounded(_compile(pattern, source, True).match, pattern, name, source)


def search_foreign(pattern: str, text: str, source: str) -> bool:
    """Return whether a foreign regular expression matches anywhere in a text, as `re.search`; as `matches_end`."""
    return _bounded(_compile(pattern, source).search, pattern, text, source)


def check_pattern(pattern: str, source: str) -> None:
    """Raise UnreadableError unless a text is a regular expression that is read."""
    _compile(pattern, source)


def _bounded(match: Callable[..., object], pattern: str, text: str, source: str) -> bool:
    try:
        return match(text, timeout=SECONDS) is not None
    except TimeoutError:
        raise LimitError(
            f"{source}: the pattern {quoted(pattern)} takes more than {SECONDS} s on {quoted(text)}; simplify it."
        ) from None


@lru_cache(maxsize=4096)
def _compile(pattern: str, source: str, at_end: bool = False) -> _Pattern:
    import re

    import regex

    if len(pattern) > MAX_PATTERN:
        raise LimitError(f"{source}: a pattern of {len(pattern)} characters is not read ({MAX_PATTERN} at most).")
    counts = [int(count) for count in re.findall(r"\d+", "".join(re.findall(r"\{[\d,]*\}", pattern)))]
    if math.prod(max(1, min(count, MAX_COUNT + 1)) for count in counts[:MAX_PATTERN]) > MAX_COUNT:
        raise LimitError(
            f"{source}: the counts of repetitions in the pattern {quoted(pattern)} have a product above {MAX_COUNT}; "
            "simplify it."
        )
    whole = rf"(.*\.)?({pattern})$" if at_end else pattern
    try:
        re.compile(whole)  # what regex alone knows is no pattern of PEFT's
        compiled: _Pattern = regex.compile(whole)
        return compiled
    except (re.error, regex.error, RecursionError, OverflowError, ValueError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise UnreadableError(f"{source} {quoted(pattern)} is not a regular expression ({reason[:80]}).") from error
