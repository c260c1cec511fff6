"""Other ways to run a model: several processes, lm-eval's own models, a server; the same answers from each."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from common.cli import run
from eval.harness.journal import Journal
from eval.results.result import EvalResult
from eval.results.store import model_folder
from evaluate_model import main
from tests.helpers.evaluation import ROOT, make_checkpoint
from tests.helpers.launching import Launch, by_accelerate


def flags(checkpoint: Path, data_dir: Path, out: Path) -> list[str]:
    """MMLU's anatomy and GSM8K with short answers in float32."""
    found = ["--model", str(checkpoint), "--data_dir", str(data_dir), "--benchmarks", "mmlu_anatomy"]
    found += ["--math_benchmarks", "gsm8k,math", "--math_max_tokens", "6", "--dtype", "float32", "--device", "cpu"]
    return [*found, "--save_path", str(out)]


def result_of(out: Path, checkpoint: Path) -> EvalResult:
    """The only result below a folder."""
    (file,) = model_folder(out, str(checkpoint)).glob("results_*.json")
    return EvalResult.load(file)


def test_two_processes_share_the_work(checkpoint: Path, data_dir: Path, tmp_path: Path) -> None:
    """Under `accelerate launch` two ranks on the CPU each answer half, and rank 0 reports the scores and
    outcomes of a single process; a further run finds all answers."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert run(main, [*flags(checkpoint, data_dir, alone), "--quiet"]) == 0
    done = by_accelerate(2, "evaluate_model.py", *flags(checkpoint, data_dir, shared))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("| tiny") == 1
    one, two = result_of(alone, checkpoint), result_of(shared, checkpoint)
    assert (two.scores, two.outcomes) == (one.scores, one.outcomes)
    assert two.settings["processes"] == 2
    folder = model_folder(shared, str(checkpoint))
    answers = Journal(model_folder(alone, str(checkpoint))).answers
    assert Journal(folder).answers.keys() == answers.keys()
    lines = [(folder / f"generations{rank}.jsonl").read_text().count('"key"') for rank in ("", "-1")]
    assert sum(lines) == len(answers)
    assert abs(lines[0] - lines[1]) <= 3  # one more of each benchmark at most
    rescored = ["--rescore", "--model", str(checkpoint), "--save_path", str(shared), "--data_dir", str(data_dir)]
    assert run(main, [*rescored, "--quiet"]) == 0
    files = [EvalResult.load(file) for file in sorted(folder.glob("results_*.json"))]
    assert len(files) == 2
    assert files[0].scores == files[1].scores == one.scores


def test_a_rank_that_dies_ends_the_evaluation(checkpoint: Path, data_dir: Path, tmp_path: Path) -> None:
    """SIGKILL for one of two ranks while they answer: the other ends with one sentence and exit code 1, and what it
    answered is kept."""
    command = ["400" if word == "6" else word for word in flags(checkpoint, data_dir, tmp_path / "out")]
    launch = Launch(tmp_path / "log", 2, "evaluate_model", *command)
    journals = [model_folder(tmp_path / "out", str(checkpoint)) / f"generations{rank}.jsonl" for rank in ("", "-1")]
    launch.until(lambda: all(journal.exists() and b'"key"' in journal.read_bytes() for journal in journals), 200)
    os.kill(launch.processes[1].pid or 0, signal.SIGKILL)
    ended = launch.ended()
    assert [end.code for end in ended] == [1, -signal.SIGKILL]
    (error,) = [line for line in ended[0].err.splitlines() if line.startswith("error: ")]
    assert error.endswith(" died. Answers so far are kept: the same command continues from them.")


def test_hub_models_with_bin_weights_and_a_revision(
    checkpoint: Path, data_dir: Path, tmp_path: Path, run_script: Any
) -> None:
    """`org/tiny` with `.bin` weights scores as its folder; --model_args revision and `@` name the same commit, and one
    that is not there is a sentence."""
    from transformers import AutoModelForCausalLM

    from tests.helpers.hub_server import Repo, running_hub

    shutil.copytree(checkpoint, tmp_path / "published", ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")
    torch.save(model.state_dict(), tmp_path / "published/pytorch_model.bin")
    local = [*flags(tmp_path / "published", data_dir, tmp_path / "local"), "--quiet", "--limit", "2"]
    assert run(main, local) == 0
    expected = result_of(tmp_path / "local", tmp_path / "published")
    code = "import sys; from common.cli import run; from evaluate_model import main\n"
    code += "calls = ' '.join(sys.argv[1:]).split(' NEXT ')\nsys.exit(max(run(main, call.split()) for call in calls))"
    common = [*flags(tmp_path, data_dir, tmp_path / "out")[2:], "--quiet", "--limit", "2"]
    with running_hub() as hub:
        hub.repos["org/tiny"] = Repo(tmp_path / "published", tags=("v1",), large=(".bin",))
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
        by_argument = ["--model", "org/tiny", "--model_args", "revision=v1", *common]
        by_sign = ["--model", "org/tiny@v1", *common]
        done = run_script("-c", code, *by_argument, "NEXT", *by_sign, PYTHONPATH=str(ROOT), **environment)
        assert done.returncode == 0, done.stderr
        assert any(path.endswith("/revision/v1") for _, path in hub.requests)
        lost = ["--model", "org/tiny", "--model_args", "revision=v2", *common]
        missing = run_script("evaluate_model.py", *lost, **environment)
    found = result_of(tmp_path / "out", Path("org/tiny"))
    assert (found.scores, found.outcomes) == (expected.scores, expected.outcomes)
    assert result_of(tmp_path / "out", Path("org/tiny@v1")).scores == found.scores
    assert missing.returncode == 2
    assert "neither a folder nor available from the hub" in missing.stderr
    assert "Traceback" not in missing.stderr


@pytest.mark.parametrize("preset", ["paper", "lm-eval"])
def test_begin_tokens_of_each_preset_reach_the_model(data_dir: Path, tmp_path: Path, preset: str) -> None:
    """With a tokenizer that adds <s>, --preset paper runs MMLU and MBPP without it and GSM8K with it, once;
    --preset lm-eval runs all of them as plain lm-eval does, with it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from eval.harness.evaluation import evaluate
    from eval.settings import Settings
    from tests.eval.harness.test_corrections import plain, with_template

    checkpoint = make_checkpoint(tmp_path / "long", 4096)  # a prompt cut on the left loses its begin token
    tokenizer = with_template(AutoTokenizer.from_pretrained(checkpoint), "<s> $A", [("<s>", 0)])
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32").eval()
    rows: list[list[int]] = []

    def note(module: Any, inputs: Any, options: Any) -> None:
        ids = options["input_ids"] if "input_ids" in options else inputs[0]
        if ids.shape[1] > 1:  # not a step of a generation
            rows.extend(ids.tolist())

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    for benchmark, word in (("mmlu_anatomy", "Which is number"), ("mbpp", "Add."), ("gsm8k", "left?")):
        is_maths = preset == "paper" and benchmark == "gsm8k"
        asked = Settings(
            preset=preset, benchmarks=() if is_maths else (benchmark,), math_benchmarks=("gsm8k",) if is_maths else (),
            data_dir=data_dir, offline=True, dtype="float32", limits={"": 1}, max_gen_toks=2, math_max_tokens=2,
            batch_size="1", quiet=True, allow_code_execution=True,
        )  # fmt: skip
        rows.clear()
        evaluate(model, asked, tokenizer=tokenizer)
        prompts = [row for row in rows if word in tokenizer.decode(row)]  # the others are the probe's
        assert len(prompts) >= 1
        assert all(row.count(0) <= 1 for row in prompts)
        begins = [row[0] == 0 for row in prompts]
        assert set(begins) == {preset == "lm-eval" or is_maths}, benchmark
    assert plain(model, tokenizer).tok_encode("Question") == [
        0,
        *tokenizer.encode("Question", add_special_tokens=False),
    ]


def test_samples_do_not_depend_on_run_or_batch(checkpoint: Path, data_dir: Path, tmp_path: Path) -> None:
    """--n_samples 4 --temperature 0.8: four different draws, the same in a second run and for other batch sizes."""
    drawn = []
    for name, rows in (("a", "auto"), ("b", "auto"), ("c", "1"), ("d", "3"), ("e", "auto:4")):
        options = ["--n_samples", "4", "--temperature", "0.8", "--batch_size", rows, "--quiet", "--benchmarks", ""]
        command = [
            *flags(checkpoint, data_dir, tmp_path / name),
            "--math_benchmarks",
            "gsm8k",
            "--math_max_tokens",
            "12",
        ]
        assert run(main, [*command, *options]) == 0
        drawn.append(Journal(model_folder(tmp_path / name, str(checkpoint))).answers)
    assert all(answers == drawn[0] for answers in drawn)
    assert len(drawn[0]) == 8  # two items stand twice in the data
    assert len(set(drawn[0].values())) == 8


def test_lm_evals_search_for_a_batch_size_changes_no_answer(checkpoint: Path) -> None:
    """auto:4 with lm-eval's own search, as on a GPU: the answers of one row at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from eval.harness.backends.hf import HFModel
    from eval.request_types import Request
    from tests.eval.harness.test_corrections import answers, generate, hf_model

    loaded = (
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32"),
        AutoTokenizer.from_pretrained(checkpoint),
    )
    lm = HFModel(loaded[0], tokenizer=loaded[1], softmax_dtype="float32", uses_detection=True, batch_size="auto:4",
                 max_batch_size=8, max_length=64)  # fmt: skip
    requests = [Request(f"s{i}", "t", i, 0, "score", "word " * (1 + i % 9), " a b") for i in range(20)]
    requests += [generate(f"g{i}", "word " * (1 + i % 5), 5) for i in range(9)]
    found, alone = answers(lm, *requests), answers(hf_model(*loaded, rows=1), *requests)
    assert lm.used()["batch_size_used"]["score"] > 1
    for key, (answer, facts) in found.items():
        expected, expected_facts = alone[key]
        assert facts == expected_facts
        assert answer == (
            expected if isinstance(expected, str) else (pytest.approx(expected[0], abs=1e-4), expected[1])
        )


def test_an_encoder_decoder_model_is_evaluated(
    checkpoint: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tiny T5 runs through lm-eval's model, with results like any other."""
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.save_pretrained(tmp_path / "t5")
    torch.manual_seed(0)
    shape: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    ends = {"decoder_start_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **shape, **ends)).save_pretrained(tmp_path / "t5")
    assert run(main, [*flags(tmp_path / "t5", data_dir, tmp_path / "out"), "--quiet", "--limit", "2"]) == 0
    result = result_of(tmp_path / "out", tmp_path / "t5")
    assert result.scores["mmlu_anatomy"].n == 2
    assert result.settings["batch_size_used"] == {"score": 4, "generate": 7}
