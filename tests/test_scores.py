"""Scores and outcomes of tasks and groups: direction, scale, micro and macro averages."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from eval.harness.evaluation import evaluate_with_samples
from eval.harness.settings import Settings
from eval.metrics import direction_of, is_fraction
from eval.outcomes import Outcomes, TaskOutcomes
from eval.results.result import EvalResult, Score
from eval.stats.resampling import bootstrap
from tests.evaluation import make_checkpoint, write_jsonl


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("scores") / "model")


def write_tasks(folder: Path, weight_by_size: bool) -> None:
    """Write a group of two multiple-choice tasks of 6 and 2 items, and a task of perplexity."""
    for name, size in (("colors", 6), ("shapes", 2)):
        rows = [{"question": f"{name} {i}?", "choices": ["red", "a square"], "answer": i % 2} for i in range(size)]
        write_jsonl(folder / f"{name}.jsonl", rows)
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/{name}.jsonl\n"
            "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{question}}'\n"
            "doc_to_choice: choices\ndoc_to_target: answer\nmetric_list:\n  - metric: acc\n"
        )
    (folder / "group.yaml").write_text(
        "group: looks\ntask: [colors, shapes]\naggregate_metric_list:\n"
        f"  - metric: acc\n    weight_by_size: {str(weight_by_size).lower()}\n"
    )
    (folder / "prose.yaml").write_text(
        f"task: prose\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/colors.jsonl\n"
        "output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\ndoc_to_target: '{{question}}'\n"
        "metric_list:\n  - metric: word_perplexity\n"
    )


@pytest.mark.parametrize("weight_by_size", [True, False])
def test_groups_print_and_bootstrap_the_same_aggregate(checkpoint: Path, tmp_path: Path, weight_by_size: bool) -> None:
    """A group's score is the mean over items or over tasks, as its file says, in the table and in each draw."""
    write_tasks(tmp_path, weight_by_size)
    settings = Settings(benchmarks=("looks",), math_benchmarks=(), include_path=tmp_path, quiet=True, backend="hf")
    result, _ = evaluate_with_samples(str(checkpoint), settings)
    outcomes = result.outcomes["looks"]
    parts = [outcomes.tasks[name].verdicts["acc"] for name in ("colors", "shapes")]
    items = [v for part in parts for v in part]
    expected = sum(items) / len(items) if weight_by_size else sum(sum(part) / len(part) for part in parts) / len(parts)
    assert [len(part) for part in parts] == [6, 2]
    assert result.scores["looks"].value == pytest.approx(100 * expected)
    assert outcomes.score("acc") == pytest.approx(100 * expected)
    assert outcomes.macro == (() if weight_by_size else ("acc",))
    assert EvalResult.from_json(json.loads(json.dumps(result.to_json()))).outcomes == result.outcomes


def test_perplexity_is_no_fraction_and_less_is_better(checkpoint: Path, tmp_path: Path) -> None:
    """A perplexity is not turned into percent, has no verdicts, and carries its direction through the file."""
    write_tasks(tmp_path, weight_by_size=True)
    settings = Settings(benchmarks=("prose",), math_benchmarks=(), include_path=tmp_path, quiet=True, backend="hf")
    result, _ = evaluate_with_samples(str(checkpoint), settings)
    score = result.scores["prose"]
    raw = result.harness["results"]["prose"]
    assert (score.value, score.is_fraction, score.higher_is_better) == (raw["word_perplexity,none"], False, False)
    assert result.outcomes == {}
    assert EvalResult.from_json(json.loads(json.dumps(result.to_json()))).scores == result.scores


def test_macro_average_and_its_draws() -> None:
    """By hand: tasks with 3 of 4 and 0 of 1 right are 37.5 by task and 60 by item; draws without a task skip it."""
    tasks = {
        "a": TaskOutcomes((0, 1, 2, 3), ("d",) * 4, {"acc": (1.0, 1.0, 1.0, 0.0)}),
        "b": TaskOutcomes((0,), ("e",), {"acc": (0.0,)}),
    }
    assert Outcomes(tasks, macro=("acc",)).score("acc") == 37.5
    assert Outcomes(tasks).score("acc") == 60.0
    draws = bootstrap([Outcomes(tasks, macro=("acc",)).terms("acc")], 500, [1])
    assert draws.shape == (500, 1)
    assert ((draws >= 0) & (draws <= 100)).all()


@pytest.mark.parametrize(
    ("metric", "aggregation", "values", "fraction", "higher"),
    [
        ("acc", "mean", [0, 1], True, True),
        ("exact_match", "mean", [0.0], True, True),
        ("pass@1", "mean", [1.0], True, True),
        ("letter_rate", "mean", [0, 1, 0.5], True, True),
        ("criteria_met", "mean", [True, False], True, True),
        ("chrf_like_score", "mean", [3.0, 71.0], False, True),
        ("my_number", "perplexity", [-1.0], False, True),
        ("ter", "ter", [], False, False),
        ("word_perplexity", "weighted_perplexity", [], False, False),
        ("mcc", "matthews_corrcoef", [], False, True),
        ("judge", "mean", [], False, True),
        ("judge", "mean", [7.5, 0.5], False, True),
    ],
)
def test_direction_and_scale_follow_the_metric(
    metric: str, aggregation: str, values: list[float], fraction: bool, higher: bool
) -> None:
    """Percent is for fractions; `ter` within a name means nothing."""
    assert is_fraction(metric, aggregation, values) is fraction
    assert direction_of(metric) is higher


def test_the_task_file_decides_the_direction() -> None:
    """What the task or group says of its metric comes before lm-eval's registry; disagreeing parts give None."""
    assert direction_of("acc", {"acc": False}) is False
    assert direction_of("ter", {"ter": True}) is True
    assert direction_of("acc", {"acc": None}) is None


def test_results_without_direction_are_read() -> None:
    """A score of schema 2 gets the direction and scale of its metric's name."""
    old = {
        k: v for k, v in asdict(Score("word_perplexity", 12.5)).items() if k not in ("higher_is_better", "is_fraction")
    }
    assert Score.from_json(old) == Score("word_perplexity", 12.5, higher_is_better=False, is_fraction=False)
    assert Score.from_json({**old, "metric": "acc"}) == Score("acc", 12.5)
