"""Comparison of two models item by item, with significance tests. Imports numpy only where it compares."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from common.errors import BadInputError, UsageError
from eval.outcomes import Outcomes, TaskOutcomes
from eval.results.conditions import (
    BY_BENCHMARK,
    OF_MODEL,
    VERSIONS,
    column_differences,
    listed,
    prompt_hash,
)
from eval.results.result import COLUMNS, EvalResult
from eval.stats.power import detectable_difference, detectable_share
from eval.stats.resampling import LEAST_ITEMS, Terms, bootstrap, percentiles, permutation, seed_of
from eval.stats.significance import LEVEL, Interval, holm, mcnemar, paired_interval

DRAWS = 10_000
MCNEMAR, PERMUTATION, BOOTSTRAP = "McNemar, exact", "permutation", "paired bootstrap"
WIDEST: Interval = (-100.0, 100.0)
"""Interval of a difference that too few items say nothing about."""


@dataclass(frozen=True)
class Difference:
    """One benchmark: scores of A and B on the `n` items that both answered, in percent, and B - A in points.

    `interval` is at 95 %; `simultaneous` widens it (Bonferroni) so that all benchmarks' hold at once. `only_a` and
    `only_b` count the items that one model alone has right, where answers are right or wrong. `p` is before,
    `corrected` after Holm's correction for the number of benchmarks. `detectable` is the smallest difference, in
    points, that the corrected test finds with 80 % power; None where these items cannot show any. `higher_is_better`
    is that of the metric.
    """

    column: str
    metric: str
    n: int
    a: float
    b: float
    interval: Interval
    simultaneous: Interval
    test: str
    p: float
    corrected: float
    only_a: int | None = None
    only_b: int | None = None
    detectable: float | None = None
    higher_is_better: bool | None = True

    @property
    def value(self) -> float:
        """Difference b - a."""
        return self.b - self.a

    @property
    def is_significant(self) -> bool:
        """True where the difference is statistically significant."""
        return self.corrected < 1 - LEVEL


@dataclass(frozen=True)
class Comparison:
    """A and B by benchmark; `mean` over the benchmarks where there are several; `remarks` say what limits it."""

    a: str
    b: str
    differences: tuple[Difference, ...]
    mean: Difference | None
    remarks: tuple[str, ...]


def compare(a: EvalResult, b: EvalResult, draws: int = DRAWS, seed: int = 0) -> Comparison:
    """Compare two results on the items that both have, as `differences` does.

    Raises UsageError where they share no benchmark with outcomes per item.
    """
    by_column = differences(a, b, draws, seed)
    if not by_column:
        raise UsageError(
            f"{a.model} and {b.model} have no benchmark in common with outcomes per item; evaluate both with this "
            "version of evaluate_model.py (results of older versions and published tables have scores alone)."
        )
    averaged = [d for d in by_column if d.higher_is_better is True and d.n >= LEAST_ITEMS]
    mean = _mean(a, b, averaged, draws, seed) if len(averaged) > 1 else None
    return Comparison(a.model, b.model, tuple(by_column), mean, tuple(_remarks(a, b, by_column)))


def differences(
    a: EvalResult, b: EvalResult, draws: int = DRAWS, seed: int = 0, columns: Sequence[str] | None = None
) -> list[Difference]:
    """The differences by benchmark, corrected for their number; none where no benchmark has outcomes of both.

    `columns` are those to compare (None: all).

    Right-or-wrong answers: McNemar's exact test, Tango's interval. Others (IFEval, several samples): the permutation
    test, the percentile interval of a paired bootstrap. Raises BadInputError where the two were asked different
    versions of a benchmark, UsageError where they were scored by different metrics.
    """
    terms: dict[str, tuple[Terms, Terms]] = {}
    for column in in_order(a.outcomes):
        is_requested = columns is None or column in columns
        if is_requested and column in b.outcomes and column in a.scores and column in b.scores:
            pair = paired(a, b, column)
            if pair is not None:
                metric = a.scores[column].metric
                terms[column] = pair[0].terms(metric), pair[1].terms(metric)
    by_column = [_difference(c, a.scores[c].metric, x, y, len(terms), draws, seed) for c, (x, y) in terms.items()]
    corrected = holm([difference.p for difference in by_column])
    return [
        replace(d, corrected=p, higher_is_better=a.scores[d.column].higher_is_better)
        for d, p in zip(by_column, corrected, strict=True)
    ]


def in_order(columns: Collection[str]) -> list[str]:
    """The paper's columns in its order, then the others as they come."""
    return [c for c in COLUMNS if c in columns] + [c for c in columns if c not in COLUMNS]


def paired(a: EvalResult, b: EvalResult, column: str) -> tuple[Outcomes, Outcomes] | None:
    """The outcomes of two models on the items of a column that both answered, in one order; None where there are none.

    Raises BadInputError where an item of one number is another question, UsageError where the metrics differ.
    """
    metrics = a.scores[column].metric, b.scores[column].metric
    if metrics[0] != metrics[1]:
        raise UsageError(
            f"{column} is {metrics[0]} of {a.model} and {metrics[1]} of {b.model}: other presets or versions; evaluate "
            "both alike."
        )
    item_keys = [r.outcomes[column].keys() for r in (a, b)]
    keys = [{(task, item): doc for task, item, doc in items} for items in item_keys]
    both = [key for key in keys[0] if key in keys[1]]
    other = next((key for key in both if keys[0][key] != keys[1][key]), None)
    if other:
        raise BadInputError(
            f"Item {other[1]} of {other[0]} is another question in {b.model}'s results than in {a.model}'s: the "
            "benchmark's data differ, and scores on them do not compare."
        )
    return (restricted(a.outcomes[column], both), restricted(b.outcomes[column], both)) if both else None


def restricted(outcomes: Outcomes, keys: Sequence[tuple[str, int]]) -> Outcomes:
    """The outcomes of some (task, item), in the order given within each task."""
    tasks: dict[str, TaskOutcomes] = {}
    for task in dict.fromkeys(task for task, _ in keys):
        whole = outcomes.tasks[task]
        at = {item: place for place, item in enumerate(whole.items)}
        places = [at[item] for t, item in keys if t == task]
        verdicts = {name: tuple(values[i] for i in places) for name, values in whole.verdicts.items()}
        tasks[task] = TaskOutcomes(
            tuple(whole.items[i] for i in places), tuple(whole.docs[i] for i in places), verdicts
        )
    return replace(outcomes, tasks=tasks)


def right_or_wrong(terms: Terms) -> bool:
    """Return whether a score is the share of correct items."""
    return len(terms) == 1 and set(terms[0][0]) <= {0.0, 1.0} and set(terms[0][1]) <= {1.0}


def score(terms: Terms) -> float:
    """The score in percent, without resampling."""
    return 100 * sum(sum(n) / sum(d) for n, d in terms) / len(terms)


def _difference(column: str, metric: str, a: Terms, b: Terms, family: int, draws: int, seed: int) -> Difference:
    n = len(a[0][0])
    wider = 1 - (1 - LEVEL) / family
    if right_or_wrong(a) and right_or_wrong(b):
        only_a = sum(x > y for x, y in zip(a[0][0], b[0][0], strict=True))
        only_b = sum(x < y for x, y in zip(a[0][0], b[0][0], strict=True))
        intervals = [paired_interval(only_a, only_b, n, level) for level in (LEVEL, wider)]
        first, second = ((100 * low, 100 * high) for low, high in intervals)
        p = mcnemar(only_a, only_b)
        least = detectable_share(only_a, only_b, n, (1 - LEVEL) / family)
        least = None if least is None else 100 * least
        return Difference(column, metric, n, score(a), score(b), first, second, MCNEMAR, p, p, only_a, only_b, least)
    scores = bootstrap([a, b], draws, seed_of(seed, column))
    changes = scores[:, 1] - scores[:, 0]
    p = permutation(a, b, draws, seed_of(seed, column))
    first, second = percentiles(changes), percentiles(changes, wider)
    if n < LEAST_ITEMS:
        first = second = WIDEST
    least = detectable_difference(float(changes.std()), (1 - LEVEL) / family) if n >= LEAST_ITEMS else None
    difference = Difference(column, metric, n, score(a), score(b), first, second, PERMUTATION, p, p)
    return replace(difference, detectable=least)


def _mean(a: EvalResult, b: EvalResult, by_column: Sequence[Difference], draws: int, seed: int) -> Difference:
    """The mean over benchmarks, each with the same weight; not one of the family that is corrected for."""
    import numpy as np

    changes = np.zeros(draws)
    for d in by_column:
        pair = paired(a, b, d.column)
        assert pair is not None
        scores = bootstrap([outcomes.terms(d.metric) for outcomes in pair], draws, seed_of(seed, d.column))
        changes += (scores[:, 1] - scores[:, 0]) / len(by_column)
    first, second = (sum(getattr(d, name) for d in by_column) / len(by_column) for name in "ab")
    below, above = float((changes <= 0).mean()), float((changes >= 0).mean())
    p = min(1.0, 2 * max(min(below, above), 1 / (draws + 1)))
    n, interval = sum(d.n for d in by_column), percentiles(changes)
    return Difference("mean", "", n, first, second, interval, interval, BOOTSTRAP, p, p)


def _remarks(a: EvalResult, b: EvalResult, by_column: Sequence[Difference]) -> list[str]:
    """Sentences on what A and B do not share: conditions, prompts, items, versions, machines, benchmarks."""
    remarks = []
    settings: dict[str, tuple[object, object]] = {}
    for d in by_column:
        unlike = column_differences(a, b, d.column)
        unlike.pop("items", None)  # compared on shared items, and listed below
        settings |= {f"{k} of {d.column}" if k in BY_BENCHMARK.values() else k: v for k, v in unlike.items()}
    settings |= {n: (a.settings.get(n), b.settings.get(n)) for n in OF_MODEL if a.settings.get(n) != b.settings.get(n)}
    settings.pop("lm_eval", None)
    for name, (one, other) in settings.items():
        remarks.append(f"{name} is {one} for A and {other} for B: part of a difference may be that.")
    remarks += _prompt_remarks(a, b, by_column)
    for d in by_column:
        sizes = [len(r.outcomes[d.column].keys()) for r in (a, b)]
        if sizes != [d.n, d.n]:
            remarks.append(f"{d.column}: compared on the {d.n} items that both answered (A {sizes[0]}, B {sizes[1]}).")
    packages = [n for n in VERSIONS if a.versions.get(n) != b.versions.get(n)]
    if packages:
        pairs = listed({n: (a.versions.get(n), b.versions.get(n)) for n in packages})
        remarks.append(f"Versions differ (A and B): {pairs}; part of a difference may be that.")
    tasks = [r.harness.get("versions") or {} for r in (a, b)]
    unlike = {t: (tasks[0][t], tasks[1][t]) for t in tasks[0] if t in tasks[1] and tasks[0][t] != tasks[1][t]}
    if unlike:
        remarks.append(f"Versions of tasks differ (A and B): {listed(unlike)}; evaluate both with one version.")
    machines = [(r.hardware.get("cpu"), tuple(r.hardware.get("gpus") or ())) for r in (a, b)]
    if machines[0] != machines[1] and all(r.hardware for r in (a, b)):
        names = [", ".join(map(str, gpus)) or str(cpu) for cpu, gpus in machines]
        remarks.append(f"A was measured on {names[0]}, B on {names[1]}.")
    return remarks + _benchmark_remarks(a, b, by_column)


def _prompt_remarks(a: EvalResult, b: EvalResult, by_column: Sequence[Difference]) -> list[str]:
    """Sentences on benchmarks whose prompts differ, by hash, or cannot be compared."""
    differ, unknown = [], []
    for d in by_column:
        hashes = [prompt_hash(r, d.column) for r in (a, b)]
        if None in hashes or any(len(r.outcomes[d.column].keys()) != d.n for r in (a, b)):
            unknown.append(d.column)
        elif hashes[0] != hashes[1]:
            differ.append(d.column)
    remarks = []
    if differ:
        remarks.append(
            f"{', '.join(differ)}: the prompts of A and B differ (by hash), although the items are the same; part of a "
            "difference may be that."
        )
    if unknown:
        remarks.append(
            f"{', '.join(unknown)}: the prompts of A and B could not be compared (no hash over the same items is "
            "recorded)."
        )
    return remarks


def _benchmark_remarks(a: EvalResult, b: EvalResult, by_column: Sequence[Difference]) -> list[str]:
    """Sentences on benchmarks that only one result has, or that have no outcomes per item."""
    remarks = []
    compared = {d.column for d in by_column}
    for name, one, other in (("A", a, b), ("B", b, a)):
        alone = [c for c in in_order(one.scores) if c in other.scores and c not in compared and c not in one.outcomes]
        if alone:
            remarks.append(f"{', '.join(alone)}: {name} has no outcomes per item there, so that nothing is compared.")
        missing = [c for c in in_order(one.scores) if c not in other.scores]
        if missing:
            remarks.append(f"{', '.join(missing)}: only {name} was evaluated on it.")
    return remarks
