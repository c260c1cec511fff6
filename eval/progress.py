"""How far a benchmark is and how long it will take: a bar where somebody watches, else a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

SECONDS_BETWEEN_LINES = 60.0


class Progress:
    """Counts answers of one benchmark. `known` of its `total` were there before; `show` False says nothing."""

    def __init__(self, name: str, total: int, known: int, show: bool, stream: TextIO | None = None) -> None:
        self._name, self._total, self._done, self._known = name, total, known, known
        self._stream = stream or sys.stderr
        self._show = show
        self._started = self._said = time.monotonic()
        self._bar: Any = None
        if show and self._stream.isatty():
            from tqdm import tqdm

            form = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed} so far, {remaining} left"
            self._bar = tqdm(total=total, initial=known, desc=name, file=self._stream, bar_format=form, leave=True)

    def one(self) -> None:
        """Count one more answer."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(1)
            return
        now = time.monotonic()
        if self._show and now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            print(self.line(now - self._started), file=self._stream, flush=True)

    def line(self, elapsed: float) -> str:
        """One sentence: done, so far, left at the present rate."""
        new = self._done - self._known
        left = elapsed / new * (self._total - self._done) if new else 0.0
        return f"{self._name}: {self._done} of {self._total}, {_span(elapsed)} so far, about {_span(left)} left"

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()


def _span(seconds: float) -> str:
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
