"""HV gain: the published numbers, the definition's numbers, and the laws of an exclusive hypervolume."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from common.errors import UsageError
from eval.stats.hypervolume import hv_gain, population_of, read_rule

ROOT = Path(__file__).resolve().parents[3]
PAPER = json.loads((ROOT / "configs" / "paper_results.json").read_text(encoding="utf-8"))
NAMES = PAPER["names"]
SCORES = {row["model"]: list(row["scores"].values()) for row in PAPER["rows"]}
MODEL = {label: model for model, label in NAMES.items()}
MERGED = [row for row in PAPER["rows"] if row["method"]]
SETS = {
    "CI": "Code-Instruction_Tuned",
    "CM": "Code-Math",
    "IM": "Math-Instruction_Tuned",
    "CIM": "Code-Math-Instruction_Tuned",
}
DEFINITION = {  # gains (without AIM, with AIM) over the models merged, computed apart from this code
    "DARETaskArithmetic": {
        "CI": (0.2151, 0.2379),
        "CM": (0.2310, 0.2272),
        "IM": (0.1510, 0.2195),
        "CIM": (0.1604, 0.2255),
    },
    "DARETies": {"CI": (0.2453, 0.2554), "CM": (0.2292, 0.2384), "IM": (0.1676, 0.2302), "CIM": (0.1717, 0.2426)},
    "TaskArithmetic": {"CI": (0.2373, 0.2315), "CM": (0.2423, 0.2359), "IM": (0.1452, 0.2028), "CIM": (0.1641, 0.2166)},
    "Ties": {"CI": (0.0000, 0.0000), "CM": (0.2029, 0.2304), "IM": (0.2222, 0.2351), "CIM": (0.1096, 0.1143)},
    "WIDEN": {"CI": (0.2153, 0.2029), "CM": (0.2417, 0.2388), "IM": (0.2892, 0.2990), "CIM": (0.2879, 0.3014)},
}


def gain_of(row: dict[str, Any], rule: str) -> float:
    labels = population_of(rule, "", "", [NAMES[model] for model in row["models"]])
    assert labels is not None
    return hv_gain(SCORES[row["model"]], [SCORES[MODEL[label]] for label in labels])


def published(row: dict[str, Any]) -> tuple[str, str | None]:
    value, _, change = row["printed"]["HV Gain"].partition(" ")
    return value.strip("*"), change.strip("()") or None


@pytest.mark.parametrize("row", MERGED, ids=lambda row: row["model"].split("/")[1])
def test_published_value(row: dict[str, Any]) -> None:
    """Over the paper's populations each of the 40 gains prints as published."""
    assert f"{gain_of(row, 'paper'):.2f}" == published(row)[0]


def test_published_percentages() -> None:
    """The 20 published percentages follow from the unrounded gains, the +inf included."""
    plain = {row["model"]: row for row in MERGED if row["omega"] is None}
    seen = 0
    for row in MERGED:
        if row["omega"] is None:
            assert published(row)[1] is None
            continue
        before, after = gain_of(plain[row["model"].removesuffix("___AIM")], "paper"), gain_of(row, "paper")
        change = "+inf%" if before == 0.0 < after else f"{100 * (after / before - 1):+.2f}%"
        assert change == published(row)[1], row["model"]
        seen += 1
    assert seen == 20


@pytest.mark.parametrize("method", DEFINITION)
@pytest.mark.parametrize("models", SETS)
def test_definition_values(method: str, models: str) -> None:
    """Over the models merged the gains are the definition's, to 4 decimals."""
    rows = {row["model"]: row for row in MERGED}
    name = f"ahn1376/{method}___{SETS[models]}"
    found = gain_of(rows[name], "merged"), gain_of(rows[f"{name}___AIM"], "merged")
    assert found == pytest.approx(DEFINITION[method][models], abs=5.001e-5)


def exact_volume(points: Sequence[Sequence[Fraction]]) -> Fraction:
    """Hypervolume from the origin by slicing along the last objective, in exact arithmetic."""
    if not points:
        return Fraction(0)
    if len(points[0]) == 1:
        return max(point[0] for point in points)
    levels = sorted({point[-1] for point in points} | {Fraction(0)})
    slabs = (
        (high - low) * exact_volume([point[:-1] for point in points if point[-1] >= high])
        for low, high in itertools.pairwise(levels)
    )
    return sum(slabs, Fraction(0))


@pytest.mark.parametrize("d", [1, 2, 3, 4, 6])
def test_exact_parity(d: int) -> None:
    """The gain is the d-th root of HV(P + x) - HV(P), computed here by exact rational slicing."""
    rng = random.Random(d)
    for _ in range(25):
        points = [[rng.randint(1, 999) for _ in range(d)] for _ in range(rng.randint(1, 5))]
        exact = [[Fraction(v, 1000) for v in point] for point in points]
        expected = exact_volume(exact) - exact_volume(exact[1:])
        x, *population = [[v / 10 for v in point] for point in points]
        volume = hv_gain(x, population, root=1)
        assert volume == pytest.approx(float(expected), rel=1e-9, abs=1e-15)
        assert (volume == 0.0) == (expected == 0)
        assert hv_gain(x, population) == pytest.approx(float(expected) ** (1 / d), rel=1e-9)


def test_reference_moves_the_corner() -> None:
    """Volumes are measured from the reference: moving it to r is subtracting r from every fraction."""
    shifted = hv_gain([40.0, 60.0], [[50.0, 30.0]])
    assert hv_gain([50.0, 70.0], [[60.0, 40.0]], reference=0.1) == pytest.approx(shifted, rel=1e-12)


def test_exact_zero() -> None:
    """A point that a member equals or beats everywhere gains exactly 0; a hair better somewhere gains more than 0."""
    x = [16.46, 23.6, 52.7, 2.7, 5.4, 24.48]
    better = [17.07, 31.6, 52.91, 6.0, 24.1, 26.25]
    assert hv_gain(x, [better]) == 0.0
    assert hv_gain(x, [x]) == 0.0
    assert hv_gain(x, [[0.0] * 5 + [99.0], better, x]) == 0.0
    assert 0.0 < hv_gain([*x[:2], 52.92, *x[3:]], [better]) < 0.1


def test_zero_score_gains_nothing() -> None:
    """A score of 0 in one benchmark spans no volume, so the gain is 0."""
    assert hv_gain([0.0, 90.0], [[10.0, 10.0]]) == 0.0
    assert hv_gain([0.0, 90.0], []) == 0.0


def test_empty_population_is_geometric_mean() -> None:
    """With nothing to compare with, the gain is the geometric mean of the scores."""
    assert hv_gain([20.0, 40.0, 80.0], []) == pytest.approx(0.4, rel=1e-12)


def test_one_benchmark() -> None:
    """With one objective the gain is the difference to the best member."""
    assert hv_gain([70.0], [[50.0], [20.0]]) == pytest.approx(0.2, rel=1e-12)


@pytest.mark.parametrize("row", MERGED[::7], ids=lambda row: row["model"].split("/")[1])
def test_invariances(row: dict[str, Any]) -> None:
    """Order of objectives and members, dominated and repeated members change nothing; scaling scales the gain."""
    x, p = SCORES[row["model"]], [SCORES[model] for model in row["models"]]
    gain = hv_gain(x, p)
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 4, 1, 5, 3]):
        assert hv_gain([x[i] for i in order], [[q[i] for i in order] for q in p]) == pytest.approx(gain, rel=1e-9)
    assert hv_gain(x, p[::-1]) == pytest.approx(gain, rel=1e-9)
    dominated = [0.9 * score for score in p[0]]
    assert hv_gain(x, [*p, dominated, p[0]]) == pytest.approx(gain, rel=1e-9)
    assert hv_gain(x, p, scale=0.005) == pytest.approx(gain / 2, rel=1e-9)
    assert hv_gain([0.5 * s for s in x], [[0.5 * s for s in q] for q in p]) == pytest.approx(gain / 2, rel=1e-9)


def test_base_never_matters_in_the_paper() -> None:
    """The code model beats the base everywhere, so the base beside it in a population changes no gain."""
    for row in MERGED:
        p = [SCORES[model] for model in (*row["models"], MODEL["Code"])]
        with_base = hv_gain(SCORES[row["model"]], [*p, SCORES[MODEL["Base"]]])
        assert with_base == pytest.approx(hv_gain(SCORES[row["model"]], p), rel=1e-9)


@pytest.mark.parametrize(
    ("x", "population"),
    [([1.0, 2.0], [[1.0]]), ([], []), ([float("nan"), 1.0], []), ([1.0], [[float("inf")]])],
)
def test_bad_points(x: list[float], population: list[list[float]]) -> None:
    """Points of unlike length, without objectives, or with scores that are no finite number are refused."""
    with pytest.raises(ValueError, match="scores"):
        hv_gain(x, population)


def test_population_rules() -> None:
    """merged is the row's own models, paper the published map, a file what it says by checkpoint or by row label."""
    assert population_of("merged", "A + B", "ab", ["A", "B"]) == ("A", "B")
    assert population_of("merged", "x", "x", []) is None
    assert population_of("paper", "", "", ["Instruction Tuned", "Code"]) == ("Code", "Math")
    with pytest.raises(UsageError, match="--population paper"):
        population_of("paper", "A + B", "ab", ["A", "B"])
    rule: dict[str, list[str]] = {"A + B": ["A"], "ab_2": []}
    assert population_of(rule, "A + B", "ab", ["A", "B"]) == ("A",)
    assert population_of(rule, "A + B", "ab_2", ["A", "B"]) == ()
    assert population_of(rule, "A + C", "ac", ["A", "C"]) is None


def test_read_rule(tmp_path: Path) -> None:
    """A population file is YAML or JSON of row label -> list of labels; anything else is a usage error."""
    file = tmp_path / "p.json"
    for text in ('{"A + B": ["A", "C"]}', "A + B: [A, C]\n"):
        file.write_text(text)
        assert read_rule(str(file)) == {"A + B": ["A", "C"]}
    for text in ("[1, 2]", "A: B", "A: [1]", "a: [", ""):
        file.write_text(text)
        with pytest.raises(UsageError, match=r"p\.json"):
            read_rule(str(file))
    with pytest.raises(UsageError, match="Did you mean 'paper'"):
        read_rule("papers")
