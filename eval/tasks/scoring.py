"""Verdicts on all answers of one item: pass@k of code, GSM8K and MATH, with what is reported beside them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from eval.benchmarks import UNFENCED
from eval.tasks.answers import gold_of
from eval.tasks.code import CODE_EVAL, pass_at_k, program_of
from eval.tasks.fences import answer_code, defined, unfenced
from eval.tasks.grader import GRADER
from eval.tasks.strict import without_reasoning

if TYPE_CHECKING:
    from types import FunctionType

    from common.files.json_values import JsonObject

SIZES = (10, 100)
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def every_answer(responses: Sequence[Sequence[str]], _docs: Sequence[JsonObject]) -> list[list[str]]:
    """lm-eval's filter that passes all answers of each item on."""
    return [list(r) for r in responses]


def pass_rates(name: str, verdicts: Sequence[bool]) -> dict[str, float]:
    """Return the share of right answers under `name`, and for several answers pass@k.

    Args:
        name: The metric's name.
        verdicts: Whether each of the n answers to one item is right; pass@k is given for k = 10, 100 and n.
    """
    n, correct = len(verdicts), sum(verdicts)
    rates = {name: correct / n}
    for k in sorted({*(k for k in SIZES if k < n), n} - {1}):
        rates[f"pass@{k}"] = pass_at_k(n, correct, k)
    return rates


def sizes_of(samples: int) -> list[str]:
    """Return the names of the metrics that `samples` answers to an item give besides the first."""
    return [name for name in pass_rates("", [False] * samples) if name]


def maths(doc: Mapping[str, str], results: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """Grade answers to an item of MATH or GSM8K as the paper does, GSM8K's by lm-eval's two matches as well.

    Reasoning in <think> is no part of an answer.
    """
    first = results[0]
    answers = [first] if isinstance(first, str) else list(first)
    gold = gold_of(doc)
    rates = pass_rates("acc", [GRADER.matches(answer, gold) for answer in answers])
    if "question" in doc:
        number, texts = _bare(gold), [without_reasoning(answer) for answer in answers]
        rates["strict match"] = _share(texts, lambda text: _bare(_first(_STRICT, text)) == number)
        rates["flexible match"] = _share(texts, lambda text: _bare(_last(_FLEXIBLE, text)) == number)
    return rates


def minerva(doc: Mapping[str, str], answer: str, stock: FunctionType) -> dict[str, float]:
    """MATH as lm-eval's minerva_math, with our grader in place of its call of math-verify, which has no time limit.

    `stock` is that task's own scoring function, whose `exact_match` is kept; it counts only answers in the words of its
    examples.
    """
    stock_globals = stock.__globals__
    normal = stock_globals["normalize_final_answer"](
        stock_globals["get_unnormalized_answer"](without_reasoning(answer))
    )
    exact = stock_globals["is_equiv"](normal, doc["answer"])
    return {"math_verify": float(GRADER.verify(answer, doc["solution"])), "exact_match": float(exact)}


def _share(answers: Sequence[str], right: Callable[[str], bool]) -> float:
    return sum(map(right, answers)) / len(answers)


def _first(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return match.group(1) if match else "[invalid]"


def _last(pattern: re.Pattern[str], text: str) -> str:
    matches = pattern.findall(text)
    return matches[-1] if matches else "[invalid]"


def _bare(number: str) -> str:
    """Without thousands separators, dollar signs and a final full stop."""
    return re.sub(r"\.$", "", re.sub(r"[,$]", "", number)).strip().lower()


Answer = str | Sequence[str]
"""What lm-eval's filter of a code task leaves of an item: one program or several (HumanEval's with its prompt)."""


def _programs(doc: JsonObject, candidates: Answer) -> tuple[list[str], list[str]]:
    """The programs, without tests, that answers stand for: as they are, and with code fences removed.

    HumanEval's completions go on from the item's prompt, MBPP's stand alone. Reasoning in <think> is no part of either.
    """
    programs = [candidates] if isinstance(candidates, str) else list(candidates)
    prompt = str(doc["prompt"]) if "entry_point" in doc else ""
    names = [str(doc["entry_point"])] if prompt else defined(str(doc.get("code", "")))
    answers = [program.removeprefix(prompt) for program in programs]
    return [prompt + answer_code(prompt, a) for a in answers], [unfenced(prompt, a, names) for a in answers]


def code(doc: JsonObject, candidates: Answer) -> dict[str, float]:
    """pass@1, further pass@k where there are several answers, and pass@1 with code fences removed."""
    strict, bare = (_passed(doc, programs) for programs in _programs(doc, candidates))
    return pass_rates("pass@1", strict) | {UNFENCED: sum(bare) / len(bare)}


def _passed(doc: JsonObject, programs: Sequence[str]) -> list[bool]:
    return [verdict.passed for verdict in CODE_EVAL.verdicts([program_of(doc, code) for code in programs])]


def prefetch(items: Sequence[tuple[JsonObject, Answer]]) -> None:
    """Run the programs of many (item, answers) at once, over all cores; `code` then finds their verdicts."""
    CODE_EVAL.prefetch(
        [program_of(d, code) for d, candidates in items for group in _programs(d, candidates) for code in group]
    )
