"""Grade answers within a time limit, in a worker process that is killed and replaced when it takes longer.

Two graders: the paper's (`Grader.matches`: answers.py and equality.py) and that of the `lm-eval` preset
(`Grader.verify`: strict.py). Both compare by eval/maths, by different rules.

sympy can think for hours about a power tower, and neither a thread nor a handler in Python stops it reliably. The
system does: the worker asks for a signal that ends it after so much CPU time, and its successor takes the next item.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import EvaluationError
from eval.maths.comparison import same_answers
from eval.tasks.answers import extract, gold_of
from eval.tasks.equality import equal, quickly_equal
from eval.tasks.strict import final_answer, quickly_verified, verified

SECONDS = 3.0
"""CPU time for one item, so that a verdict does not depend on what else the machine does."""
PATIENCE = 10
"""Wall-clock time is this many times as long: for a worker that waits instead of computing."""
START_SECONDS = 120.0
MEMORY = 2 << 30
ROOT = Path(__file__).resolve().parent.parent.parent


class Grader:
    """Answers "are these equal?" by one worker process, started when mathematics is first needed."""

    def __init__(self, seconds: float = SECONDS) -> None:
        """`seconds`: CPU time for one item."""
        self.seconds = seconds
        self.timeouts = 0
        self._worker: subprocess.Popen[bytes] | None = None

    def equal(self, answer: str, gold: str) -> bool:
        """The paper's grader: whether `answer` equals `gold`, both normalised; False where the time limit ends it."""
        return self._ask("equal", answer, gold)

    def matches(self, generation: str, gold: str) -> bool:
        """The paper's grader: whether the answer extracted from a generation equals a normalised gold answer."""
        return self._ask("matches", generation, gold)

    def verify(self, generation: str, solution: str) -> bool:
        """The `lm-eval` preset's grader: whether the final answer of a generation is that of a gold solution.

        False where the time limit ends it.
        """
        return self._ask("verify", generation, solution)

    def _ask(self, how: str, answer: str, gold: str) -> bool:
        worker = self._worker or self._start()
        try:
            self._write(worker, {"how": how, "answer": answer, "gold": gold, "seconds": self.seconds})
            reply = _read_line(worker, START_SECONDS + PATIENCE * self.seconds)
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
                f"The worker that compares maths answers did not start within {START_SECONDS:g} s; start it by hand: "
                f'{sys.executable} -c "from eval.tasks.grader import serve; serve()".'
            )
        return self._worker

    @staticmethod
    def _write(worker: subprocess.Popen[bytes], message: Mapping[str, str | float]) -> None:
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(message).encode() + b"\n")
        worker.stdin.flush()


def _read_line(worker: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """One line of the worker's answer (it never writes more at a time), or None after `seconds` or at its end."""
    assert worker.stdout is not None
    ready, _, _ = select.select([worker.stdout], [], [], seconds)
    return (worker.stdout.readline() or None) if ready else None


def serve() -> None:
    """The worker: read {"how", "answer", "gold", "seconds"} lines, write true or false, until its input ends.

    Extraction and the quick decisions run under the time limit as well; sympy and the grammar, which take seconds to
    import, are loaded outside it, when the first item needs them.
    """
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.WARNING)
    loaded = False
    print("ready", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        with _limit(question["seconds"]):
            answer, gold, verdict = _decide(question["how"], question["answer"], question["gold"])
        if verdict is None:
            if not loaded:
                loaded = same_answers("x+1", "1+x")
            with _limit(question["seconds"]):
                verdict = _compared(question["how"], answer, gold)
        print(json.dumps(verdict), flush=True)


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """While open, count CPU time: SIGPROF, which nobody handles, ends the process, and a wall clock a waiting one."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _decide(how: str, answer: str, gold: str) -> tuple[str, str, bool | None]:
    """Return the two answers, extracted as asked, and the verdict where no mathematics is needed for it."""
    if how == "verify":
        answer, gold = final_answer(answer), final_answer(gold)
        return answer, gold, quickly_verified(answer, gold)
    if how == "matches":
        answer = extract(answer)
    return answer, gold, quickly_equal(answer, gold)


def _compared(how: str, answer: str, gold: str) -> bool:
    try:
        return verified(answer, gold) if how == "verify" else equal(answer, gold)
    except Exception:  # an answer sympy cannot handle is not equal to the gold
        return False


GRADER = Grader()
atexit.register(GRADER.close)


def process_results(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's scoring function of one item: accuracy 0 or 1."""
    return {"acc": float(GRADER.matches(results[0], gold_of(doc)))}
