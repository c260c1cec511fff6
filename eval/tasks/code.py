"""The stand-in for the hub's metric `code_eval`: pass@k with the project's sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

from eval.sandbox import Verdict, run_programs


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased estimator of pass@k from `n` samples: 1 - C(n - correct, k) / C(n, k). Chen et al. 2021."""
    return 1.0 - comb(n - correct, k) / comb(n, k)


def program_of(candidate: str, reference: str) -> str:
    """The program whose success is the candidate's: its code, then the tests."""
    return f"{candidate}\n{reference}"


class SandboxedCodeEval:
    """The part of the metric that lm-eval's tasks call, plus `prefetch`, which judges a benchmark at once."""

    def __init__(self) -> None:
        self._verdicts: dict[str, Verdict] = {}

    def prefetch(self, programs: Sequence[str]) -> None:
        """Run programs over all cores and remember their verdicts until the next call."""
        unique = list(dict.fromkeys(programs))
        self._verdicts = dict(zip(unique, run_programs(unique), strict=True))

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100), **_: Any
    ) -> tuple[dict[str, float], dict[int, list[Verdict]]]:
        """Return ({"pass@k": mean over problems}, verdicts by problem); a k above the number of samples is left out."""
        verdicts: dict[int, list[Verdict]] = {}
        for index, (reference, candidates) in enumerate(zip(references, predictions, strict=True)):
            programs = [program_of(candidate, reference) for candidate in candidates]
            fresh = list(dict.fromkeys(p for p in programs if p not in self._verdicts))
            self._verdicts |= dict(zip(fresh, run_programs(fresh), strict=True))
            verdicts[index] = [self._verdicts[p] for p in programs]
        fewest = min((len(v) for v in verdicts.values()), default=0)
        counts = [(len(v), sum(one.passed for one in v)) for v in verdicts.values()]
        return {
            f"pass@{size}": sum(pass_at_k(n, correct, size) for n, correct in counts) / len(counts)
            for size in k
            if size <= fewest
        }, verdicts


CODE_EVAL = SandboxedCodeEval()
