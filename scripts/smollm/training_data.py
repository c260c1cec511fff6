"""The fine-tuning data of the real model's three skills: one type, GSM8K, and files the user brings. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import FailureError, UsageError
from common.files.bounded_reading import MAX_RESULTS, MAX_TOKENIZER_VALUES, UnreadableError, parse_json, read_text

if TYPE_CHECKING:
    from common.files.json_values import JsonObject, JsonValue

WCOT_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{input}\n\n### Response: Let's think step by step."
)
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{input}\n\n### Response:"
)
CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Example:
    """One prompt and its answer; the loss is taken on `completion` (and the end token that training adds).

    `chat` puts the prompt through the tokenizer's chat template; `constraints` are the verifiable
    properties that an instruction's answer was built to have: (name, arguments) each.
    """

    prompt: str
    completion: str
    chat: bool = False
    constraints: tuple[tuple[str, Mapping[str, JsonValue]], ...] = ()


@dataclass(frozen=True)
class SkillData:
    """The examples of one skill, with where they come from and under which license they may be used."""

    skill: str
    source: str
    license: str
    examples: tuple[Example, ...] = field(repr=False)
    remarks: tuple[str, ...] = ()


def read_rows(path: Path) -> list[JsonObject]:
    """Return the rows of a JSON array or of a JSONL file. Raises UsageError naming the file and the line."""
    try:
        text = read_text(path, MAX_RESULTS)
        if text.lstrip().startswith("["):
            rows = parse_json(text, str(path), MAX_TOKENIZER_VALUES)
        else:
            # Not splitlines(): it also breaks at U+2028, which JSON may hold inside a string.
            lines = enumerate(text.split("\n"), start=1)
            rows = [parse_json(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    except UnreadableError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).") from error
    bad = next((i for i, row in enumerate(rows) if not isinstance(row, dict)), None)
    if not rows or bad is not None:
        raise UsageError(
            f"{path} should hold one JSON object per example; {'none found' if not rows else f'entry {bad} is none'}."
        )
    result: list[JsonObject] = rows
    return result


def read_user_examples(path: Path) -> tuple[Example, ...]:
    """Examples from a user's file, rows of (prompt, completion) or of Alpaca's (instruction, input, output)."""
    examples = []
    for number, row in enumerate(read_rows(path), start=1):
        if {"prompt", "completion"} <= row.keys():
            prompt, completion = row["prompt"], row["completion"]
        elif {"instruction", "output"} <= row.keys():
            request = "\n".join(part for part in (row["instruction"], row.get("input") or "") if part)
            prompt, completion = ALPACA_PROMPT.format(input=request), f" {row['output']}"
        else:
            raise UsageError(
                f"{path}, example {number} has neither prompt and completion nor instruction and output; "
                f"found {', '.join(sorted(row)) or 'nothing'}."
            )
        if not (isinstance(prompt, str) and isinstance(completion, str) and completion.strip()):
            raise UsageError(
                f"{path}, example {number}: prompt and completion should be text, the completion not empty."
            )
        examples.append(Example(prompt, completion))
    return tuple(examples)


def benchmark_rows(dataset: str, config: str, split: str, data_dir: Path | None) -> list[JsonObject] | None:
    """Rows of a hub data set: from a mirror laid out like the hub under `data_dir`, else from the hub.

    Returns None where neither has it, for the caller to say what that means.
    """
    if data_dir is not None:
        for root in (data_dir / "hub", data_dir):
            path = root / dataset / config / f"{split}.jsonl"
            if path.is_file():
                return read_rows(path)
    import datasets

    datasets.disable_progress_bars()
    try:
        return [dict(row) for row in datasets.load_dataset(dataset, config, split=split)]
    except Exception:  # The hub's client raises many kinds when it is offline; all mean "not to be had".
        return None


def math_example(question: str, answer: str) -> Example:
    """A GSM8K problem under the prompt of the evaluation, its solution ending in `The answer is x.`.

    The calculator marks `<<48/2=24>>` go; `#### 24` becomes a sentence, the form that every extraction
    rule of the evaluation reads (`the answer is` before `the last number`).
    """
    steps, marker, gold = CALCULATOR_MARK.sub("", answer).rpartition("####")
    if not marker or not gold.strip():
        raise FailureError(f"A GSM8K answer has no `#### x` line: {answer[:80]!r}.")
    prompt = WCOT_PROMPT.format(input=question.strip()).strip()
    return Example(prompt, f" {steps.strip()}\nThe answer is {gold.strip()}.")


def math_examples(train: Iterable[Mapping[str, str]], test: Iterable[Mapping[str, str]]) -> tuple[Example, ...]:
    """GSM8K's training items as examples, without any whose question is among `test` (spaces and case aside)."""
    test_questions = {plain(row["question"]) for row in test}
    return tuple(
        math_example(row["question"], row["answer"]) for row in train if plain(row["question"]) not in test_questions
    )


def plain(text: str) -> str:
    """Lower case, single spaces: what is compared when texts may coincide."""
    return " ".join(text.lower().split())


def build_math(data_dir: Path | None) -> SkillData:
    """GSM8K's training split. Errors: FailureError when neither `data_dir` nor the hub has it."""
    train = gsm8k_train(data_dir)
    test = benchmark_rows("openai/gsm8k", "main", "test", data_dir)
    warnings = () if test else ("GSM8K's test split is not at hand, so its disjointness was taken on trust",)
    return SkillData("math", "GSM8K, training split", "MIT", math_examples(train, test or ()), warnings)


def gsm8k_train(data_dir: Path | None) -> list[JsonObject]:
    """Rows of GSM8K's training split. Errors: FailureError that says where to put the file."""
    rows = benchmark_rows("openai/gsm8k", "main", "train", data_dir)
    if rows is None:
        raise FailureError(
            "GSM8K is neither on the hub (unreachable?) nor under --data_dir; put its train.jsonl at "
            "DATA_DIR/openai/gsm8k/main/train.jsonl."
        )
    return rows


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write the examples as JSONL, so that what a model was trained on can be looked at."""
    rows = (
        {
            "prompt": e.prompt,
            "completion": e.completion,
            "chat": e.chat,
            "constraints": [[name, dict(args)] for name, args in e.constraints],
        }
        for e in examples
    )
    staged = path.with_name(path.name + ".partial")
    staged.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    staged.replace(path)
