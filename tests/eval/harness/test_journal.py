"""Nothing is lost: answers are kept as they come, found again by their key, and graded again without a model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from common.cli import run
from common.errors import BadInputError, UsageError
from eval.harness.journal import Journal
from eval.progress import Progress
from eval.request_types import Facts, Request, key_of
from eval.results.result import EvalResult
from eval.results.store import model_folder
from eval.settings import Settings
from evaluate_model import main
from tests.helpers.evaluation import ROOT, write_jsonl

REQUEST = Request("k", "task", 3, 0, "generate", "a prompt")


def test_answers_survive_as_they_are(tmp_path: Path) -> None:
    """Texts of any characters and exact floats come back from disk; files of several processes count together."""
    texts = ["", "é\u2028 \x00 𝕏", 'quote " and \\ and \n', "\ud800"]
    scores = [(-1.2345678901234567, True), (0.1 + 0.2, False)]
    with Journal(tmp_path) as first, Journal(tmp_path, rank=1) as second:
        first.begin({"model": "m"})
        for i, text in enumerate(texts):
            first.add(replace(REQUEST, key=f"t{i}"), text)
        for i, score in enumerate(scores):
            second.add(replace(REQUEST, key=f"s{i}"), score)
    assert {f.name for f in tmp_path.iterdir()} == {"generations.jsonl", "generations-1.jsonl"}
    found = Journal(tmp_path).answers
    assert [found[f"t{i}"] for i in range(4)] == texts
    assert [found[f"s{i}"] for i in range(2)] == scores


def test_the_newest_answer_counts(tmp_path: Path) -> None:
    """Of answers to one request in the files of several processes the one written last counts, with its facts,
    whichever file holds it; a run that forgets earlier answers keeps its own."""
    with Journal(tmp_path, rank=1) as old, Journal(tmp_path) as new:
        old.add(REQUEST, "old", facts=Facts(1, "stop", False))
        time.sleep(0.002)
        new.add(REQUEST, "new", facts=Facts(9, "length", True))
    found = Journal(tmp_path)
    assert (found.answers["k"], found.facts["k"]) == ("new", Facts(9, "length", True))
    time.sleep(0.002)
    with Journal(tmp_path) as again:
        again.forget()
        again.add(REQUEST, "newest")
        again.reread()
        assert again.answers["k"] == "newest"
    assert Journal(tmp_path).answers["k"] == "newest"


def test_spellings_of_a_path_are_one_model(
    checkpoint: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`./m`, `m`, `m/`, `x/../m` and the absolute path have one folder of results, which is not hidden, and one
    journal; samples say how each answer ended."""
    from eval.harness.evaluation import evaluate, evaluate_with_samples

    shutil.copytree(checkpoint, tmp_path / "m")
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    asked = replace(settings, benchmarks=())
    first, samples = evaluate_with_samples("./m", asked, save_path=tmp_path / "out")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["m"]
    for spelling in ("m", "m/", "x/../m", str(tmp_path / "m")):
        again = evaluate(spelling, asked, save_path=tmp_path / "out")
        assert (again.model, again.settings["answers"]["new"]) == (first.model, 0)
    for sample in samples["gsm8k_paper"]:
        assert sample["finish"][0][0] in ("stop", "length")
        assert 0 < sample["tokens"][0][0] <= 8
        assert sample["prompt_truncated"] == [[False]]


def test_answers_of_an_older_format_are_reported_and_not_used(
    checkpoint: Path, settings: Settings, tmp_path: Path
) -> None:
    """Lines with keys of another scheme and without facts are no answers to this run, which says so; broken and
    unknown lines change nothing."""
    from eval.harness.evaluation import evaluate

    asked = replace(settings, benchmarks=())
    expected = evaluate(str(checkpoint), asked, save_path=tmp_path / "new")
    folder = model_folder(tmp_path / "old", str(checkpoint))
    folder.mkdir(parents=True)
    lines = [{"run": {"model": "tiny"}}, *({"key": f"{i:032x}", "task": "gsm8k_paper", "item": i, "n": 0, "of": "GSM8K",
             "s": 1.0, "answer": "#### 2"} for i in range(4)), {"key": "no answer"}, {"unknown": 1}]  # fmt: skip
    write_jsonl(folder / "generations.jsonl", lines)
    found = evaluate(str(checkpoint), asked, save_path=tmp_path / "old")
    assert (found.scores, found.outcomes) == (expected.scores, expected.outcomes)
    assert found.settings["answers"] == expected.settings["answers"]
    assert any("The journal holds 2 answers to these items from another" in r for r in found.settings["remarks"])


def test_a_line_cut_short_is_skipped_and_ended(tmp_path: Path) -> None:
    """A file cut at any byte gives the whole lines before the cut, and what is added then is found."""
    with Journal(tmp_path) as journal:
        for i in range(3):
            journal.add(replace(REQUEST, key=f"k{i}"), f"answer {i}")
    whole = (tmp_path / "generations.jsonl").read_bytes()
    for cut in range(len(whole)):
        (tmp_path / "generations.jsonl").write_bytes(whole[:cut])
        with Journal(tmp_path) as journal:
            ended = whole[:cut].count(b"\n")
            assert ended <= len(journal.answers) <= ended + 1  # a line without its newline may be whole
            journal.add(replace(REQUEST, key="new"), "later")
        assert Journal(tmp_path).answers["new"] == "later"
    (tmp_path / "generations.jsonl").write_text("key,answer\n")
    with pytest.raises(BadInputError, match="is not a journal of answers"):
        Journal(tmp_path)


def test_a_key_changes_with_all_it_stands_for() -> None:
    """Model, task, version, item, kind, prompt and settings each make another key; none is mistaken for another."""
    parts = ["scope", "task", 1.0, "doc", "generate", ["prompt"], {"until": ["x"], "max_tokens": 8}]
    others = ["scope2", "task2", 2.0, "doc2", "score", ["prompt2"], {"until": ["x"], "max_tokens": 9}]
    keys = {key_of(*parts)}
    for i, other in enumerate(others):
        keys.add(key_of(*parts[:i], other, *parts[i + 1 :]))
    assert len(keys) == len(parts) + 1
    assert key_of(*parts) == key_of(*parts)


def test_the_time_left_follows_from_the_rate(capsys: pytest.CaptureFixture[str]) -> None:
    """10 of 40 equal new answers in 60 s leave 180 s; 10 that are half of the work leave 60 s; answers known before do
    not count towards the rate."""
    for work, left in ((1, "3 min"), (3, "60 s")):
        progress = Progress("HumanEval", total=50, n_known=10, show=False, ahead=10 * work + 30)
        for _ in range(10):
            progress.one(work)
        assert progress.line(60.0) == f"HumanEval: 20 of 50, 60 s so far, about {left} left"
    progress.close()
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def settings(data_dir: Path) -> Settings:
    """GSM8K and a subject of MMLU, short answers, float32, quiet."""
    return Settings(
        benchmarks=("mmlu_anatomy",), math_benchmarks=("gsm8k",), data_dir=data_dir, offline=True, dtype="float32",
        device="cpu", math_max_tokens=8, limits={"": 2}, quiet=True,
    )  # fmt: skip


def test_what_is_known_is_not_asked_again(
    checkpoint: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run loads no model and scores the same; another batch size changes nothing, other lengths ask again,
    --no_cache asks for all, and changed weights are another model."""
    from eval.harness import evaluation as harness
    from eval.harness import models

    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    out = tmp_path / "out"

    def answers(changed: Settings) -> dict[str, int]:
        result = harness.evaluate(str(model), changed, save_path=out)
        return result.settings["answers"]

    first = harness.evaluate(str(model), settings, save_path=out)
    total = first.settings["answers"]["new"]
    assert first.settings["answers"]["from the journal"] == 0
    with monkeypatch.context() as without:
        without.setattr(models, "make_backend", lambda *_: pytest.fail("a model was loaded"))
        again = harness.evaluate(str(model), settings, save_path=out)
        assert answers(replace(settings, batch_size="2")) == {"from the journal": total, "new": 0}
    assert (again.scores, again.outcomes) == (first.scores, first.outcomes)
    assert again.settings["prompts_sha256"] == first.settings["prompts_sha256"]
    assert answers(replace(settings, math_max_tokens=9)) == {"from the journal": total - 2, "new": 2}
    assert answers(replace(settings, no_cache=True)) == {"from the journal": 0, "new": total}
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1.0
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    changed = harness.evaluate(str(model), settings, save_path=out)
    (reported,) = [r for r in changed.settings["remarks"] if "The journal holds" in r]
    assert f"holds {total} answers to these items" in reported
    assert not [r for r in again.settings["remarks"] if "The journal holds" in r]
    assert changed.digest != first.digest
    assert changed.settings["answers"]["new"] == total


SLOW_DATA = 240


def test_killed_runs_go_on_to_the_same_scores(checkpoint: Path, data_dir: Path, tmp_path: Path) -> None:
    """A run killed in the middle, and killed again, ends with every answer of a run that was left alone; nothing that
    was answered is asked twice."""
    data = tmp_path / "data"
    rows = [{"question": f"What is {i} plus {i % 7}?", "answer": f"#### {i + i % 7}"} for i in range(SLOW_DATA)]
    write_jsonl(data / "openai/gsm8k/main/test.jsonl", rows)
    flags = ["--model", str(checkpoint), "--data_dir", str(data), "--benchmarks", "", "--math_benchmarks", "gsm8k"]
    flags += ["--math_max_tokens", "16", "--dtype", "float32", "--quiet", "--save_path"]
    killed = [*flags, str(tmp_path / "killed"), "--batch_size", "2"]

    def folder(name: str) -> Path:
        return model_folder(tmp_path / name, str(checkpoint))

    def lines(name: str) -> list[bytes]:
        file = folder(name) / "generations.jsonl"
        return file.read_bytes().splitlines(keepends=True) if file.exists() else []

    for stop in (signal.SIGKILL, signal.SIGINT):
        least = len(lines("killed")) + 8  # answers of this run, so that the signal does not meet its imports
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background inherit "ignored"
        process = subprocess.Popen([sys.executable, "evaluate_model.py", *killed], cwd=ROOT, stderr=subprocess.PIPE)
        signal.signal(signal.SIGINT, handler)
        try:
            _until(lambda least=least: len(lines("killed")) > least, process)
            process.send_signal(stop)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == (-signal.SIGKILL if stop == signal.SIGKILL else 130)
        assert error.decode().strip() in ("", "error: Interrupted.")
    before = len(lines("killed"))
    assert before < SLOW_DATA
    results = {}
    for name in ("killed", "alone"):
        assert run(main, [*flags, str(tmp_path / name)]) == 0
        (file,) = folder(name).glob("results_*.json")
        results[name] = EvalResult.load(file)
        keys = [json.loads(line)["key"] for line in lines(name) if line.startswith(b'{"key"') and line.endswith(b"}\n")]
        assert len(keys) == len(set(keys)) == SLOW_DATA
    assert results["killed"].outcomes == results["alone"].outcomes
    assert results["killed"].scores == results["alone"].scores
    assert results["killed"].settings["answers"]["from the journal"] >= 16
    assert Journal(folder("killed")).answers == Journal(folder("alone")).answers


def _until(true: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait until something is true of a running process's files."""
    while not true():
        assert process.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.02)


WITHOUT_TORCH = """
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        gone = name.split(".")[0] in ("torch", "transformers", "vllm", "accelerate")
        return None if gone else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
from common.cli import run
from evaluate_model import main
sys.exit(run(main, sys.argv[1:]))
"""


def test_answers_are_graded_again_without_torch_or_model(
    checkpoint: Path, data_dir: Path, settings: Settings, tmp_path: Path
) -> None:
    """--rescore gives the same scores and outcomes, in a process where torch and transformers cannot be imported and
    with the model gone; the new file says where its answers are from."""
    from eval.harness.evaluation import evaluate

    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    asked = replace(
        settings, benchmarks=("mmlu_anatomy", "mbpp"), math_benchmarks=("math", "gsm8k"), allow_code_execution=True
    )
    first = evaluate(str(model), replace(asked, max_gen_toks=8), save_path=tmp_path)
    shutil.rmtree(model)
    (old,) = model_folder(tmp_path, str(model)).glob("results_*.json")
    flags = ["--rescore", "--model", str(model), "--save_path", str(tmp_path), "--allow_code_execution"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *flags], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    (new,) = set(model_folder(tmp_path, str(model)).glob("results_*.json")) - {old}
    again = EvalResult.load(new)
    assert (again.scores, again.outcomes, again.digest) == (first.scores, first.outcomes, first.digest)
    assert again.settings["rescored_from"] == old.name
    facts = [
        [{k: s[k] for k in ("tokens", "finish", "prompt_truncated")} for s in map(json.loads, f.open(encoding="utf-8"))]
        for f in sorted(old.parent.glob("samples_gsm8k*"))
    ]
    assert len(facts) == 2
    assert facts[0] == facts[1]
    assert again.settings["prompts_sha256"] == first.settings["prompts_sha256"]


def test_another_grader_needs_no_model_but_the_same_data(
    checkpoint: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grader that accepts everything makes rescored answers right; changed items and lost samples are refused."""
    from eval.harness.evaluation import evaluate
    from eval.harness.rescore import rescore, source_of
    from eval.tasks.scoring import GRADER

    asked = replace(settings, benchmarks=())
    first = evaluate(str(checkpoint), asked, save_path=tmp_path)
    assert first.scores["GSM8K"].value < 100
    source = source_of(Path(), str(checkpoint), tmp_path)
    with monkeypatch.context() as lenient:
        lenient.setattr(GRADER, "matches", lambda answer, gold: True)
        result, _ = rescore(source)
        assert result.scores["GSM8K"].value == 100
    rows = [{"question": "Another one?", "answer": "#### 2"}] * 4
    write_jsonl(tmp_path / "other/openai/gsm8k/main/test.jsonl", rows)
    with pytest.raises(BadInputError, match="of another version"):
        rescore(source, data_dir=tmp_path / "other")
    with pytest.raises(UsageError, match="there are no results of"):
        source_of(Path(), "nobody", tmp_path)
    next(source.parent.glob("samples_gsm8k*")).unlink()
    with pytest.raises(BadInputError, match="belongs to the results file"):
        rescore(source)


def test_the_time_of_all_runs_is_kept(tmp_path: Path) -> None:
    """Two runs of one process add up, as far as each came; processes side by side do not."""
    for run_ in ((0.5, 2.0), (1.0, 4.0)):
        with Journal(tmp_path) as journal, Journal(tmp_path, rank=1) as other:
            journal.begin({})
            other.begin({})
            for i, seconds in enumerate(run_):
                journal.add(replace(REQUEST, key=f"{run_}{i}"), "a", "MMLU", seconds)
                other.add(replace(REQUEST, key=f"{run_}{i}o"), "a", "MMLU", seconds - 0.5)
    assert Journal(tmp_path).spent == {"MMLU": 6.0}
