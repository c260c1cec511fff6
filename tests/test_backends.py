"""Other ways to run a model: several processes, lm-eval's own models, a server; the same answers from each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from console.cli import run
from eval.harness.journal import Journal
from eval.results.result import EvalResult
from eval.results.store import model_folder
from evaluate_model import main
from tests.launching import by_accelerate


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
    """Under `accelerate launch` two gloo processes on the CPU each answer half, and one of them reports the scores and
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


def test_each_process_takes_its_share() -> None:
    """Together the processes have every item once, in any number."""
    from eval.harness.ranks import Ranks

    items = list(range(11))
    for count in (1, 2, 5, 20):
        shares: Sequence[list[int]] = [Ranks(rank, count).share(items) for rank in range(count)]
        assert sorted(i for share in shares for i in share) == items
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


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
