"""Scores and outcomes of tasks and groups: direction, scale, micro and macro averages."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from common.errors import UsageError
from eval.harness.evaluation import evaluate_with_samples
from eval.harness.rescore import rescore
from eval.outcomes import Outcomes, TaskOutcomes
from eval.results.answer_facts import answer_facts, answers_table
from eval.results.metrics import direction_of, is_fraction
from eval.results.result import EvalResult, Score
from eval.results.store import save
from eval.seeding import seeded
from eval.settings import Settings
from eval.stats.resampling import bootstrap
from tests.helpers.evaluation import DATA, make_checkpoint, make_data, write_jsonl


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("scores") / "model")


def write_shown_task(folder: Path, extra: str = "") -> None:
    """Write a task whose examples come from the evaluated split, without saying so."""
    rows = [{"question": f"What is {i} plus 1?", "answer": str(i + 1)} for i in range(4)]
    write_jsonl(folder / "shown.jsonl", rows)
    (folder / "shown.yaml").write_text(
        f"task: shown\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/shown.jsonl\n"
        "output_type: generate_until\ntest_split: test\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        f"num_fewshot: 2\n{extra}"
        "generation_kwargs:\n  until: ['###']\n  max_new_tokens: 7\n  do_sample: false\n"
        "metric_list:\n  - metric: exact_match\n"
    )


@pytest.mark.parametrize("extra", ["", "fewshot_config:\n  sampler: first_n\n"])
def test_an_example_is_never_the_item(checkpoint: Path, tmp_path: Path, extra: str) -> None:
    """A task without a few-shot split draws its examples from the items, but never the item; three seeds."""
    write_shown_task(tmp_path, extra)
    for seed in (1, 2, 3):
        settings = Settings(
            benchmarks=("shown",), math_benchmarks=(), include_path=tmp_path, quiet=True, backend="hf", seed=seed
        )
        _, samples = evaluate_with_samples(str(checkpoint), settings)
        for sample in samples["shown"]:
            prompt = sample["arguments"][0][0]
            assert prompt.count(sample["doc"]["question"]) == 1
            assert prompt.count("What is") == 3


def test_too_few_other_items_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    """Four examples besides the item cannot come from four items."""
    write_shown_task(tmp_path, "fewshot_config:\n  sampler: first_n\n")
    settings = Settings(
        benchmarks=("shown",), math_benchmarks=(), include_path=tmp_path, quiet=True, num_fewshot={"shown": 4}
    )
    with pytest.raises(UsageError, match="has only 3 examples besides the item itself"):
        evaluate_with_samples(str(checkpoint), settings)


def test_the_length_of_a_task_file_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    """max_new_tokens is a length like max_gen_toks, and only one of them reaches the model."""
    write_shown_task(tmp_path)
    settings = Settings(benchmarks=("shown",), math_benchmarks=(), include_path=tmp_path, quiet=True, backend="hf")
    result, _ = evaluate_with_samples(str(checkpoint), settings)
    generation = result.harness["configs"]["shown"]["generation_kwargs"]
    assert generation == {"until": ["###"], "do_sample": False, "max_gen_toks": 7}


def test_figures_of_answers() -> None:
    """By hand: four answers to two items, one of them empty behind its reasoning, two cut; filters count once."""
    samples = [
        {"task": "t", "doc_id": 0, "filter": f, "resps": [["abcd", "<think>so</think> "]], "tokens": [[3, 9]],
         "finish": [["stop", "length"]]}
        for f in ("strict", "flexible")
    ]  # fmt: skip
    samples += [
        {"task": "t", "doc_id": 1, "resps": [["ab", "<think>"]], "tokens": [[2, 2]], "finish": [["stop", "length"]]}
    ]
    characters = (4 + len("<think>so</think> ") + 2 + len("<think>")) / 4
    expected = {"n": 4, "characters": characters, "empty": 50.0, "tokens": 4.0, "cut": 50.0}
    assert answer_facts(samples) == expected
    unknown = [{**sample, "tokens": [[None, None]], "finish": [[None, None]]} for sample in samples]
    assert answer_facts(unknown) == {k: v for k, v in expected.items() if k not in ("tokens", "cut")}
    assert answer_facts([{"task": "t", "doc_id": 0, "resps": [[[-1.0, True]], [[-2.0, False]]]}]) == {}
    result = EvalResult("out/m", {"GSM8K": Score("acc", 1.0)}, answers={"GSM8K": expected})
    table = answers_table([result, EvalResult("out/old", {"GSM8K": Score("acc", 1.0)})])
    assert "| Model | GSM8K tokens | GSM8K cut (%) | GSM8K empty (%) |" in table
    assert "| m | 4.0 | 50.0 | 50.0 |" in table
    assert "| old | - | - | - |" in table


def test_figures_of_answers_survive_rescoring(checkpoint: Path, tmp_path: Path) -> None:
    """What a backend tells of its answers is in the result, in the file, and in the result graded again."""
    write_shown_task(tmp_path)
    settings = Settings(benchmarks=("shown",), math_benchmarks=(), include_path=tmp_path, quiet=True, backend="hf")
    result, samples = evaluate_with_samples(str(checkpoint), settings)
    assert result.answers["shown"]["n"] == 4
    for sample in samples["shown"]:
        sample |= {"tokens": [[7]], "finish": [["length"]]}
    again, lines = rescore(save(result, samples, tmp_path / "results"), quiet=True)
    assert again.answers["shown"]["tokens"] == 7
    assert again.answers["shown"]["cut"] == 100
    assert all(line["tokens"] == [[7]] for line in lines["shown"])
    assert EvalResult.from_json(json.loads(json.dumps(again.to_json()))).answers == again.answers


@pytest.mark.parametrize("preset", ["paper", "lm-eval"])
def test_reasoning_is_no_part_of_a_maths_answer(checkpoint: Path, tmp_path: Path, preset: str) -> None:
    """An answer within <think> counts neither for GSM8K nor for MATH; the samples keep it."""
    data = make_data(tmp_path / "data")
    settings = Settings(
        preset=preset, benchmarks=(), math_benchmarks=("gsm8k", "math"), data_dir=data, offline=True, quiet=True,
        limits={"": 2}, max_gen_toks=4, math_max_tokens=4, backend="hf",
    )  # fmt: skip
    result, samples = evaluate_with_samples(str(checkpoint), settings)
    for thought, said, expected in ((7, None, 100.0), (None, 7, 0.0)):
        for name, items in samples.items():
            for sample in items:
                gold = "2" if "math" in name else sample["doc"]["answer"].split("####")[1].strip()
                inner, outer = (gold if number is None else str(number) for number in (thought, said))
                form = "\\boxed{{{}}}" if "math" in name else "#### {}"
                sample["resps"] = [[f"<think>{form.format(inner)}</think>\n{form.format(outer)}"]]
        again, kept = rescore(save(result, samples, tmp_path / "results"), quiet=True)
        assert {column: score.value for column, score in again.scores.items()} == {"GSM8K": expected, "MATH": expected}
        assert all("<think>" in sample["resps"][0][0] for items in kept.values() for sample in items)


AMBIGUOUS = "hello amigo"


def test_the_seed_reaches_langdetect() -> None:
    """A text whose language varies from draw to draw has one language for one seed, and the state is put back."""
    import langdetect
    from langdetect import DetectorFactory

    def languages(seeds: list[int]) -> list[str]:
        found = []
        for seed in seeds:
            with seeded(seed):
                found.append(langdetect.detect(AMBIGUOUS))
        return found

    assert len(set(languages(list(range(12))))) > 1
    assert languages([5] * 12) == languages([5]) * 12
    assert DetectorFactory.seed is None


def test_rescoring_gives_the_same_scores_each_time(checkpoint: Path, tmp_path: Path) -> None:
    """IFEval's language instruction on ambiguous answers: ten gradings of a file, one score.

    The prompts and answers hold U+0085, U+2028 and other characters that end a line for `str.splitlines`.
    """
    rows = [
        {
            "key": i,
            "prompt": f"Answer in Italian, please. \u2028 {i}\u0085 \x1c",
            "instruction_id_list": ["language:response_language"],
            "kwargs": [{"language": "it"}],
        }
        for i in range(8)
    ]
    if not (DATA / "nltk_data").is_dir():
        pytest.skip(f"no nltk_data in {DATA}; set AIM_DATA_DIR")
    write_jsonl(tmp_path / "data/google/IFEval/train.jsonl", rows)
    (tmp_path / "data/nltk_data").symlink_to(DATA / "nltk_data")
    settings = Settings(
        benchmarks=("ifeval",), math_benchmarks=(), data_dir=tmp_path / "data", offline=True, quiet=True, max_gen_toks=8
    )
    result, samples = evaluate_with_samples(str(checkpoint), settings)
    for i, sample in enumerate(samples["ifeval"]):
        sample["resps"] = [[AMBIGUOUS + " amigo" * (i % 3) + "\u2028\u0085\x1d\ud800"]]
    file = save(result, samples, tmp_path / "results")
    scores = [rescore(file, quiet=True)[0].scores["IFEval"] for _ in range(10)]
    assert scores == scores[:1] * 10


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


def test_standard_error_without_one_of_lm_eval(checkpoint: Path, tmp_path: Path) -> None:
    """A group of one-item tasks, for which lm-eval gives no standard error, has that of its items in percent."""
    write_tasks(tmp_path, weight_by_size=True)
    row = {"question": "shapes 0?", "choices": ["red", "a square"], "answer": 1}  # the other answer than colors 0
    write_jsonl(tmp_path / "shapes.jsonl", [row])
    settings = Settings(
        benchmarks=("looks",), math_benchmarks=(), include_path=tmp_path, quiet=True, backend="hf", limits={"": 2}
    )
    result, _ = evaluate_with_samples(str(checkpoint), settings)
    verdicts = [v for task in result.outcomes["looks"].tasks.values() for v in task.verdicts["acc"]]
    assert len(verdicts) == 2
    share = sum(verdicts) / 2
    expected = 100 * (share * (1 - share)) ** 0.5
    assert result.scores["looks"].stderr == pytest.approx(expected)
    assert verdicts[0] != verdicts[1]
