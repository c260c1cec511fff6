"""Presets, shots and samples: the requests and scores that each makes of each benchmark, on a tiny real model."""

from __future__ import annotations

import json
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any, ClassVar

import pytest

from common.cli import run
from common.errors import UsageError
from eval.benchmarks import UNFENCED, chosen
from eval.data.task_index import stock_folder
from eval.request_types import Facts
from eval.sandbox.supervisor import SandboxSettings
from eval.settings import Settings, parse_numbers
from eval.tasks import code, scoring
from evaluate_model import main
from tests.helpers.evaluation import PRO_SUBJECTS, QUESTIONS


@pytest.fixture
def settings(data_dir: Path) -> Settings:
    """Nothing yet, by lm-eval's preset, short answers, float32, quiet."""
    return Settings(
        preset="lm-eval", benchmarks=(), math_benchmarks=(), data_dir=data_dir, offline=True, dtype="float32",
        device="cpu", max_gen_toks=4, math_max_tokens=4, quiet=True,
    )  # fmt: skip


def evaluated(checkpoint: Path, settings: Settings) -> tuple[Any, Any]:
    from eval.harness.evaluation import evaluate_with_samples

    return evaluate_with_samples(str(checkpoint), settings)


def test_lm_evals_preset_is_its_stock_tasks(checkpoint: Path, settings: Settings) -> None:
    """GSM8K has five examples and lm-eval's two matches, MATH four examples, its exact match and math-verify; prompts,
    stops and shots are those of the stock files."""
    result, samples = evaluated(checkpoint, replace(settings, math_benchmarks=("gsm8k", "math"), limits={"": 7}))
    assert set(samples) == {"gsm8k", "minerva_math"}
    ((prompt, generation),) = samples["gsm8k"][0]["arguments"]
    assert prompt.count("Question:") == 6
    assert prompt.endswith(f"Question: {QUESTIONS[0][0]}\nAnswer:")
    assert generation["until"] == ["Question:", "</s>", "<|im_end|>"]
    ((prompt, generation),) = samples["minerva_math"][0]["arguments"]
    assert prompt.count("Problem:") == 5
    assert prompt.endswith("Problem:\n1+1?\n\nSolution:")
    gsm8k, math = result.scores["GSM8K"], result.scores["MATH"]
    assert (gsm8k.metric, math.metric) == ("strict match", "math_verify")
    assert (set(gsm8k.beside), set(math.beside)) == ({"flexible match"}, {"exact_match"})
    assert result.scores["MATH"].n == 7
    assert result.settings["max_length"] == 512


def test_verdicts_of_maths_by_both_presets(
    checkpoint: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given the model's words, each preset grades as it says: strict and flexible matches by lm-eval's patterns, MATH
    by the final answer in any words (math-verify) and by the words of lm-eval's examples (exact match)."""
    said = {"gsm8k": "So 3-1 = 2.\n#### 2", "math": r"I get $\boxed{2}$."}

    class Says:
        remarks: ClassVar[list[str]] = []

        def answer(self, requests: Any, answered: Any) -> None:
            for r in requests:
                answered(r, said["gsm8k" if "gsm8k" in r.task else "math"], Facts())

        def used(self) -> dict[str, Any]:
            return {}

    from eval.harness import models

    monkeypatch.setattr(models, "make_backend", lambda *_: Says())
    asked = replace(settings, math_benchmarks=("gsm8k", "math"))
    result, _ = evaluated(checkpoint, asked)
    assert (result.scores["GSM8K"].value, result.scores["GSM8K"].beside["flexible match"].value) == (50.0, 50.0)
    assert (result.scores["MATH"].value, result.scores["MATH"].beside["exact_match"].value) == (100.0, 0.0)
    said |= {"gsm8k": "It is 2, or rather 4!", "math": "Final Answer: The final answer is $2$. I hope it is correct."}
    result, _ = evaluated(checkpoint, asked)
    assert (result.scores["GSM8K"].value, result.scores["GSM8K"].beside["flexible match"].value) == (0.0, 50.0)
    assert (result.scores["MATH"].value, result.scores["MATH"].beside["exact_match"].value) == (100.0, 100.0)
    paper, _ = evaluated(checkpoint, replace(asked, preset="paper"))
    assert paper.scores["GSM8K"].metric == "acc"
    assert paper.scores["GSM8K"].value == 50.0
    beside = paper.scores["GSM8K"].beside
    assert (beside["strict match"].value, beside["flexible match"].value) == (0.0, 50.0)


def test_mmlu_takes_examples_by_flag(checkpoint: Path, settings: Settings) -> None:
    """MMLU is 0-shot unless told; `--num_fewshot 5` and `mmlu_anatomy=5` put the five development items before."""
    asked = replace(settings, benchmarks=("mmlu_anatomy",), preset="paper")
    _, none = evaluated(checkpoint, asked)
    assert none["mmlu_anatomy"][0]["arguments"][0][0].count("Answer:") == 1
    for value in ("5", "mmlu_anatomy=5"):
        _, five = evaluated(checkpoint, replace(asked, num_fewshot=parse_numbers("num_fewshot", value)))
        prompt = five["mmlu_anatomy"][0]["arguments"][0][0]
        assert prompt.count("Answer:") == 6
        assert [prompt.index(f"Example {n}?") for n in range(5)] == sorted(
            prompt.index(f"Example {n}?") for n in range(5)
        )
    _, again = evaluated(checkpoint, asked)
    assert again["mmlu_anatomy"][0]["arguments"] == none["mmlu_anatomy"][0]["arguments"]


def test_mmlu_pro_runs_on_a_file_in_its_format(checkpoint: Path, settings: Settings) -> None:
    """All 14 subjects of a made MMLU-Pro, with five examples that think step by step."""
    result, samples = evaluated(checkpoint, replace(settings, mmlu_pro=True, max_model_len=512))
    assert result.scores["MMLU-Pro"].n == len(PRO_SUBJECTS) == 14
    prompt = samples["mmlu_pro"][0]["arguments"][0][0]
    assert prompt.count("The answer is (A)") == 5
    assert prompt.endswith("Answer: Let's think step by step.")


def test_stock_humaneval_stops_and_lengths_are_kept(checkpoint: Path, settings: Settings) -> None:
    """In both presets HumanEval asks with lm-eval's stop strings; its length is cut only by --max_gen_toks."""
    for preset in ("paper", "lm-eval"):
        asked = replace(settings, preset=preset, benchmarks=("humaneval",), limits={"": 1}, allow_code_execution=True)
        _, samples = evaluated(checkpoint, asked)
        ((_, generation),) = samples["humaneval"][0]["arguments"]
        stops = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
        assert generation == {"until": stops, "max_gen_toks": 4, "do_sample": False}


def test_code_is_judged_strictly_and_without_its_fences(monkeypatch: pytest.MonkeyPatch) -> None:
    """A right body passes both ways, a fenced one only without its fence, a wrong one never."""
    monkeypatch.setattr(code.CODE_EVAL, "sandbox", SandboxSettings())
    prompt = 'def double(x):\n    """Twice x."""\n'
    item = {"prompt": prompt, "entry_point": "double", "test": "def check(f):\n    assert f(2) == 4\n"}
    for completion, strict, unfenced in (
        ("    return 2 * x\n", 1, 1),
        ("```python\ndef double(x):\n    return 2 * x\n```\nDone.", 0, 1),
        ("    return 2 * x\n```\nThat is all.", 0, 1),
        ("    return x\n", 0, 0),
    ):
        assert scoring.code(item, [prompt + completion]) == {"pass@1": strict, UNFENCED: unfenced}
    assert code.tests_of(item).endswith("check(double)")


def test_several_answers_give_pass_at_k(checkpoint: Path, settings: Settings, tmp_path: Path) -> None:
    """12 drawn answers an item: pass@1, pass@10 and pass@12 by the unbiased estimator, kept and drawn alike again; a
    second run of another seed draws others."""
    verdicts = [True] * 3 + [False] * 9
    rates = scoring.pass_rates("acc", verdicts)
    assert rates == {"acc": 0.25, "pass@10": pytest.approx(1 - comb(9, 10) / comb(12, 10)), "pass@12": 1.0}
    assert scoring.pass_rates("acc", [True] * 2 + [False] * 98)["pass@10"] == pytest.approx(
        1 - comb(98, 10) / comb(100, 10)
    )
    asked = replace(
        settings, preset="paper", benchmarks=("humaneval",), math_benchmarks=("gsm8k",), limits={"": 2}, n_samples=12,
        temperature=0.9, allow_code_execution=True,
    )  # fmt: skip
    result, samples = evaluated(checkpoint, asked)
    for column, task in (("HumanEval", "humaneval"), ("GSM8K", "gsm8k_paper")):
        score = result.scores[column]
        assert {"avg@12", "pass@10", "pass@12"} <= set(score.beside)
        assert score.beside["avg@12"].value == pytest.approx(score.value)
        (drawn,) = samples[task][0]["resps"]
        assert len(drawn) == 12
        assert len(set(drawn)) > 6
    _, again = evaluated(checkpoint, replace(asked, batch_size="5", benchmarks=()))
    assert [s["resps"] for s in again["gsm8k_paper"]] == [s["resps"] for s in samples["gsm8k_paper"]]
    _, other = evaluated(checkpoint, replace(asked, seed=5, benchmarks=()))
    assert other["gsm8k_paper"][0]["resps"] != samples["gsm8k_paper"][0]["resps"]
    _, greedy = evaluated(checkpoint, replace(asked, n_samples=1, temperature=0.0, benchmarks=()))
    assert len(greedy["gsm8k_paper"][0]["resps"][0]) == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_samples": 4, "benchmarks": ("mmlu",)}, "needs a --temperature above 0"),
        ({"n_samples": 4, "temperature": 1.0, "benchmarks": ("ifeval",)}, "leave out ifeval"),
        ({"temperature": -1.0, "benchmarks": ("mmlu",)}, "--temperature must be a number from 0"),
        ({"num_fewshot": {"mmlu": 5}, "benchmarks": ("ifeval",)}, "which is not evaluated"),
        ({"num_fewshot": {"gsm8k": 5}, "math_benchmarks": ("gsm8k",), "preset": "paper"}, "has no examples"),
        ({"preset": "papers"}, "Did you mean 'paper'?"),
        ({"benchmarks": ("gsm8k",), "math_benchmarks": ("gsm8k",)}, "is asked for by --benchmarks and by"),
        ({"backend": "openai", "benchmarks": ("mmlu",)}, "belong together"),
        ({"backend": "openai", "base_url": "localhost:8000", "benchmarks": ("mmlu",)}, "is not an address"),
        ({"data_parallel": 0}, "--data_parallel must be a whole number from 1"),
    ],
)
def test_settings_that_cannot_be_right(settings: Settings, changes: dict[str, Any], sentence: str) -> None:
    """Each contradiction is a UsageError that says what to do, before anything is read."""
    with pytest.raises(UsageError, match=sentence):
        replace(settings, **changes).check()


def test_numbers_are_read_from_a_flag() -> None:
    """A number, names with numbers, nothing; anything else is refused."""
    assert parse_numbers("limit", "5") == {"": 5}
    assert parse_numbers("limit", " mmlu=5, arc_easy=25,") == {"mmlu": 5, "arc_easy": 25}
    assert parse_numbers("limit", None) == {}
    for wrong in ("mmlu", "mmlu=x", "=3", "mmlu=-1"):
        with pytest.raises(UsageError, match="expected a number"):
            parse_numbers("limit", wrong)


def test_several_models_are_a_row_each(
    checkpoint: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--model A,B checks both first and prints a row for each; a lm-eval preset's prompt flag is refused."""
    import shutil

    second = tmp_path / "second"
    shutil.copytree(checkpoint, second)
    flags = ["--data_dir", str(data_dir), "--benchmarks", "", "--math_benchmarks", "gsm8k", "--math_max_tokens", "4"]
    flags += ["--dtype", "float32", "--save_path", str(tmp_path / "out"), "--quiet", "--limit", "1"]
    assert run(main, ["--model", f"{checkpoint},{second}", *flags]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in (rows[0], rows[2], rows[3])] == ["Model", "tiny", "second"]
    assert rows[4].startswith("tiny, GSM8K: acc of 1 items; strict match")
    assert len({json.loads(f.read_text())["aim"]["digest"] for f in (tmp_path / "out").rglob("results_*.json")}) == 1
    assert run(main, ["--model", f"{checkpoint},{tmp_path / 'none'}", *flags]) == 2
    assert "none does not exist" in capsys.readouterr().err
    broken, nan = tmp_path / "broken", tmp_path / "nan"
    for folder in (broken, nan):
        shutil.copytree(checkpoint, folder)
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    save_file(
        {k: t for k, t in tensors.items() if k != "model.norm.weight"}, broken / "model.safetensors", {"format": "pt"}
    )
    save_file({k: t * float("nan") for k, t in tensors.items()}, nan / "model.safetensors", {"format": "pt"})
    assert run(main, ["--model", f"{broken},{checkpoint},{nan},{second}", *flags, "--no_cache"]) == 1
    out, err = capsys.readouterr()
    assert [row.split("|")[1].strip() for row in out.splitlines()[2:4]] == ["tiny", "second"]
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert ["model.norm.weight" in lines[0], "NaN or infinite" in lines[1], len(lines)] == [True, True, 2]
    assert f"Model: {nan}." in lines[1]
    assert "Traceback" not in err
    assert run(main, ["--model", str(second), *flags, "--preset", "lm-eval", "--math_prompt_type", "cot"]) == 2
    assert "--math_prompt_type is of the paper's preset" in capsys.readouterr().err


def test_every_benchmark_names_task_files_that_exist() -> None:
    """The folders and metrics that the presets name are those of the installed lm-eval."""
    for preset in ("paper", "lm-eval"):
        for b in chosen(["mmlu", "ifeval", "mbpp", "humaneval", "mmlu_pro"], ["math", "gsm8k"], preset=preset):
            for folder in b.folders:
                assert (stock_folder() / folder).is_dir()
            assert b.key or b.name == "ifeval"
