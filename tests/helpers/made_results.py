"""Made results of a family of models, with outcomes per item and samples, as evaluate_model.py writes them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.outcomes import Outcomes, TaskOutcomes
from eval.results.result import EvalResult, Lineage, Score

STAMP = "2026-02-01T10-00-00.000001"
SIZES = {"HumanEval": 164, "MMLU": 300, "GSM8K": 400, "IFEval": 120}
TASKS = {
    "HumanEval": ("humaneval",),
    "MMLU": ("mmlu_anatomy", "mmlu_virology"),
    "GSM8K": ("gsm8k_paper",),
    "IFEval": ("ifeval",),
}
FILES = {"HumanEval": "humaneval", "MMLU": "mmlu", "GSM8K": "gsm8k_paper", "IFEval": "ifeval"}
METRICS = {"HumanEval": "pass@1", "MMLU": "acc", "GSM8K": "acc", "IFEval": "mean of 4 accuracies"}
SKILLS = {
    "base": {"HumanEval": 0.15, "MMLU": 0.5, "GSM8K": 0.1, "IFEval": 0.25},
    "code": {"HumanEval": 0.35, "MMLU": 0.5, "GSM8K": 0.15, "IFEval": 0.3},
    "maths": {"HumanEval": 0.12, "MMLU": 0.48, "GSM8K": 0.55, "IFEval": 0.2},
    "ties": {"HumanEval": 0.3, "MMLU": 0.5, "GSM8K": 0.4, "IFEval": 0.3},
    "ties_aim": {"HumanEval": 0.31, "MMLU": 0.52, "GSM8K": 0.52, "IFEval": 0.32},
}
LINEAGES = {
    "ties": Lineage("ties", "out/base", ("out/code", "out/maths"), None),
    "ties_aim": Lineage("ties", "out/base", ("out/code", "out/maths"), 0.4),
}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def difficulties(column: str) -> list[float]:
    """One number an item; a model of a skill has the items right that are below it, mostly."""
    rng = random.Random(column)
    return [rng.random() for _ in range(SIZES[column])]


def verdicts(column: str, skill: float, seed: str) -> list[int]:
    rng = random.Random(f"{column}-{seed}")
    return [int((rng.random() if rng.random() < 0.15 else hard) < skill) for hard in difficulties(column)]


def column_outcomes(column: str, right: Sequence[int]) -> tuple[Outcomes, Score]:
    """Outcomes of one column whose items are right or wrong (IFEval: with one to three instructions each)."""
    tasks, start = {}, 0
    for at, task in enumerate(TASKS[column]):
        end = len(right) * (at + 1) // len(TASKS[column])
        part = [float(v) for v in right[start:end]]
        docs = tuple(digest(f"{task}-{i}")[:8] for i in range(len(part)))
        found: dict[str, tuple[float, ...]] = {METRICS[column]: tuple(part)}
        if column == "IFEval":
            sizes = [1.0 + i % 3 for i in range(len(part))]
            followed = [
                size if v else float(i % 2 and size - 1) for i, (v, size) in enumerate(zip(part, sizes, strict=True))
            ]
            found = {
                "prompt_level_strict_acc": tuple(part),
                "prompt_level_loose_acc": tuple(part),
                "inst_level_strict_acc": tuple(followed),
                "inst_level_loose_acc": tuple(followed),
                "instructions": tuple(sizes),
            }
        tasks[task] = TaskOutcomes(tuple(range(len(part))), docs, found)
        start = end
    outcomes = Outcomes(tasks)
    terms = outcomes.terms(METRICS[column])
    value = 100 * sum(sum(n) / sum(d) for n, d in terms) / len(terms)
    return outcomes, Score(METRICS[column], value, 1.0, len(right))


def made(
    model: str,
    skills: Mapping[str, float] | None = None,
    lineage: Lineage | None = None,
    seed: str | None = None,
    **settings: Any,
) -> EvalResult:
    """One model's result; `seed` (its name) decides by which items it deviates from its skill."""
    found = {c: column_outcomes(c, verdicts(c, s, seed or model)) for c, s in (skills or SKILLS[model]).items()}
    return EvalResult(
        f"out/{model}",
        {c: score for c, (_, score) in found.items()},
        lineage or LINEAGES.get(model, Lineage()),
        settings={"preset": "paper", "limit": None, "dtype_used": "bfloat16", **settings},
        versions={"lm_eval": "0.4.13", "torch": "2.13.0"},
        outcomes={c: outcomes for c, (outcomes, _) in found.items()},
        digest=f"sha256:{digest(model)}",
    )


def family() -> list[EvalResult]:
    """A base, two fine-tuned models, TIES of both, and its AIM row, which is better at GSM8K and alike elsewhere."""
    return [made(model) for model in SKILLS]


def write(
    result: EvalResult, folder: Path, stamp: str = STAMP, samples: Mapping[str, Sequence[Any]] | None = None
) -> Path:
    """Write a results file, and its samples by column, where evaluate_model.py would; return the former."""
    place = folder / result.model.replace("/", "__")
    place.mkdir(parents=True, exist_ok=True)
    for column, items in (samples or {}).items():
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (place / f"samples_{FILES[column]}_{stamp}.jsonl").write_text(lines, encoding="utf-8")
    path = place / f"results_{stamp}.json"
    path.write_text(json.dumps(result.to_json()), encoding="utf-8")
    return path


HOSTILE = (
    "</script><script>window.broken = 1</script>",
    '<img src=x onerror="window.broken = 2">',
    "<!-- <script> ]]> &lt;b&gt; \u2028 \x00 \ud800 @@SCRIPT@@ {{x}} ${y} `z`",
    "' onmouseover='window.broken = 3' \" > </pre></td></table>",
    "\u202eright to left \u0645\u0631\u062d\u0628\u0627 \U0001f600 " + "long" * 60,
)
"""Generations that would break a page which takes them for markup."""
BEGINNING = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


def samples(result: EvalResult) -> dict[str, list[dict[str, Any]]]:
    """What evaluate_model.py would have written beside the result: a line per item, in lm-eval's form."""
    found: dict[str, list[dict[str, Any]]] = {}
    for column, outcomes in result.outcomes.items():
        for task, part in outcomes.tasks.items():
            name = METRICS[column] if column != "IFEval" else "prompt_level_strict_acc"
            for item, right in zip(part.items, part.verdicts[name], strict=True):
                found.setdefault(column, []).append(_sample(result.model, column, task, item, bool(right)))
    return found


def _sample(model: str, column: str, task: str, item: int, right: bool) -> dict[str, Any]:
    hard = HOSTILE[item % len(HOSTILE)] if item % 7 == 3 else ""
    sample: dict[str, Any] = {"task": task, "doc_id": item, "doc_hash": digest(f"{task}-{item}"), "filter": "none"}
    if column == "MMLU":
        choices = "A. w\nB. x\nC. y\nD. z"
        prompt = f"The following is a question about {task[5:]}.\n\nWhich is number {item}? {hard}\n{choices}\nAnswer:"
        gold = item % 4
        best = gold if right else (gold + 1) % 4
        likely = [[[-1.0 - 0.5 * (i != best) - 0.01 * i, i == best]] for i in range(4)]
        asked = [[prompt, f" {letter}"] for letter in "ABCD"]
        return {**sample, "target": str(gold), "arguments": asked, "resps": likely}
    if column == "HumanEval":
        prompt = f'def f{item}(x: int) -> int:\n    """Return x plus {item}. {hard}"""\n'
        text = f"    return x + {item if right else item + 1}\n{hard}"
        gold = f"def check(candidate):\n    assert candidate(1) == {item + 1}\n\ncheck(f{item})"
    elif column == "GSM8K":
        problem = f"Ann has {item} apples and buys {2 * item} more. How many has she?"
        prompt = f"{BEGINNING}### Instruction:\n{problem}\n\n### Response:"
        text = f" Let's see. {hard}\nThe answer is {3 * item if right else 3 * item + 1}."
        gold = str(3 * item)
    else:
        prompt = f"Write a poem of {item} words without a comma."
        text, gold = f"{hard} a poem by {model}" * (1 + item % 3), "0"
    return {**sample, "target": gold, "arguments": [[prompt, {"until": ["\n\n"]}]], "resps": [[text]]}


def write_family(folder: Path, results: Sequence[EvalResult] | None = None) -> Path:
    """Write a family's results with their samples."""
    for result in results or family():
        write(result, folder, samples=samples(result))
    return folder


def sweep() -> list[EvalResult]:
    """The family with AIM at four omegas."""
    found = family()[:-1]
    lineage = LINEAGES["ties_aim"]
    for omega, gsm8k in ((0.8, 0.44), (0.6, 0.48), (0.4, 0.52), (0.2, 0.47)):
        skills = {**SKILLS["ties_aim"], "GSM8K": gsm8k}
        found.append(made(f"ties_aim_{omega:g}", skills, replace(lineage, omega=omega)))
    return found
