"""Made results of a family of models, with outcomes per item and samples, as evaluate_model.py writes them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.outcomes import Outcomes, TaskOutcomes
from eval.result import EvalResult, Lineage, Score

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
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (place / f"samples_{FILES[column]}_{stamp}.jsonl").write_text(lines, encoding="utf-8")
    path = place / f"results_{stamp}.json"
    path.write_text(json.dumps(result.to_json()), encoding="utf-8")
    return path


def write_family(folder: Path) -> Path:
    for result in family():
        write(result, folder)
    return folder
