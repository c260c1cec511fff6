"""Progress of a benchmark and its time left: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

SECONDS_BETWEEN_LINES = 60.0


class Progress:
    """Counts answers of one benchmark. `known` of its `total` were there before; `show` False says nothing.

    ahead: the work that the others are, in any unit, since the longest come first and a count would tell too much time.
    """

    def __init__(
        self, name: str, total: int, n_known: int, show: bool, ahead: float, stream: TextIO | None = None
    ) -> None:
        self._name, self._total, self._done = name, total, n_known
        self._ahead, self._worked = ahead, 0.0
        self._stream = stream or sys.stderr
        self._show = show
        self._started = self._said = time.monotonic()
        self._bar: Any = None
        if show and self._stream.isatty():
            from tqdm import tqdm

            form = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed} so far{postfix}"
            self._bar = tqdm(total=total, initial=n_known, desc=name, file=self._stream, bar_format=form, leave=True)

    def one(self, work: float) -> None:
        """Count one more answer, and the work that it was."""
        self._done, self._worked = self._done + 1, self._worked + work
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(f"about {_span(self.seconds_left(now - self._started))} left", refresh=False)
            self._bar.update(1)
            return
        if self._show and now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            print(self.line(now - self._started), file=self._stream, flush=True)

    def line(self, elapsed: float) -> str:
        """One sentence: done, so far, left at the present rate."""
        time_left = _span(self.seconds_left(elapsed))
        return f"{self._name}: {self._done} of {self._total}, {_span(elapsed)} so far, about {time_left} left"

    def seconds_left(self, elapsed: float) -> float:
        """Return the seconds that the rest takes, at the rate of what was done in `elapsed` seconds."""
        return elapsed / self._worked * max(0.0, self._ahead - self._worked) if self._worked else 0.0

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
