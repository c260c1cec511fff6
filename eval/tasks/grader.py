"""Compare two answers within a time limit, in a worker process that is killed and replaced when it takes longer.

sympy can think for hours about a power tower; no signal or thread stops it reliably, ending its process does.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from console.errors import EvaluationError
from eval.tasks.answers import extract, gold_of
from eval.tasks.equality import equal, quickly_equal

SECONDS = 3.0
START_SECONDS = 120.0
MEMORY = 4 << 30
ROOT = Path(__file__).resolve().parent.parent.parent


class Grader:
    """Answers "are these equal?" by one worker process, started when mathematics is first needed."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self.timeouts = 0
        self._worker: subprocess.Popen[bytes] | None = None

    def equal(self, answer: str, gold: str) -> bool:
        """Whether `answer` equals `gold`; False where that is not found out within the time limit."""
        quick = quickly_equal(answer, gold)
        if quick is not None:
            return quick
        worker = self._worker or self._start()
        try:
            self._write(worker, {"answer": answer, "gold": gold})
            reply = _read_line(worker, self.seconds)
        except OSError:
            reply = None
        if reply is None:  # too slow, or dead (out of memory, a recursion too deep for the interpreter)
            self.timeouts += 1
            self.close()
            return False
        return bool(json.loads(reply))

    def close(self) -> None:
        """End the worker; the next question starts another."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            worker.communicate()

    def _start(self) -> subprocess.Popen[bytes]:
        self._worker = subprocess.Popen(
            [sys.executable, "-c", "from eval.tasks.grader import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        if _read_line(self._worker, START_SECONDS) is None:
            self.close()
            raise EvaluationError(
                "The worker that compares maths answers did not start; is latex2sympy2_extended "
                "(of math-verify) installed in this environment?"
            )
        return self._worker

    @staticmethod
    def _write(worker: subprocess.Popen[bytes], message: Mapping[str, str]) -> None:
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(message).encode() + b"\n")
        worker.stdin.flush()


def _read_line(worker: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """One line of the worker's answer (it never writes more at a time), or None after `seconds` or at its end."""
    assert worker.stdout is not None
    ready, _, _ = select.select([worker.stdout], [], [], seconds)
    return (worker.stdout.readline() or None) if ready else None


def serve() -> None:
    """The worker: read {"answer", "gold"} lines, write true or false, until its input ends."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    import latex2sympy2_extended  # noqa: F401  (imported before the clock of the first item starts)

    print("ready", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            verdict = equal(question["answer"], question["gold"])
        except Exception:  # an answer sympy cannot handle is not equal to the gold
            verdict = False
        print(json.dumps(verdict), flush=True)


GRADER = Grader()
atexit.register(GRADER.close)


def process_results(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, Any]:
    """lm-eval's scoring function of one item: accuracy 0 or 1."""
    return {"acc": float(GRADER.equal(extract(results[0]), gold_of(doc)))}
