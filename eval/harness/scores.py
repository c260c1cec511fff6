"""From lm-eval's results and samples to one Score and the outcomes of each item, per column. No third-party import."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from common.errors import EvaluationError
from common.files.json_values import JsonObject
from eval.benchmarks import Benchmark
from eval.outcomes import IFEVAL, IFEVAL_MEAN, INSTRUCTIONS, Outcomes, TaskOutcomes, per_instruction
from eval.results.metrics import direction_of, is_fraction
from eval.results.result import Score

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

    from eval.data.protocol import Loaded

_NOT_METRICS = ("alias", "name", "sample_len", "sample_count", "samples")

Samples = Mapping[str, Sequence[JsonObject]]
"""lm-eval's samples by task."""
Found = dict[str, tuple[Score, Outcomes | None]]


def scores_of(
    benchmark: Benchmark, loaded: Loaded, raw: JsonObject, samples: Samples, further: Sequence[str] = ()
) -> Found:
    """Return the benchmark's scores and outcomes by column: one, or one per task for a name without a total of its own.

    Args:
        benchmark: The benchmark that was asked for.
        loaded: The tasks and groups it consists of.
        raw: lm-eval's dictionary of results.
        samples: lm-eval's logged samples of each task.
        further: Names of metrics (such as pass@10) to report beside, where the benchmark has them.

    Raises:
        EvaluationError: The verdicts per item do not give lm-eval's score.
    """
    if benchmark.metric == IFEVAL_MEAN:
        return {benchmark.column: _ifeval(benchmark.task, samples[benchmark.task])}
    leaves = list(loaded.tasks)
    results = raw["results"].get(benchmark.task, {})
    key = benchmark.key if benchmark.key in results else _first_metric(results)
    if key is None:
        parts = {leaf: _first_metric(raw["results"][leaf]) for leaf in leaves if leaf != benchmark.task}
        return {leaf: _scored(loaded, raw, leaf, key, "", samples, [leaf]) for leaf, key in parts.items() if key}
    label = benchmark.metric if key == benchmark.key else ""
    beside = dict(benchmark.beside) | {name: f"{name},{key.partition(',')[2]}" for name in further}
    if further:  # several answers to an item: the share of them that is right is avg@n
        beside = {f"avg@{max(int(name.partition('@')[2]) for name in further)}": key} | beside
    return {benchmark.column: _scored(loaded, raw, benchmark.task, key, label, samples, leaves, beside)}


def _first_metric(results: JsonObject) -> str | None:
    keys = (
        k for k, v in results.items() if k not in _NOT_METRICS and "_stderr" not in k and isinstance(v, int | float)
    )
    return next(keys, None)


def _scored(
    loaded: Loaded,
    raw: JsonObject,
    name: str,
    key: str,
    label: str,
    samples: Samples,
    leaves: Sequence[str],
    beside: Mapping[str, str] | None = None,
) -> tuple[Score, Outcomes | None]:
    """Return the score of one task or group and, where items have verdicts of their own, its outcomes."""
    results = raw["results"][name]
    metric, _, filter_name = key.partition(",")
    label = label or metric
    values = [s[metric] for leaf in leaves for s in samples.get(leaf, ()) if metric in s]
    aggregations = {_aggregation(loaded.tasks[leaf], metric) for leaf in leaves}
    fraction = all(is_fraction(metric, aggregation, values) for aggregation in aggregations)
    directions = raw.get("higher_is_better", {}).get(name, {})
    outcomes = _outcomes({label: key, **(beside or {})}, samples, leaves) if fraction else None
    if outcomes is not None and not _weighted_by_size(loaded.groups.get(name), metric):
        outcomes = replace(outcomes, macro=(label, *(beside or {})))
    value = 100 * results[key] if fraction else results[key]
    if outcomes is not None and not math.isclose(outcomes.score(label), value, rel_tol=1e-9, abs_tol=1e-9):
        if aggregations <= {"mean"}:
            raise EvaluationError(
                f"{name}: {metric} is {value:.6f} in lm-eval's results and {outcomes.score(label):.6f} from its "
                "verdicts per item; the samples do not belong to the score."
            )
        outcomes = None  # the score is not a mean over items, so that they say nothing of its uncertainty
    stderr = results.get(f"{metric}_stderr,{filter_name}")
    if not isinstance(stderr, int | float):
        stderr = standard_error(outcomes.verdicts(label)) if outcomes and not outcomes.macro else None
    if stderr is not None and fraction:
        stderr *= 100
    items = {(s["task"], s["doc_id"]) for leaf in leaves for s in samples.get(leaf, ())}
    n = len(items) or results.get("sample_len")
    further_scores = (
        {} if outcomes is None else {metric_name: ratio_score(outcomes, metric_name) for metric_name in beside or {}}
    )
    return Score(label, value, stderr, n, further_scores, direction_of(metric, directions), fraction), outcomes


def _aggregation(task: Task, metric: str) -> str:
    """Return the name of a metric's aggregation over items; lm-eval takes the mean where none is set."""
    function = task.aggregation().get(metric)
    if function is None:
        return "mean"
    return str(function.__name__) if function.__module__ == "lm_eval.api.metrics" else "of the task's own"


def _weighted_by_size(group: Group | None, metric: str) -> bool:
    """Return whether a group weights its tasks by their numbers of items, as lm-eval does unless its file says not."""
    configs = getattr(group, "aggregate_metric_list", None) or ()
    return all(config.weight_by_size for config in configs if config.metric == metric)


def _outcomes(keys: Mapping[str, str], samples: Samples, leaves: Iterable[str]) -> Outcomes | None:
    """Each metric's verdicts by item; None where one of them is not a number for every item."""
    tasks = {}
    for leaf in leaves:
        lines = samples.get(leaf, ())
        filters = {s.get("filter") for s in lines}
        first = next((s.get("filter") for s in lines), None)
        verdicts: dict[str, tuple[float, ...]] = {}
        items = [s for s in lines if s.get("filter") == first]
        for label, key in keys.items():
            metric, _, name = key.partition(",")
            chosen = name if name in filters else first
            values = [s.get(metric) for s in lines if s.get("filter") == chosen]
            if len(values) != len(items) or not all(isinstance(v, int | float) for v in values):
                return None
            verdicts[label] = tuple(float(v) for v in values if v is not None)
        tasks[leaf] = TaskOutcomes(tuple(s["doc_id"] for s in items), tuple(s["doc_hash"][:8] for s in items), verdicts)
    return Outcomes(tasks)


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean of `values`; None for fewer than two."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) * (len(values) - 1)))


def _ifeval(task: str, items: Sequence[JsonObject]) -> tuple[Score, Outcomes]:
    verdicts: dict[str, tuple[float, ...]] = {}
    for metric in IFEVAL:
        values = [s[metric] for s in items]
        verdicts[metric] = tuple(map(float, values)) if metric.startswith("prompt") else per_instruction(values)
    verdicts[INSTRUCTIONS] = tuple(float(len(s["inst_level_strict_acc"])) for s in items)
    task_outcomes = TaskOutcomes(tuple(s["doc_id"] for s in items), tuple(s["doc_hash"][:8] for s in items), verdicts)
    outcomes = Outcomes({task: task_outcomes})
    return ratio_score(outcomes, IFEVAL_MEAN, {m: ratio_score(outcomes, m) for m in IFEVAL}), outcomes


def ratio_score(outcomes: Outcomes, metric: str, beside: Mapping[str, Score] | None = None) -> Score:
    """The mean of the ratios that `metric` stands for; IFEval's is that of its four accuracies.

    That the published IFEval column is this mean is inferred from its values. The standard error linearises the
    ratios, with items as the independent units.
    """
    terms = outcomes.terms(metric)
    n = len(terms[0][0])
    deviations = [0.0] * n
    for numerators, denominators in terms:
        total = sum(denominators)
        ratio, size = sum(numerators) / total, total / n
        for i, (a, b) in enumerate(zip(numerators, denominators, strict=True)):
            deviations[i] += (a - ratio * b) / size / len(terms)
    stderr = standard_error(deviations)
    return Score(metric, outcomes.score(metric), None if stderr is None else 100 * stderr, n, dict(beside or {}))
