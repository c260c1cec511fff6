"""Real broken inputs: one sentence, exit code 2, before any weight is loaded, with nothing written."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from common.cli import run
from common.errors import BadInputError, EvaluationError
from eval.results.result import EvalResult, Score
from eval.results.store import save
from evaluate_model import main
from tests.helpers.evaluation import write_jsonl


@dataclass
class Place:
    """What a case may break: a copy of the model and of the data, and where results would go."""

    model: Path
    data: Path
    out: Path

    def flags(self) -> list[str]:
        return ["--model", str(self.model), "--data_dir", str(self.data), "--save_path", str(self.out / "results")]


@pytest.fixture
def place(checkpoint: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Copies to break; loading weights fails the test."""
    from eval.harness import models

    monkeypatch.setattr(models, "make_backend", lambda *_: pytest.fail("weights were loaded"))
    shutil.copytree(checkpoint, tmp_path / "model")
    shutil.copytree(data_dir / "hub" / "openai", tmp_path / "data" / "openai")
    return Place(tmp_path / "model", tmp_path / "data", tmp_path)


Break = Callable[[Place], list[str]]
GSM8K = ["--benchmarks", "", "--math_benchmarks", "gsm8k"]


def no_tokenizer(p: Place) -> list[str]:
    for file in p.model.glob("*token*"):
        file.unlink()
    return GSM8K


def broken_tokenizer(p: Place) -> list[str]:
    (p.model / "tokenizer.json").write_text('{"version": "1.0", "model"')
    return GSM8K


def no_weights(p: Place) -> list[str]:
    (p.model / "model.safetensors").unlink()
    return GSM8K


def no_config(p: Place) -> list[str]:
    (p.model / "config.json").unlink()
    return GSM8K


def broken_config(p: Place) -> list[str]:
    (p.model / "config.json").write_text('{"model_type": "llama"')
    return GSM8K


def unknown_architecture(p: Place) -> list[str]:
    (p.model / "config.json").write_text('{"model_type": "no_such_model"}')
    return GSM8K


def broken_record(p: Place) -> list[str]:
    (p.model / "run_record.json").write_text('{"lineage": {"method": "ties"}}')
    return GSM8K


def other_columns(p: Place) -> list[str]:
    for split in ("train", "test"):
        write_jsonl(p.data / f"openai/gsm8k/main/{split}.jsonl", [{"problem": "1+1", "solution": "2"}])
    return GSM8K


def cut_data(p: Place) -> list[str]:
    file = p.data / "openai/gsm8k/main/test.jsonl"
    file.write_text(file.read_text()[:-20])
    return GSM8K


def own_code(p: Place) -> list[str]:
    config = json.loads((p.model / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "configuration.CustomConfig"}}
    (p.model / "config.json").write_text(json.dumps(config))
    (p.model / "configuration.py").write_text("raise SystemExit('code of the model ran')\n")
    return GSM8K


def foreign_adapter(p: Place) -> list[str]:
    from safetensors.torch import save_file

    p.out.joinpath("lora").mkdir()
    names = [f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_{s}.weight" for n in range(2) for s in "AB"]
    save_file({name: torch.zeros(4, 4) for name in names}, p.out / "lora/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "org/other"}
    (p.out / "lora/adapter_config.json").write_text(json.dumps(config))
    return [*GSM8K, "--model", f"{p.model}+{p.out / 'lora'}"]


def adapter_alone(p: Place) -> list[str]:
    return [*foreign_adapter(p)[:-1], str(p.out / "lora")]


def foreign_manifest(p: Place) -> list[str]:
    manifest = {"schema": 1, "sets": {"openai/gsm8k": {"revision": "f" * 40, "files": {}}}}
    (p.data / "benchmarks.json").write_text(json.dumps(manifest))
    return GSM8K


def foreign_journal(p: Place) -> list[str]:
    from eval.results.store import model_folder

    folder = model_folder(p.out / "results", str(p.model))
    folder.mkdir(parents=True)
    (folder / "generations.jsonl").write_text("a,b,c\n1,2,3\n")
    return GSM8K


def rescored(p: Place, change: Callable[[str], str]) -> list[str]:
    settings = {"benchmarks": [], "math_benchmarks": ["gsm8k"], "max_length": 512}
    file = save(EvalResult("m", {"GSM8K": Score("acc", 1.0)}, settings=settings), {}, p.out / "old")
    file.write_text(change(file.read_text()))
    return ["--rescore", str(file)]


CASES: list[tuple[Break, str]] = [
    (no_tokenizer, "has no tokenizer"),
    (broken_tokenizer, "The tokenizer of"),
    (no_weights, "holds no weights"),
    (no_config, "has no config.json"),
    (broken_config, "is not readable JSON"),
    (unknown_architecture, "The configuration of"),
    (broken_record, "is not a run record"),
    (lambda p: [*GSM8K, "--apply_chat_template"], "has no chat template; leave out --apply_chat_template"),
    (lambda p: [*GSM8K, "--max_model_len", "100000"], "more than the 512 positions"),
    (lambda p: [*GSM8K, "--limit", "0"], "--limit must be at least 1, not 0"),
    (lambda p: [*GSM8K, "--limit", "gsm8k=0"], "--limit must be at least 1, not 0"),
    (lambda p: [*GSM8K, "--limit", "some"], "expected a number"),
    (lambda p: ["--benchmarks", "humaneval", "--math_benchmarks", ""], "--allow_code_execution"),
    (other_columns, "is another version of openai/gsm8k"),
    (cut_data, "could not be read as benchmark data"),
    (foreign_manifest, "and this version of the project evaluates on"),
    (lambda p: ["--benchmarks", "mmlu", "--math_benchmarks", ""], "mmlu needs cais/mmlu"),
    (lambda p: [*GSM8K, "--backend", "openai", "--base_url", "http://127.0.0.1:9/v1"], "There is no server at"),
    (lambda p: [*GSM8K, "--include_path", str(p.out / "nothing")], "--include_path"),
    (lambda p: [*GSM8K, "--model_args", "attn_implementatoin=eager"], "Did you mean 'attn_implementation'?"),
    (lambda p: [*GSM8K, "--model_args", "dtype=float32"], "give it as --dtype"),
    (lambda p: [*GSM8K, "--model_args", "eager"], "expected key=value"),
    (lambda p: [*GSM8K, "--model_args", "think_end_token=</nothing>"], "is not in the vocabulary"),
    (lambda p: [*GSM8K, "--model_args", "think_end_token=99999"], "is not in the vocabulary"),
    (lambda p: [*GSM8K, "--model_args", "enable_thinking=true"], "needs think_end_token=TOKEN"),
    (lambda p: [*GSM8K, "--model_args", "autogptq=true"], "needs the package auto_gptq"),
    (lambda p: [*GSM8K, "--gen_kwargs", "top_kk=3"], "Did you mean 'top_k'?"),
    (lambda p: [*GSM8K, "--gen_kwargs", "num_beams=2,temperature=1"], "exclude each other"),
    (lambda p: [*GSM8K, "--backend", "vllm"], "--backend vllm needs a GPU and the package vllm"),
    (lambda p: [*GSM8K, "--device", "mps"], "--device mps is not available"),
    (lambda p: [*GSM8K, "--batch_size", "auto:0"], "--batch_size is auto, auto:N"),
    (lambda p: [*GSM8K, "--system_instruction", "Be \ud800 brief."], "half of a surrogate pair (U+D800"),
    (own_code, "allow it with --model_args trust_remote_code=true"),
    (lambda p: [*GSM8K, "--model", f"{p.model}+{p.out / 'none'}"], "does not exist"),
    (lambda p: [*GSM8K, "--model", f"{p.model}+{p.data}"], "is not an adapter"),
    (foreign_adapter, "does not fit its base"),
    (adapter_alone, "give it with its base as"),
    (foreign_journal, "is not a journal of answers"),
    (lambda p: rescored(p, lambda text: text[: len(text) // 2]), "is not valid JSON"),
    (lambda p: rescored(p, lambda text: text.replace('"schema": 3', '"schema": 7')), "has schema 7"),
    (lambda p: rescored(p, lambda text: '{"results": {}}'), "is not a results file"),
    (lambda p: rescored(p, lambda text: text), "belongs to the results file"),
]


@pytest.mark.parametrize(("broken", "sentence"), CASES, ids=[sentence[:30] for _, sentence in CASES])
def test_broken_inputs(place: Place, broken: Break, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is one line on stderr that says what is wrong, with exit code 2; nothing appears among the results."""
    flags = broken(place)
    before = sorted(place.out.rglob("*"))
    capsys.readouterr()
    assert run(main, [*place.flags(), *flags, "--quiet"]) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert len(shown.err.splitlines()) == 1
    assert shown.err.startswith("error: ")
    assert shown.out == ""
    assert sorted(place.out.rglob("*")) == before


def test_tables_refuse_broken_results_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """make_tables.py refuses a results file of a later schema, with exit code 2."""
    from scripts import make_tables

    file = save(EvalResult("m", {"MMLU": Score("acc", 1.0)}), {}, tmp_path)
    text = file.read_text()
    file.write_text(text.replace('"schema": 3', '"schema": 4'))
    assert run(make_tables.main, [str(file)]) == 2
    assert "has schema 4, and this version reads 1, 2 and 3" in capsys.readouterr().err


def _samples(folder: Path, line: str) -> None:
    from eval.results.samples import answers_of, sample_files

    files = sample_files([folder])
    result = EvalResult.load(next(folder.rglob("results_*.json")))
    next(folder.rglob("samples_*.jsonl")).write_text(line)
    for paths in files.values():
        answers_of(result, paths, lambda _: None)


def _results(folder: Path, text: str) -> None:
    file = next(folder.rglob("results_*.json"))
    file.write_text(text)
    EvalResult.load(file)


def _changed(folder: Path, key: str, value: object) -> None:
    content = json.loads(next(folder.rglob("results_*.json")).read_text())
    content["aim"][key] = value
    _results(folder, json.dumps(content))


def _journal(folder: Path, text: str) -> None:
    from eval.harness.journal import Journal

    (folder / "generations.jsonl").write_text(text)
    Journal(folder)


def _card(folder: Path, text: str) -> None:
    from eval.report.card import update_card
    from eval.report.report import make_report
    from eval.results.reader import load
    from eval.stats.gains import Measure

    models = load([folder], {}, lambda _: None)
    (folder / "README.md").write_text(text)
    update_card(folder, "m", make_report(models, Measure(), lambda _: None))


def _fifo(folder: Path, pattern: str) -> None:
    file = next(folder.rglob(pattern))
    file.unlink()
    os.mkfifo(file)
    (EvalResult.load if file.suffix == ".json" else lambda f: _samples_of(f))(file)  # type: ignore[operator]


def _samples_of(file: Path) -> None:
    from eval.harness.rescore import _samples as read

    read(file)


BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
ODD_INDEX = "model-index:\n- name: m\n  results:\n  - dataset: {type: [a]}\n    metrics: [{type: acc}]\n"
HOSTILE: list[tuple[str, Callable[[Path], None], str]] = [
    ("results: deep", lambda f: _results(f, '{"a":' * 100_000), "nested more than 64 levels"),
    ("results: duplicate key", lambda f: _results(f, '{"aim": 1, "aim": 2}'), "is in it twice"),
    ("results: FIFO", lambda f: _fifo(f, "results_*.json"), "is a FIFO"),
    ("results: odd model", lambda f: _changed(f, "model", ["m"]), "model must be text"),
    ("results: odd settings", lambda f: _changed(f, "settings", [1]), "settings must be an object"),
    ("results: odd lineage", lambda f: _changed(f, "lineage", {"method": 1}), "lineage.method must be text"),
    (
        "results: odd error",
        lambda f: _changed(f, "scores", {"a": {"metric": "m", "value": 1, "stderr": "x"}}),
        "no number",
    ),
    (
        "results: odd outcomes",
        lambda f: _changed(f, "outcomes", {"a": {"t": {"items": [[]], "docs": [""], "verdicts": {}}}}),
        "other things than numbers",
    ),
    ("samples: deep", lambda f: _samples(f, '{"a":' * 100_000), "nested more than 64 levels"),
    ("samples: odd", lambda f: _samples(f, '{"task": 1}'), "task must be text"),
    ("samples: a list", lambda f: _samples(f, "[]"), "must be an object"),
    ("rescoring: FIFO", lambda f: _fifo(f, "samples_*.jsonl"), "is a FIFO"),
    ("journal: without an end", lambda f: _journal(f, "x" * (17 << 20)), "has more than"),
    ("journal: deep", lambda f: _journal(f, "[" * 100_000 + "\n"), "nested more than 64 levels"),
    ("card: bomb", lambda f: _card(f, f"---\n{BOMB}---\n"), "stands for more than"),
    ("card: duplicate key", lambda f: _card(f, "---\na: 1\na: 2\n---\n"), "the key 'a' twice"),
    ("card: without an end", lambda f: _card(f, "\n" * (2 << 20)), "bytes, and at most"),
    ("card: odd index", lambda f: _card(f, f"---\n{ODD_INDEX}---\n"), "dataset.type must be text"),
]


@pytest.mark.parametrize(("read", "sentence"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_hostile_files_of_an_evaluation(read: Callable[[Path], None], sentence: str, tmp_path: Path) -> None:
    """Results, samples, journals and cards that were made to hang, fill the memory or have odd types: one sentence."""
    score = {"GSM8K": Score("acc", 1.0)}
    sample = {"task": "gsm8k", "doc_id": 0, "doc_hash": "0", "arguments": [], "resps": [], "filter": "none"}
    save(EvalResult("m", score, settings={"max_length": 512}), {"gsm8k": [sample]}, tmp_path)
    started = time.monotonic()
    with pytest.raises(BadInputError, match=sentence) as refused:
        read(tmp_path)
    assert time.monotonic() - started < 10  # it is a watchdog: a hang would last for ever
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than"),
        ("{{ 'x' * 2000000000 }}", "memory"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_hostile_chat_templates(
    template: str, sentence: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chat template without an end, one that takes gigabytes, and one that fails: one sentence."""
    from transformers import AutoTokenizer

    from eval.harness.corrections.chat_template import render

    monkeypatch.setattr("eval.harness.corrections.chat_template.TEMPLATE_SECONDS", 0.5)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    tokenizer.chat_template = template
    with pytest.raises(EvaluationError, match=sentence):
        render(tokenizer, [{"role": "user", "content": "Hello"}], True, {}, lambda _: None)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"target_modules": "(.*.*.*.*.*.*.*.*.*)*x"}, "target_modules"),
        ({"rank_pattern": {"((((a{99}){99}){99}){99})": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q": "x"}}, "alpha_pattern.q must be a number"),
        ({"peft_type": 3}, "peft_type must be text"),
    ],
)
def test_hostile_adapters_of_an_evaluation(change: dict[str, object], sentence: str, place: Place) -> None:
    """Regular expressions without an end and odd types are refused before peft reads them, naming the key."""
    from transformers import AutoConfig

    from eval.harness.backends.adapter import check_adapter

    foreign_adapter(place)
    file = place.out / "lora" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    config = AutoConfig.from_pretrained(place.model, trust_remote_code=False)
    started = time.monotonic()
    with pytest.raises(BadInputError, match=sentence):
        check_adapter(config, place.out / "lora", "base+lora")
    assert time.monotonic() - started < 30
