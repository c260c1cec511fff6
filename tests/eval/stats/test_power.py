"""Minimum detectable differences: hand-worked values, the power that tests really have, samples too small for any."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from eval.outcomes import Outcomes, TaskOutcomes
from eval.report.report import make_report
from eval.results.rows import assemble
from eval.stats.comparison import compare, differences
from eval.stats.gains import HV, Measure
from eval.stats.power import detectable_difference, detectable_share
from eval.stats.significance import mcnemar
from tests.helpers.made_results import family, made


def silent(sentence: str) -> None:
    """Hear no remarks."""


def test_by_hand() -> None:
    """At 400 items with 80 discordant ones the difference solves Connor's equation; by hand about 6.5 points."""
    d = detectable_share(40, 40, 400, 0.05)
    assert d is not None
    s, n = 0.2, 400
    right = 1 + 1.959964 * math.sqrt(n * s) + 0.841621 * math.sqrt(n * (s - d * d))
    assert n * d == pytest.approx(right, abs=1e-3)
    assert d == pytest.approx(0.0645, abs=0.001)
    assert detectable_difference(2.0, 0.05) == pytest.approx(2.0 * 2.801585, abs=1e-4)


@pytest.mark.parametrize(("n", "discordant"), [(60, 20), (164, 27), (400, 89), (1319, 200)])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 6])
def test_power_of_the_exact_test(n: int, discordant: int, alpha: float) -> None:
    """Simulated, McNemar's exact test finds a difference of that size with 80 % power (72 to 90 %)."""
    d = detectable_share(discordant // 2, discordant - discordant // 2, n, alpha)
    assert d is not None
    share = max(discordant / n, d)
    rng = np.random.default_rng(n)
    draws = rng.multinomial(n, [(share + d) / 2, (share - d) / 2, 1 - share], size=3000)
    power = np.mean([mcnemar(int(b), int(a)) < alpha for a, b, _ in draws])
    assert 0.72 <= power <= 0.90


def test_too_few_items_show_nothing() -> None:
    """With fewer items than the exact test needs no difference is detectable; equal answers are no proof of power."""
    assert detectable_share(0, 0, 5, 0.05) is None
    assert detectable_share(0, 1, 1, 0.05) is None
    least = detectable_share(0, 0, 100, 0.05)
    assert least is not None
    assert least >= 6 / 100
    assert 2 / 2**6 < 0.05 < 2 / 2**5
    assert detectable_difference(0.0, 0.05) is None


def test_more_items_show_smaller_differences() -> None:
    """The detectable difference falls with the items, and rises with the corrections and with disagreement."""
    values = [detectable_share(n // 10, n // 10, n, 0.05) or 1.0 for n in (50, 200, 1000, 5000)]
    assert values == sorted(values, reverse=True)
    assert (detectable_share(20, 20, 400, 0.01) or 0) > (detectable_share(20, 20, 400, 0.05) or 1)
    assert (detectable_share(60, 60, 400, 0.05) or 0) > (detectable_share(20, 20, 400, 0.05) or 1)


@pytest.mark.parametrize("items", [0, 1, 3])
def test_few_items(items: int) -> None:
    """No item in common is no comparison, one or three items are one without a finding, and nothing fails."""
    results = []
    for name, verdict in (("ties", 0.0), ("ties_aim", 1.0)):
        result = made(name)
        task = TaskOutcomes(tuple(range(items)), tuple("d" for _ in range(items)), {"acc": (verdict,) * items})
        outcomes = {"GSM8K": Outcomes({"gsm8k_paper": task})}
        results.append(replace(result, outcomes=outcomes, scores={"GSM8K": result.scores["GSM8K"]}))
    found = differences(*results)
    assert len(found) == min(items, 1)
    assert not any(d.is_significant or d.detectable for d in found)
    assert all(d.interval[0] <= 0 <= d.interval[1] for d in found)


def test_few_items_have_no_bootstrap() -> None:
    """With fewer than ten items neither IFEval nor HV gain nor the mean is called different, however clear-cut."""
    results = []
    for result in family():
        outcomes = {}
        for column, whole in result.outcomes.items():
            wins = result.model.endswith("aim")
            tasks = {}
            for name, o in whole.tasks.items():
                verdicts = {m: (v[:2] if m == "instructions" else (float(wins),) * 2) for m, v in o.verdicts.items()}
                tasks[name] = TaskOutcomes(o.items[:2], o.docs[:2], verdicts)
            outcomes[column] = Outcomes(tasks)
        results.append(replace(result, outcomes=outcomes))
    report = make_report(assemble(results, {}, silent), Measure(), silent)
    assert not report.uncertainty.significant
    assert not any(column == HV for _, column in (*report.uncertainty.intervals, *report.uncertainty.changes))
    found = compare(results[3], results[4])
    assert found.mean is None
    (ifeval,) = (d for d in found.differences if d.column == "IFEval")
    assert ifeval.interval == (-100.0, 100.0)
    assert ifeval.detectable is None
