"""Statistics: hand-worked cases, independent implementations, coverage by enumeration and by simulation, seeds."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import optimize, stats

from eval.outcomes import Outcomes, TaskOutcomes
from eval.stats.resampling import bootstrap, percentiles, permutation, seed_of
from eval.stats.significance import holm, mcnemar, paired_interval, proportion_interval


def yes_no(values: list[int]) -> list[tuple[list[float], list[float]]]:
    return [([float(v) for v in values], [1.0] * len(values))]


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (0, 5, 2 / 32),
        (1, 5, 14 / 64),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
        (3, 3, 1.0),
        (10, 0, 2 / 1024),
    ],
)
def test_mcnemar_by_hand(only_a: int, only_b: int, p: float) -> None:
    """The doubled smaller tail of a fair coin, worked by hand; symmetric in the models."""
    assert mcnemar(only_a, only_b) == pytest.approx(p, rel=1e-12)
    assert mcnemar(only_b, only_a) == mcnemar(only_a, only_b)


def test_mcnemar_is_the_binomial_test() -> None:
    """It agrees with scipy's exact binomial test, for thousands of items too, and with exact fractions."""
    for only_a, only_b in [(3, 11), (40, 60), (200, 260), (700, 760), (5000, 5300), (0, 3000)]:
        expected = stats.binomtest(only_a, only_a + only_b, 0.5).pvalue
        assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9, abs=1e-300)
    exact = 2 * sum(Fraction(math.comb(1100, k), 2**1100) for k in range(500))
    assert mcnemar(499, 601) == pytest.approx(float(exact), rel=1e-12)


def test_mcnemar_keeps_its_level() -> None:
    """Under no difference the test rejects at 0.05 at most 5 times in 100, for each number of differing items."""
    for m in range(1, 60):
        rejected = sum(math.comb(m, k) for k in range(m + 1) if mcnemar(k, m - k) <= 0.05)
        assert rejected / 2**m <= 0.05


def likelihood_statistic(only_a: int, only_b: int, n: int, difference: float) -> float:
    """Tango's statistic with the restricted estimate found by a numerical search, independent of the closed form."""

    def negative(share: float) -> float:
        cells = ((only_a, share), (only_b, share + difference), (n - only_a - only_b, 1 - 2 * share - difference))
        return -sum(k * math.log(p) if p > 0 else (0.0 if k == 0 else -math.inf) for k, p in cells)

    low, high = max(0.0, -difference), (1 - difference) / 2
    share = optimize.minimize_scalar(negative, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (only_b - only_a - n * difference) / math.sqrt(n * (2 * share + difference * (1 - difference)))


@pytest.mark.parametrize(
    ("only_a", "only_b", "n"), [(2, 12, 50), (9, 4, 164), (30, 31, 500), (1, 0, 20), (120, 90, 1319)]
)
def test_paired_interval_inverts_the_score_test(only_a: int, only_b: int, n: int) -> None:
    """At both ends the score statistic, its nuisance found numerically, is the normal quantile; at 0, McNemar's."""
    low, high = paired_interval(only_a, only_b, n)
    assert likelihood_statistic(only_a, only_b, n, low) == pytest.approx(1.95996, abs=2e-4)
    assert likelihood_statistic(only_a, only_b, n, high) == pytest.approx(-1.95996, abs=2e-4)
    assert low < (only_b - only_a) / n < high
    at_zero = (only_b - only_a) / math.sqrt(only_a + only_b)
    assert likelihood_statistic(only_a, only_b, n, 0.0) == pytest.approx(at_zero, rel=1e-6)
    assert paired_interval(only_b, only_a, n) == pytest.approx((-high, -low), abs=1e-9)


def test_paired_interval_at_the_edges() -> None:
    """Without any differing item it still has width z^2 / (n + z^2) to both sides; all items one way end at 1."""
    z2 = 1.959964**2
    assert paired_interval(0, 0, 100) == pytest.approx((-z2 / (100 + z2), z2 / (100 + z2)), abs=1e-6)
    low, high = paired_interval(0, 10, 10)
    assert high == 1.0
    assert 0.4 < low < 1.0
    assert paired_interval(10, 0, 10) == pytest.approx((-1.0, -low))
    wide, narrow = paired_interval(5, 9, 164, 0.99), paired_interval(5, 9, 164)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize(("n", "p_a", "p_b"), [(40, 0.1, 0.1), (40, 0.05, 0.2), (80, 0.02, 0.05), (80, 0.15, 0.3)])
def test_paired_interval_covers(n: int, p_a: float, p_b: float) -> None:
    """Over all outcomes of a trinomial, weighted by their probability, it covers the true difference 93 to 98.5 %."""
    covered = 0.0
    for a in range(n + 1):
        for b in range(n + 1 - a):
            ways = math.lgamma(n + 1) - math.lgamma(a + 1) - math.lgamma(b + 1) - math.lgamma(n - a - b + 1)
            log = ways + a * math.log(p_a) + b * math.log(p_b) + (n - a - b) * math.log(1 - p_a - p_b)
            if log < -16:
                continue
            low, high = paired_interval(a, b, n)
            covered += math.exp(log) * (low <= p_b - p_a <= high)
    assert 0.93 < covered < 0.985


def test_wilson_interval() -> None:
    """It agrees with scipy's, and stays within 0 and 1."""
    for right, n in [(0, 20), (20, 20), (7, 164), (250, 500)]:
        expected = stats.binomtest(right, n).proportion_ci(method="wilson")
        assert proportion_interval(right, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_holm_by_hand() -> None:
    """Six p-values: times 6, 5, 4, ... from the smallest up, never falling, at most 1, in the order given."""
    given = [0.04, 0.001, 0.5, 0.01, 0.02, 0.9]
    # sorted: 0.001 x 6, 0.01 x 5, 0.02 x 4 = 0.08, 0.04 x 3 = 0.12, 0.5 x 2 = 1, 0.9 x 1 -> 1
    assert holm(given) == pytest.approx([0.12, 0.006, 1.0, 0.05, 0.08, 1.0])
    # 0.03 x 2 = 0.06 rises above 0.05 x 1, which may not fall below it
    assert holm([0.05, 0.03]) == pytest.approx([0.06, 0.06])
    assert holm([]) == []
    assert holm([0.2]) == [0.2]


def test_holm_keeps_the_family_wise_level() -> None:
    """Six tests of equal models, three of them copies: some false call in at most about 5 of 100 studies."""
    generator = np.random.default_rng(3)
    false_calls, studies = 0, 2000
    for _ in range(studies):
        shared = int(generator.binomial(60, 0.5))
        ones = [shared, shared, shared, *map(int, generator.binomial(60, 0.5, size=3))]
        false_calls += min(holm([mcnemar(k, 60 - k) for k in ones])) < 0.05
    assert false_calls / studies < 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)


def correlated(generator: np.random.Generator, n: int, gain: float) -> tuple[list[int], list[int]]:
    """Verdicts of two models that agree on most items; B's accuracy is higher by `gain`."""
    difficulty = generator.random(n)
    noise = generator.random((2, n)) < 0.15
    a = np.where(noise[0], generator.random(n) < 0.5, difficulty < 0.4)
    b = np.where(noise[1], generator.random(n) < 0.5, difficulty < 0.4 + gain / 0.85)
    return a.astype(int).tolist(), b.astype(int).tolist()


def test_bootstrap_interval_covers() -> None:
    """Over 300 simulated evaluations of 164 items, the paired interval holds the true difference in 91 to 98 %."""
    generator = np.random.default_rng(11)
    covered = 0
    for study in range(300):
        a, b = correlated(generator, 164, 0.06)
        scores = bootstrap([yes_no(a), yes_no(b)], 800, [study])
        low, high = percentiles(scores[:, 1] - scores[:, 0])
        covered += low <= 6.0 <= high
    assert 0.91 < covered / 300 < 0.98


def test_pairing_narrows_the_interval() -> None:
    """Resampling the same items for both models gives a narrower interval than resampling each one's own."""
    a, b = correlated(np.random.default_rng(5), 500, 0.0)
    together = bootstrap([yes_no(a), yes_no(b)], 4000, [1])
    apart = [bootstrap([yes_no(values)], 4000, [seed])[:, 0] for seed, values in ((1, a), (2, b))]
    paired = np.subtract(*percentiles(together[:, 1] - together[:, 0])[::-1])
    assert paired < 0.75 * np.subtract(*percentiles(apart[1] - apart[0])[::-1])


def test_bootstrap_is_that_of_items() -> None:
    """Counting patterns is drawing items: mean and standard deviation agree with drawing indices one by one."""
    generator = np.random.default_rng(2)
    sizes = generator.integers(1, 4, 120).astype(float)
    right = generator.binomial(sizes.astype(int), 0.6).astype(float)
    strict = (right == sizes).astype(float)
    terms = [(strict.tolist(), [1.0] * 120), (right.tolist(), sizes.tolist())]
    quick = bootstrap([terms], 20000, [7])[:, 0]
    rows = generator.integers(0, 120, (20000, 120))
    plain = 50 * (strict[rows].mean(1) + right[rows].sum(1) / sizes[rows].sum(1))
    assert quick.mean() == pytest.approx(plain.mean(), abs=0.1)
    assert quick.std() == pytest.approx(plain.std(), rel=0.03)


def test_bootstrap_repeats_by_seed() -> None:
    """The same seed gives the same draws; a benchmark's seed depends on its name, and on nothing else."""
    terms = [yes_no([1, 0, 1, 1, 0]), yes_no([0, 0, 1, 1, 1])]
    assert np.array_equal(bootstrap(terms, 50, seed_of(1, "MBPP")), bootstrap(terms, 50, seed_of(1, "MBPP")))
    assert not np.array_equal(bootstrap(terms, 50, seed_of(1, "MBPP")), bootstrap(terms, 50, seed_of(2, "MBPP")))
    assert seed_of(1, "MBPP") != seed_of(1, "MMLU")


def test_many_items_are_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of a block bounds memory, and changes how many draws are made at a time, not how many."""
    generator = np.random.default_rng(0)
    terms = [[(generator.random(300).tolist(), [1.0] * 300)] for _ in range(2)]
    whole = bootstrap(terms, 400, [1])
    monkeypatch.setattr("eval.stats.resampling.CELLS", 3000)
    parts = bootstrap(terms, 400, [1])
    assert parts.shape == whole.shape == (400, 2)
    assert np.array_equal(parts, whole)
    assert permutation(*terms, 101, [1]) <= 1.0


def test_permutation_is_mcnemars_test_for_yes_and_no() -> None:
    """For right and wrong answers its p-value estimates the exact one: 30 items with, 90 without a difference."""
    a = [1] * 9 + [0] * 21 + [1] * 90
    b = [0] * 9 + [1] * 21 + [1] * 90
    p = permutation(yes_no(a), yes_no(b), 40000, [3])
    assert p == pytest.approx(mcnemar(9, 21), abs=4 * math.sqrt(mcnemar(9, 21) / 40000))
    assert permutation(yes_no(a), yes_no(a), 99, [3]) == 1.0


def test_permutation_of_graded_items_is_exact() -> None:
    """For four items of a ratio it estimates the share of all 16 exchanges that are at least as extreme."""
    a, b = [(2.0, 0.0, 1.0, 1.0)], [(3.0, 2.0, 1.0, 2.0)]
    sizes = (3.0, 2.0, 2.0, 2.0)
    found = []
    for swaps in itertools.product((0, 1), repeat=4):
        new_a, new_b = (
            [(x, y)[s] for x, y, s in zip(one, two, swaps, strict=True)] for one, two in ((a[0], b[0]), (b[0], a[0]))
        )
        found.append(abs(sum(new_b) - sum(new_a)) / sum(sizes))
    expected = sum(value >= found[0] - 1e-12 for value in found) / 16
    p = permutation([(a[0], sizes)], [(b[0], sizes)], 20000, [1])
    assert p == pytest.approx(expected, abs=0.02)


def test_permutation_keeps_its_level() -> None:
    """Between equal models with graded answers it rejects at 0.05 in about 5 of 100 studies."""
    generator = np.random.default_rng(8)
    rejected = 0
    for study in range(400):
        skill = generator.random(60)
        a, b = (generator.binomial(4, skill) / 4 for _ in range(2))
        rejected += permutation([(a.tolist(), [1.0] * 60)], [(b.tolist(), [1.0] * 60)], 199, [study]) <= 0.05
    assert rejected / 400 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_outcomes_of_results_are_the_terms() -> None:
    """The score of a results file is that of its terms without resampling, IFEval's mean of four included."""
    task = TaskOutcomes(
        (0, 1, 2),
        ("a", "b", "c"),
        {
            "prompt_level_strict_acc": (1.0, 0.0, 0.0),
            "prompt_level_loose_acc": (1.0, 1.0, 0.0),
            "inst_level_strict_acc": (2.0, 0.0, 1.0),
            "inst_level_loose_acc": (2.0, 1.0, 1.0),
            "instructions": (2.0, 1.0, 3.0),
        },
    )
    terms = Outcomes({"ifeval": task}).terms("mean of 4 accuracies")
    assert 25 * sum(sum(n) / sum(d) for n, d in terms) == pytest.approx(25 * (1 / 3 + 2 / 3 + 3 / 6 + 4 / 6))
    assert bootstrap([terms], 3, [0]).shape == (3, 1)
