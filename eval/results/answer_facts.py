"""Length, truncation and emptiness of generated answers, by benchmark: what a score of a reasoning model depends on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from common.markup import markdown_text
from eval.results.result import COLUMNS, EvalResult
from eval.tasks.strict import without_reasoning

if TYPE_CHECKING:
    from common.files.json_values import JsonObject, JsonValue

FACTS = ("tokens", "finish", "prompt_truncated")
"""Keys of a sample with facts of its answers: lists in the order of `resps`, None where the backend reports none."""
HEADINGS = {"tokens": "tokens", "characters": "characters", "cut": "cut (%)", "empty": "empty (%)"}


def answer_facts(samples: Iterable[JsonObject]) -> dict[str, float]:
    """Return the facts of a benchmark's generated answers; none where its tasks only score choices.

    Args:
        samples: lm-eval's samples of all its tasks; several filters of one item count once.

    Returns:
        n: answers. tokens: mean number of generated tokens, where the backend counts them. characters: mean length.
        cut: percentage of answers that ended at the limit of new tokens, where the backend tells. empty: percentage
        of answers without text, reasoning in <think> left out.
    """
    items = {(s.get("task"), s.get("doc_id")): s for s in samples}
    texts = [text for s in items.values() for text in _flat(s.get("resps")) if isinstance(text, str)]
    if not texts:
        return {}
    facts: dict[str, float] = {"n": len(texts), "characters": sum(map(len, texts)) / len(texts)}
    facts["empty"] = 100 * sum(not without_reasoning(text).strip() for text in texts) / len(texts)
    tokens, finishes = ([v for s in items.values() for v in _flat(s.get(name))] for name in ("tokens", "finish"))
    if len(tokens) == len(texts) and None not in tokens:
        facts["tokens"] = sum(tokens) / len(tokens)
    if len(finishes) == len(texts) and None not in finishes:
        facts["cut"] = 100 * sum(finish == "length" for finish in finishes) / len(finishes)
    return facts


def _flat(lists: list[JsonValue] | None) -> list[JsonValue]:
    return list(chain.from_iterable(one if isinstance(one, list) else [one] for one in lists or ()))


def answers_table(results: Sequence[EvalResult]) -> str:
    """Return a Markdown table of the answers of each model: length, share cut at the limit, share without text.

    "-" stands where a backend does not tell, or where results were written before these figures.
    """
    present = dict.fromkeys(name for result in results for name in result.answers)
    benchmarks = [c for c in COLUMNS if c in present] + [c for c in present if c not in COLUMNS]
    if not benchmarks:
        return "No result has figures of generated answers; grade the samples again with --rescore."
    known_facts = {name: {fact for r in results for fact in r.answers.get(name, {})} for name in benchmarks}
    columns = [
        (name, fact)
        for name in benchmarks
        for fact in ("tokens" if "tokens" in known_facts[name] else "characters", "cut", "empty")
    ]
    rows = [["Model", *(f"{markdown_text(name)} {HEADINGS[fact]}" for name, fact in columns)]]
    for result in results:
        values = [result.answers.get(name, {}).get(fact) for name, fact in columns]
        rows.append([markdown_text(Path(result.model).name), *("-" if v is None else f"{v:.1f}" for v in values)])
    rule = ["---", *("---:" for _ in columns)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))
