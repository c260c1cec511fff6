"""Replacement of the hub's metric `code_eval`: pass@k by the sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import TYPE_CHECKING

from common.errors import EvaluationError
from eval.sandbox.separation import defined_names, obstacle
from eval.sandbox.supervisor import SandboxSettings, containment, run_programs
from eval.sandbox.verdict import Program, Verdict
from eval.tasks.fences import is_python

if TYPE_CHECKING:
    from common.files.json_values import JsonObject


def tests_of(doc: JsonObject) -> str:
    """The tests of an item of HumanEval or MBPP as code to run after the program, MBPP's `test_setup_code` included.

    One of MBPP's 500 items (367) has such code; lm-eval's own task leaves it out, and no program can pass it there.
    """
    if "entry_point" in doc:
        return f"{doc['test']}\ncheck({doc['entry_point']})"
    return "\n".join(part for part in (doc.get("test_setup_code", ""), *doc["test_list"]) if part)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased estimator of pass@k from `n` samples: 1 - C(n - correct, k) / C(n, k). Chen et al. 2021."""
    return 1.0 - comb(n - correct, k) / comb(n, k)


def program_of(doc: JsonObject, code: str) -> Program:
    """Return a program for an item of HumanEval or MBPP with the item's tests, which run in another process.

    HumanEval's prompt defines helpers that its tests use; MBPP's reference solution tells which names are under test.
    """
    if "entry_point" in doc:
        return Program(code, tests_of(doc), _definitions(str(doc["prompt"])), (str(doc["entry_point"]),))
    return Program(code, tests_of(doc), entry_points=defined_names(str(doc.get("code", ""))) or None)


def program_with(reference: str, code: str) -> Program:
    """Return a program with the tests of any other task: apart from it where they can be, else appended to it."""
    return Program(code, reference) if obstacle(reference) is None else Program(f"{code}\n{reference}")


def _definitions(prompt: str) -> str:
    """Return HumanEval's prompt as complete code; "" where it is none."""
    return next((text for text in (prompt, f"{prompt}\n    pass\n") if is_python(text)), "")


class SandboxedCodeEval:
    """Replacement of the hub's metric `code_eval`: pass@k by the sandbox, once `sandbox` is set.

    Attributes:
        sandbox: settings of the sandbox; None refuses to run anything.
        is_loading: task files are being imported, which call the metric on a sample of their own; nothing runs.
    """

    def __init__(self, sandbox: SandboxSettings | None = None) -> None:
        self.sandbox = sandbox
        self.is_loading = False
        self._verdicts: dict[Program, Verdict] = {}

    def record(self) -> JsonObject:
        """Return the mode and layers of containment for the results file; empty where no program may run."""
        if self.sandbox is None:
            return {}
        chosen = containment(self.sandbox.weak)
        return {"mode": chosen.mode, "layers": list(chosen.layers), "unavailable": dict(chosen.refused)}

    def prefetch(self, programs: Sequence[Program]) -> None:
        """Run programs over all cores and remember their verdicts until the next call."""
        self._verdicts = {}
        self._run(programs)

    def verdicts(self, programs: Sequence[Program]) -> list[Verdict]:
        """Return the verdicts on programs; those that were judged before are not run again.

        Raises EvaluationError where running programs is not allowed.
        """
        self._run(programs)
        return [self._verdicts[program] for program in programs]

    def _run(self, programs: Sequence[Program]) -> None:
        fresh = list(dict.fromkeys(p for p in programs if p not in self._verdicts))
        if not fresh:
            return
        if self.sandbox is None:
            raise EvaluationError("Model-written code runs only with --allow_code_execution.")
        verdicts = run_programs(fresh, self.sandbox.limits, weak=self.sandbox.weak, seed=self.sandbox.seed)
        self._verdicts |= dict(zip(fresh, verdicts, strict=True))

    def compute(
        self,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
        **_: object,
    ) -> tuple[dict[str, float], dict[int, list[Verdict]]]:
        """Return ({"pass@k": mean over problems}, verdicts by problem); a k above the number of samples is left out."""
        if self.is_loading:
            return {f"pass@{size}": 0.0 for size in k}, {}
        pairs = zip(references, predictions, strict=True)
        programs = [[program_with(reference, code) for code in candidates] for reference, candidates in pairs]
        self._run([program for group in programs for program in group])
        verdicts = {index: self.verdicts(group) for index, group in enumerate(programs)}
        fewest = min((len(v) for v in verdicts.values()), default=0)
        counts = [(len(v), sum(one.passed for one in v)) for v in verdicts.values()]
        return {
            f"pass@{size}": sum(pass_at_k(n, correct, size) for n, correct in counts) / len(counts)
            for size in k
            if size <= fewest
        }, verdicts


CODE_EVAL = SandboxedCodeEval()
