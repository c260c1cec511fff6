"""Few-shot examples: an item is never an example of itself."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset
    from lm_eval.api.samplers import ContextSampler
    from lm_eval.api.task import Task

    from common.files.json_values import JsonObject


def keep_item_out(task: Task, seed: int) -> None:
    """Replace an example that is the evaluated item by another one.

    lm-eval removes the item only where the task file names the evaluated split as `fewshot_split`; a task whose
    examples come from its test split by default, or whose evaluated split is its validation split, may show the answer.
    All other examples, and their order, stay those that lm-eval draws.

    Args:
        task: A task of lm-eval; its `fewshot_context` and `sampler` are wrapped.
        seed: The seed of the run; replacements are drawn from it and the item, apart from lm-eval's own draws.
    """
    sampler = getattr(task, "sampler", None)
    if sampler is None:
        return
    item: list[JsonObject | None] = [None]
    context, sample = type(task).fewshot_context, type(sampler).sample

    def remembered(doc: JsonObject, *args: object, **kwargs: object) -> str | list[str]:
        item[0] = doc
        prompt: str | list[str] = context(task, doc, *args, **kwargs)
        return prompt

    def other_items(
        n: int, eval_doc: JsonObject | None = None, df: Dataset | None = None, **kwargs: object
    ) -> Sequence[JsonObject]:
        return _without_item(task, sampler, sample(sampler, n, eval_doc, df, **kwargs), item[0], seed)

    task.fewshot_context = remembered
    sampler.sample = other_items


def _without_item(
    task: Task,
    sampler: ContextSampler,
    examples: Sequence[JsonObject],
    item: JsonObject | None,
    seed: int,
) -> Sequence[JsonObject]:
    """Return the examples with each one that is the item replaced."""
    examples = list(examples)
    places = [i for i, example in enumerate(examples) if _same(task, example, item)]
    if not places:
        return examples
    candidates = [doc for doc in sampler.fewshot_docs() if doc not in examples and not _same(task, doc, item)]
    if len(candidates) < len(places):
        if not _from_evaluated_split(task):
            return examples  # another split repeats the question, and has too few others
        available = len(examples) - len(places) + len(candidates)
        raise UsageError(
            f"--num_fewshot {len(examples)}: {task.config.task} has only {available} examples besides the item itself; "
            "use fewer."
        )
    in_order = type(sampler).__name__ == "FirstNSampler"
    chosen = candidates[: len(places)] if in_order else random.Random(f"{seed} {item}").sample(candidates, len(places))
    for place, other in zip(places, chosen, strict=True):
        examples[place] = other
    return examples


def _from_evaluated_split(task: Task) -> bool:
    """Return whether a task's examples are drawn from the split that is evaluated."""
    config = task.config
    named = task.fewshot_cfg.split
    if named is None and task.fewshot_cfg.samples is not None:
        return False
    split = named or config.training_split or config.validation_split or config.test_split
    return bool(split == (config.test_split or config.validation_split))


def _same(task: Task, example: JsonObject, item: JsonObject | None) -> bool:
    """Return whether an example is the item; rows that were processed differently are compared by their question."""
    if example == item:
        return True
    if not isinstance(example, dict) or not isinstance(item, dict) or example.keys() == item.keys():
        return False
    try:
        return bool(task.doc_to_text(example) == task.doc_to_text(item))
    except Exception:  # the example lacks a field that the item's question is made from
        return False
