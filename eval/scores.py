"""From lm-eval's dictionary of results to one Score per benchmark, in percent. No third-party import."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eval.benchmarks import Benchmark
from eval.result import Score

IFEVAL = ("prompt_level_strict_acc", "prompt_level_loose_acc", "inst_level_strict_acc", "inst_level_loose_acc")
NOT_FRACTIONS = ("perplexity", "bits_per_byte", "bleu", "chrf", "ter", "likelihood")
_NOT_METRICS = ("alias", "name", "sample_len", "sample_count", "samples")

Samples = Mapping[str, Sequence[Mapping[str, Any]]]


def scores_of(
    benchmark: Benchmark, leaves: Sequence[str], raw: Mapping[str, Any], samples: Samples
) -> dict[str, Score]:
    """Return the benchmark's scores by column name; one, or one per task for a name that has no total of its own.

    `leaves` are the tasks it consists of, `samples` lm-eval's logged samples of each.
    """
    if benchmark.name == "ifeval":
        return {benchmark.column: ifeval(samples[benchmark.task])}
    results = raw["results"].get(benchmark.task, {})
    key = benchmark.metric if benchmark.metric in results else _first_metric(results)
    if key is None:
        parts = {leaf: _first_metric(raw["results"][leaf]) for leaf in leaves if leaf != benchmark.task}
        return {leaf: _score(raw["results"][leaf], key, samples, [leaf]) for leaf, key in parts.items() if key}
    return {benchmark.column: _score(results, key, samples, leaves)}


def _first_metric(results: Mapping[str, Any]) -> str | None:
    keys = (
        k for k, v in results.items() if k not in _NOT_METRICS and "_stderr" not in k and isinstance(v, int | float)
    )
    return next(keys, None)


def _score(results: Mapping[str, Any], key: str, samples: Samples, leaves: Sequence[str]) -> Score:
    metric, _, filter_name = key.partition(",")
    scale = 1.0 if any(word in metric for word in NOT_FRACTIONS) else 100.0
    stderr = results.get(f"{metric}_stderr,{filter_name}")
    items = [s for leaf in leaves for s in samples.get(leaf, ()) if s.get("filter", filter_name) == filter_name]
    if not isinstance(stderr, int | float):
        stderr = standard_error([s[metric] for s in items if isinstance(s.get(metric), int | float)])
    n = len({(s["task"], s["doc_id"]) for s in items}) or results.get("sample_len")
    return Score(metric, scale * results[key], None if stderr is None else scale * stderr, n)


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean of `values`; None for fewer than two."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) * (len(values) - 1)))


def ifeval(samples: Iterable[Mapping[str, Any]]) -> Score:
    """The mean of IFEval's four accuracies: of prompts and of instructions, strict and loose.

    That the published column is this mean is inferred from its values. The standard error linearises the two
    instruction-level ratios, with prompts as the independent unit.
    """
    items = list(samples)
    sizes = [len(s["inst_level_strict_acc"]) for s in items]
    mean_size = sum(sizes) / len(sizes)
    deviations, total = [0.0] * len(items), 0.0
    for metric in IFEVAL:
        per_prompt = metric.startswith("prompt")
        right = [float(s[metric]) if per_prompt else float(sum(s[metric])) for s in items]
        accuracy = sum(right) / (len(items) if per_prompt else sum(sizes))
        total += accuracy / 4
        for i, (count, size) in enumerate(zip(right, sizes, strict=True)):
            deviations[i] += ((count - accuracy) if per_prompt else (count - accuracy * size) / mean_size) / 4
    stderr = standard_error(deviations)
    return Score("mean of 4 accuracies", 100 * total, None if stderr is None else 100 * stderr, len(items))


def spread(limit: int, sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """Choose `limit` items over the parts of a benchmark: the first ones of each, evenly, at least one a part."""
    share, more = divmod(limit, len(sizes))
    return {name: list(range(min(size, max(1, share + (i < more))))) for i, (name, size) in enumerate(sizes.items())}
