"""The stand-in for the hub's metric `code_eval`: pass@k with the project's sandbox, and code without its fences."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from math import comb
from typing import Any

from eval.sandbox import Verdict, run_programs

_FENCE = re.compile(r"^[ \t]*(?:```|~~~)([^\n]*)(?:\n|\Z)", re.MULTILINE)
_FUNCTION = re.compile(r"^(?:async[ \t]+)?def[ \t]+(\w+)", re.MULTILINE)


def tests_of(doc: Mapping[str, Any]) -> str:
    """The tests of an item of HumanEval or MBPP as code to run after the program, MBPP's `test_setup_code` included.

    One of MBPP's 500 items (367) has such code; lm-eval's own task leaves it out, and no program can pass it there.
    """
    if "entry_point" in doc:
        return f"{doc['test']}\ncheck({doc['entry_point']})"
    return "\n".join(part for part in (doc.get("test_setup_code", ""), *doc["test_list"]) if part)


def unfenced(prompt: str, completion: str) -> str:
    """Return the program that a completion means when code fences stand in it; without tests.

    The code is the first fenced block, to the completion's end where it is not closed. A first fence without a
    language, behind text that continues `prompt` as Python, closes: then the text before it is the code. The code
    follows `prompt`; where it defines the prompt's last function itself, only what stands before that function in the
    prompt (imports, helpers) is kept. With an empty prompt (MBPP) the code is the program.
    """
    code = _code(prompt, completion)
    functions = list(_FUNCTION.finditer(prompt))
    if functions and any(match[1] == functions[-1][1] for match in _FUNCTION.finditer(code)):
        return f"{prompt[: functions[-1].start()]}\n{code}"
    return prompt + code


def _code(prompt: str, completion: str) -> str:
    first = _FENCE.search(completion)
    if first is None:
        return completion
    before = completion[: first.start()]
    if not first[1].strip() and before.strip() and _is_python(prompt + before):
        return before
    closing = _FENCE.search(completion, first.end())
    return completion[first.end() : closing.start()] if closing else completion[first.end() :]


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


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
