"""Evaluation: a tiny real Llama on real tasks from a folder of benchmark data, and the refusals."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from common.cli import run
from common.errors import EvaluationError, UsageError
from common.versions import EVALUATION, versions
from eval.benchmarks import chosen
from eval.data.protocol import items_per_part
from eval.data.task_index import stock_folder
from eval.harness.backends.batches import batch_sizes, cache_bytes_per_token, generation_rows, scoring_rows
from eval.harness.scores import ratio_score, standard_error
from eval.outcomes import IFEVAL, IFEVAL_MEAN, INSTRUCTIONS, Outcomes, TaskOutcomes
from eval.results.result import EvalResult, Score
from eval.results.store import folder_name, save, table
from eval.settings import Settings
from evaluate_model import main
from tests.helpers.evaluation import DATA, QUESTIONS, ROOT, write_jsonl


@pytest.fixture
def settings(data_dir: Path) -> Settings:
    """GSM8K only, short answers, float32, quiet."""
    return Settings(
        benchmarks=(), math_benchmarks=("gsm8k",), data_dir=data_dir, offline=True, dtype="float32",
        math_max_tokens=8, max_gen_toks=8, quiet=True,
    )  # fmt: skip


def test_all_kinds_of_benchmarks_run_and_are_saved(
    checkpoint: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script scores MMLU, HumanEval, MATH and GSM8K offline, prints a row each, and saves results with samples."""
    flags = ["--model", str(checkpoint), "--data_dir", str(data_dir), "--limit", "3", "--benchmarks", "mmlu,humaneval"]
    flags += ["--allow_code_execution", "--math_max_tokens", "8", "--max_gen_toks", "8", "--save_path", str(tmp_path)]
    assert run(main, flags) == 0
    shown = capsys.readouterr()
    head, _, row, *details = shown.out.splitlines()
    assert [cell.strip() for cell in head.split("|")[1:-1]] == ["Model", "HumanEval", "MMLU", "MATH", "GSM8K"]
    assert row.split("|")[1].strip() == "tiny"
    assert [line.split(":")[0] for line in details] == ["MMLU", "HumanEval", "MATH", "GSM8K"]
    assert "mmlu: 57 of 114 items of 57 subjects" in shown.err
    (written,) = (tmp_path / folder_name(str(checkpoint))).glob("results_*.json")
    result = EvalResult.load(written)
    assert {name: score.n for name, score in result.scores.items()} == {
        "MMLU": 57,
        "HumanEval": 3,
        "MATH": 7,
        "GSM8K": 3,
    }
    assert all(0 <= score.value <= 100 for score in result.scores.values())
    assert result.scores["MMLU"].value == pytest.approx(100 * result.harness["results"]["mmlu"]["acc,none"])
    assert result.scores["MMLU"].stderr is not None
    assert result.settings["batch_size_used"] == {"score": 57, "generate": 7}
    for column, outcomes in result.outcomes.items():
        assert outcomes.score(result.scores[column].metric) == pytest.approx(result.scores[column].value)
        assert len(set(outcomes.keys())) == result.scores[column].n
    assert set(result.scores["HumanEval"].beside) == {"pass@1 without code fences"}
    assert set(result.scores["GSM8K"].beside) == {"strict match", "flexible match"}
    assert result.digest.startswith("sha256:")
    assert result.hardware["cores"] >= 1
    assert {"total", "prepare", "load", "MMLU", "HumanEval", "MATH", "GSM8K"} <= set(result.seconds)
    assert result.settings["max_length"] == 512
    assert result.versions["lm_eval"]
    assert result.versions.items() >= versions(EVALUATION).items()
    assert result.model == str(checkpoint)
    stamp = written.stem.removeprefix("results_")
    names = sorted(p.name for p in written.parent.iterdir())
    assert names == sorted(
        [
            "generations.jsonl",
            written.name,
            *(f"samples_{t}_{stamp}.jsonl" for t in ("mmlu", "humaneval", "math_paper", "gsm8k_paper")),
        ]
    )
    first = json.loads((written.parent / f"samples_gsm8k_paper_{stamp}.jsonl").read_text().splitlines()[0])
    assert first["arguments"][0][0] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{QUESTIONS[0][0]}\n\n### Response: Let's think step by step."
    )
    assert first["arguments"][0][1]["until"] == ["</s>", "<|im_end|>", "<|endoftext|>", "\n\nQuestion:"]


def test_ifeval_runs_with_the_sentence_splitter_of_the_data_folder(
    checkpoint: Path, data_dir: Path, settings: Settings
) -> None:
    """IFEval scores offline with nltk's punkt_tab found in the data folder, even one others may write."""
    if not (DATA / "nltk_data").is_dir():
        pytest.skip(f"no nltk_data in {DATA}; set AIM_DATA_DIR")
    from eval.harness.evaluation import evaluate

    link = data_dir / "nltk_data"
    if not link.exists():
        link.symlink_to(DATA / "nltk_data")
    result = evaluate(str(checkpoint), replace(settings, benchmarks=("ifeval",), math_benchmarks=()))
    assert result.scores["IFEval"].n == 2
    assert result.scores["IFEval"].metric == "mean of 4 accuracies"
    four = [v for k, v in result.harness["results"]["ifeval"].items() if "_acc," in k]
    assert [100 * v for v in four] == pytest.approx([result.scores["IFEval"].beside[m].value for m in IFEVAL])
    assert len(four) == 4
    assert result.scores["IFEval"].value == pytest.approx(100 * sum(four) / 4)


def test_a_loaded_model_scores_as_its_folder_and_repeats(checkpoint: Path, settings: Settings) -> None:
    """The same model from disk, loaded, and again: the same samples, generation by generation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from eval.harness.evaluation import evaluate_with_samples

    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    first, a = evaluate_with_samples(str(checkpoint), settings)
    second, b = evaluate_with_samples(loaded, settings, tokenizer=tokenizer, name="loaded")
    assert (first.model, second.model) == (str(checkpoint), "loaded")
    assert [s["resps"] for s in a["gsm8k_paper"]] == [s["resps"] for s in b["gsm8k_paper"]]
    assert first.scores == second.scores
    assert first.settings["prompts_sha256"] == second.settings["prompts_sha256"]


def test_templates_are_compiled_once() -> None:
    """A prompt template is compiled for the first item alone, and renders as lm-eval's own environment renders it."""
    from lm_eval import utils

    from eval.data.loading import compile_templates_once

    compile_templates_once()
    text = "{{question | regex_replace('a', 'b')}}{% if x %}!{% endif %}\n"
    assert utils.env.from_string(text) is utils.env.from_string(text)
    for doc in ({"question": "a cat", "x": 0}, {"question": "aa", "x": 1}):
        plain = type(utils.env).from_string(utils.env, text).render(**doc)
        assert utils.apply_template(text, doc) == plain
    with pytest.raises(Exception, match="undefined"):
        utils.apply_template("{{question}}", {"x": 1})


@pytest.mark.parametrize("prompt_type", ["cot", "wiz", "wizard_zs"])
def test_the_prompt_type_reaches_the_model(checkpoint: Path, settings: Settings, prompt_type: str) -> None:
    """Each prompt type changes the prompt and the stop strings of the requests, also after another one was run."""
    from eval.harness.evaluation import evaluate_with_samples
    from eval.tasks.prompts import STOPS, prompt

    _, samples = evaluate_with_samples(str(checkpoint), replace(settings, math_prompt_type=prompt_type, limits={"": 1}))
    ((text, generation),) = samples["gsm8k_paper"][0]["arguments"]
    assert text == prompt(prompt_type, QUESTIONS[0][0])
    assert generation == {"until": list(STOPS[prompt_type]), "do_sample": False, "max_gen_toks": 8}


def test_code_tasks_are_the_stock_ones_but_for_the_metric(data_dir: Path) -> None:
    """HumanEval's and MBPP's prompts, shots, stops and filters are lm-eval's own; only the metric code_eval is ours."""
    from lm_eval.tasks._yaml_loader import load_yaml

    from eval.data.loading import load
    from eval.tasks.code import CODE_EVAL

    code = tuple(chosen(["humaneval", "mbpp"], []))
    loaded = load(code, Settings(data_dir=data_dir, offline=True))
    for benchmark in code:
        stock = load_yaml(stock_folder() / benchmark.name / f"{benchmark.name}.yaml", resolve_func=False)
        (task,) = loaded[benchmark].tasks.values()
        for key in ("doc_to_text", "doc_to_target", "generation_kwargs", "num_fewshot", "target_delimiter"):
            assert key not in stock or task.get_config(key) == stock[key]
        assert [f.name for f in task._filters] == [f["name"] for f in stock.get("filter_list", [{"name": "none"}])]
    (humaneval,), (mbpp_task,) = (loaded[b].tasks.values() for b in code)
    assert len(humaneval.eval_docs) == 164
    assert len(mbpp_task.sampler.fewshot_docs()) == 3
    assert sys.modules["lm_eval.tasks.humaneval.utils"].compute_ is CODE_EVAL
    assert sys.modules["lm_eval.tasks.mbpp.utils"].pass_at_k is CODE_EVAL


def test_the_users_own_task_is_scored_under_its_name(checkpoint: Path, settings: Settings, tmp_path: Path) -> None:
    """A task file in --include_path runs by name; its first metric is reported in percent."""
    write_jsonl(tmp_path / "own.jsonl", [{"q": "a", "a": "b"}, {"q": "c", "a": "d"}])
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'own.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: 0\n"
        "doc_to_choice: ['{{a}}', 'x']\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    from eval.harness.evaluation import evaluate

    result = evaluate(
        str(checkpoint), replace(settings, benchmarks=("own",), math_benchmarks=(), include_path=tmp_path)
    )
    assert result.scores["own"].metric == "acc"
    assert result.scores["own"].n == 2


Change = Callable[[Path], list[str]]
REFUSALS: list[tuple[list[str], int, str]] = [
    (["--benchmarks", "humaneval,mbpp"], 2, "--allow_code_execution"),
    (["--benchmarks", "mmul"], 2, "Did you mean 'mmlu'?"),
    (["--benchmarks", "", "--math_benchmarks", "gsm"], 2, "Did you mean 'gsm8k'?"),
    (["--benchmarks", "math"], 2, "--math_benchmarks math"),
    (["--benchmarks", "", "--math_benchmarks", ""], 2, "Nothing to evaluate"),
    (["--benchmarks", "", "--limit", "0"], 2, "--limit must be at least 1"),
    (["--benchmarks", "", "--batch_size", "many"], 2, "--batch_size"),
    (["--benchmarks", "", "--max_model_len", "513"], 2, "more than the 512 positions"),
    (["--benchmarks", "", "--apply_chat_template"], 2, "no chat template"),
    (["--benchmarks", "", "--device", "cuda:99"], 2, "--device cuda:99 is not available"),
    (["--benchmarks", "", "--n_gpu", "99"], 2, "--n_gpu 99"),
    (["--benchmarks", "", "--data_dir", "no_such_folder"], 2, "is not a folder"),
    (["--benchmarks", "arc_easy"], 2, "has no allenai/ai2_arc"),
    (["--benchmarks", "", "--math_prompt_type", "wcott"], 2, "invalid choice"),
    (["--benchmark", "mmlu"], 2, "--benchmarks"),
]


@pytest.mark.parametrize(("flags", "code", "sentence"), REFUSALS)
def test_refusals(
    checkpoint: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    flags: list[str], code: int, sentence: str,
) -> None:  # fmt: skip
    """What cannot be evaluated is refused in one sentence with its exit code, and nothing is written."""
    target = tmp_path / "results"
    everything = ["--model", str(checkpoint), "--data_dir", str(data_dir), "--save_path", str(target), *flags]
    assert run(main, everything) == code
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert not target.exists()


def test_models_that_cannot_be_evaluated_are_refused(
    checkpoint: Path, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing folder, an empty one, one without tokenizer, a file: each named before anything is loaded."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text((checkpoint / "config.json").read_text())
    for model, sentence in (
        (tmp_path / "missing", "does not exist"),
        (tmp_path / "empty", "no config.json"),
        (tmp_path / "bare", "no tokenizer"),
        (checkpoint / "config.json", "is a file"),
    ):
        assert run(main, ["--model", str(model), "--benchmarks", ""]) == 2
        assert sentence in capsys.readouterr().err
    from transformers import AutoModelForCausalLM

    from eval.harness.evaluation import evaluate

    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(UsageError, match="needs its tokenizer"):
        evaluate(loaded, settings)


def test_broken_weights_are_one_sentence(checkpoint: Path, settings: Settings, tmp_path: Path) -> None:
    """A checkpoint cut short is an EvaluationError that names the model."""
    for file in checkpoint.iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[:100] if file.suffix == ".safetensors" else data)
    from eval.harness.evaluation import evaluate

    with pytest.raises(EvaluationError, match="could not be loaded"):
        evaluate(str(tmp_path), settings)


def test_missing_benchmark_data_is_named_first(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A data folder without a benchmark's files is refused, naming all that is missing."""
    (tmp_path / "data").mkdir()
    flags = ["--model", str(checkpoint), "--data_dir", str(tmp_path / "data"), "--benchmarks", "mmlu"]
    assert run(main, flags) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in ("cais/mmlu", "EleutherAI/hendrycks_math", "openai/gsm8k"))


def test_help_and_usage_errors_import_nothing_heavy() -> None:
    """--help answers without torch, transformers, datasets or lm_eval."""
    code = (
        "import sys, evaluate_model\ntry: evaluate_model.main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'lm_eval', 'datasets', 'numpy'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "--allow_code_execution" in shown.stdout


def test_the_defaults_are_the_original_ones() -> None:
    """Benchmarks, dtype, prompt type, lengths and save path default to the original script's."""
    from eval.commands.evaluate_flags import parser, settings_of

    a = parser().parse_args(["--model", "m"])
    assert (a.benchmarks, a.math_benchmarks) == ("mmlu,ifeval,mbpp,humaneval", "math,gsm8k")
    s = settings_of(a)
    assert (s.preset, s.dtype, s.batch_size) == ("paper", None, "auto")
    assert (s.math_prompt_type, s.math_max_tokens, s.n_samples, s.temperature) == ("wcot", 1024, 1, 0.0)
    assert (a.save_path, a.n_gpu, a.limit, a.max_model_len) == (Path("results"), None, None, None)


def test_results_are_added_never_overwritten(tmp_path: Path) -> None:
    """Saving the same result many times leaves as many files, each whole, and no partial one."""
    result = EvalResult("org/model", {"MMLU": Score("acc", 50.0, 1.5, 10)})
    for _ in range(20):
        save(result, {"mmlu": [{"doc_id": 0}]}, tmp_path)
    files = list((tmp_path / "org__model").iterdir())
    assert len(files) == 40
    assert all(EvalResult.load(f) == result for f in files if f.name.startswith("results_"))
    assert table([result, EvalResult("b", {})]).splitlines() == [
        "| Model |         MMLU |",
        "|-------|-------------:|",
        "| model | 50.00 ± 1.50 |",
        "| b     |            - |",
    ]


def test_a_limit_is_spread_over_subjects() -> None:
    """A limit is met exactly when it can be, takes the first items of each part, and at least one."""
    sizes = {"a": 10, "b": 10, "c": 2}
    assert items_per_part(7, sizes) == {"a": [0, 1, 2], "b": [0, 1], "c": [0, 1]}
    assert items_per_part(1, sizes) == {"a": [0], "b": [0], "c": [0]}
    assert sum(map(len, items_per_part(50, {str(i): 100 for i in range(57)}).values())) == 57
    assert sum(map(len, items_per_part(100, {str(i): 100 for i in range(57)}).values())) == 100


def test_ifeval_is_the_mean_of_its_four_accuracies() -> None:
    """By hand: prompts 1/2 strict and 2/2 loose, instructions 2/3 strict and 3/3 loose, so 79.17."""
    verdicts = dict(zip((*IFEVAL, INSTRUCTIONS), ((1, 0), (1, 1), (1, 1), (1, 2), (1, 2)), strict=True))
    outcomes = Outcomes({"ifeval": TaskOutcomes((0, 1), ("a", "b"), verdicts)})
    score = ratio_score(outcomes, IFEVAL_MEAN)
    assert score.value == pytest.approx(100 * (1 / 2 + 1 + 2 / 3 + 1) / 4)
    deviations = [(0.5 + (1 - 2 / 3) / 1.5) / 4, (-0.5 + (1 - 4 / 3) / 1.5) / 4]
    assert score.stderr == pytest.approx(100 * math.sqrt(sum(d * d for d in deviations) / 2))
    assert ratio_score(outcomes, IFEVAL[2]).value == pytest.approx(100 * 2 / 3)
    assert Outcomes.from_json(outcomes.to_json()) == outcomes
    assert standard_error([1.0]) is None


def test_a_changed_data_file_is_read_again(checkpoint: Path, settings: Settings, tmp_path: Path) -> None:
    """Two folders of the same shape and name, or one whose file changed, never share what was read from them."""
    from eval.harness.evaluation import evaluate_with_samples

    asked = []
    for i, question in enumerate(("first", "second")):
        file = tmp_path / str(i) / "openai/gsm8k/main/test.jsonl"
        write_jsonl(file, [{"question": question, "answer": "#### 1"}])
        card = "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: main/test.jsonl\n---\n"
        (tmp_path / str(i) / "openai/gsm8k/README.md").write_text(card)
        _, samples = evaluate_with_samples(str(checkpoint), replace(settings, data_dir=tmp_path / str(i)))
        asked.append(samples["gsm8k_paper"][0]["doc"]["question"])
    assert asked == ["first", "second"]


def test_rows_fit_their_memory() -> None:
    """Tiny models get 64 rows on a CPU, larger ones fewer, never none, always a power of two."""
    tiny = {"vocab_size": 300, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    small = {"vocab_size": 49152, "hidden_size": 576, "num_attention_heads": 9, "num_hidden_layers": 30}
    small["num_key_value_heads"] = 3
    large = {"vocab_size": 256000, "hidden_size": 8192, "num_attention_heads": 64, "num_hidden_layers": 80}
    assert cache_bytes_per_token(small, 2) == 2 * 2 * 30 * 3 * 64
    assert [generation_rows(c, 2, 2048, 2 << 30, "cpu") for c in (tiny, small, large)] == [64, 32, 1]
    assert [generation_rows(c, 2, 2048, 64 << 30, "cuda") for c in (tiny, small, large)] == [256, 256, 8]
    assert [scoring_rows(c, 300, 2 << 30, "cpu") for c in (tiny, small, large)] == [64, 8, 2]


def test_batches_are_cut_by_rows_and_length() -> None:
    """The size of each row's batch, by hand: a limit that grows as rows get shorter, and equal lengths only."""
    lengths = [9, 9, 8, 5, 5, 5, 2]
    assert batch_sizes(lengths, lambda n: 2, False) == [2, 2, 2, 2, 2, 2, 1]
    assert batch_sizes(lengths, lambda n: 20 // n, False) == [2, 2, 2, 2, 3, 3, 3]
    assert batch_sizes(lengths, lambda n: 2, True) == [2, 2, 1, 2, 2, 1, 1]
    assert batch_sizes(lengths, lambda n: 0, False) == [1] * 7
