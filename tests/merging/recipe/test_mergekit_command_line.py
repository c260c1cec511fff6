"""mergekit's command line: every option of the installed mergekit-yaml is mapped, or answered with what replaces it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.cli import run
from common.errors import UsageError
from merge import main
from merging.recipe.mergekit.command_line import OPTIONS, translate
from tests.helpers.tiny import fine_tune, make_llama, weights

VALUES = {"--save_path", "--method", "--device", "--density", "--models_to_merge", "--config"}


def options_of_mergekit() -> list[tuple[str, bool]]:
    """Each spelling of each option of the installed mergekit-yaml, and whether it takes a value."""
    from mergekit.scripts.run_yaml import main as command

    found = []
    for option in command.params:
        if option.param_type_name == "option":
            takes_value = not option.is_flag and not option.count
            found += [(name, takes_value) for name in (*option.opts, *option.secondary_opts)]
    return found


def test_every_option_of_mergekit_is_known() -> None:
    """Each option of the installed version is in the table with the right number of values, or is a flag of ours."""
    listed = options_of_mergekit()
    assert len(listed) > 30
    for name, takes_value in listed:
        plain = "--" + name[5:] if name.startswith("--no-") and name not in OPTIONS else name
        if plain in ("--device", "--quiet"):
            continue
        assert plain in OPTIONS, name
        assert OPTIONS[plain].takes_value == takes_value, name
        if plain == "--transformers-cache":
            continue  # its own test restores what it changes
        flags, notes = translate([name, *(["7"] if takes_value else [])], VALUES)
        assert not any(argument == name for argument in flags)
        assert all(" has no effect: " in note for note in notes)


@pytest.mark.parametrize(
    ("argv", "flags"),
    [
        (["r.yml", "out"], ["--config", "r.yml", "--save_path", "out"]),
        (["--cuda", "r.yaml", "--lazy-unpickle", "out"],
         ["--config", "r.yaml", "--save_path", "out", "--device", "cuda"]),
        (["r.yml", "out", "--no-cuda"], ["--config", "r.yml", "--save_path", "out", "--device", "cpu"]),
        (["r.yml", "out", "--gpu-rich"], ["--config", "r.yml", "--save_path", "out", "--device", "cuda"]),
        (["--random-seed", "3", "r.yml", "out"], ["--config", "r.yml", "--save_path", "out", "--seed", "3"]),
        (["--random-seed=3", "r.yml"], ["--config", "r.yml", "--seed", "3"]),
        (["r.yml", "out", "--out-shard-size", "1B"],
         ["--config", "r.yml", "--save_path", "out", "--max_shard_size", "1GB"]),
        (["r.yml", "out", "--out_shard_size=500M"],
         ["--config", "r.yml", "--save_path", "out", "--max_shard_size", "500MB"]),
        (["r.yml", "--save_path", "out"], ["--config", "r.yml", "--save_path", "out"]),
        (["r.yml", "out", "--copy-tokenizer", "--write-model-card", "--safe-serialization"],
         ["--config", "r.yml", "--save_path", "out"]),
        (["--method", "ties", "--models_to_merge", "a,b"], ["--method", "ties", "--models_to_merge", "a,b"]),
        (["--models_to_merge", "a", "b"], ["b", "--models_to_merge", "a"]),
    ],
)  # fmt: skip
def test_mapped(argv: list[str], flags: list[str]) -> None:
    """Positions and options with a counterpart become this program's flags, in whatever order they stand."""
    assert translate(argv, VALUES)[0] == flags


@pytest.mark.parametrize(
    ("argv", "note"),
    [
        (["--allow-crimes"], "--allow-crimes has no effect: tensors are matched by name"),
        (["--lora-merge-cache", "x"], "--lora-merge-cache has no effect: adapters are added while tensors are read"),
        (["--trust-remote-code"], "--trust-remote-code has no effect: code in model repositories is never run"),
        (["--no-copy-tokenizer"], "--no-copy-tokenizer has no effect: the tokenizer is always written"),
        (["--low_cpu_memory"], "--low_cpu_memory has no effect: tensors are streamed"),
        (["-j", "8"], "-j has no effect: set OMP_NUM_THREADS"),
        (["-vv"], "-vv has no effect: --debug shows the traceback"),
    ],
)
def test_answered(argv: list[str], note: str) -> None:
    """What has no counterpart is reported with what takes its place, and is no flag any more."""
    flags, notes = translate(argv, VALUES)
    assert flags == []
    assert len(notes) == 1
    assert notes[0].startswith(note)


def test_mistakes() -> None:
    """A missing value, a size that is none, and two outputs are one sentence each."""
    for argv, sentence in (
        (["r.yml", "out", "--random-seed"], "--random-seed needs a value"),
        (["r.yml", "out", "--out-shard-size", "many"], "--out-shard-size 'many' should be"),
        (["r.yml", "out", "--save_path", "x"], "The output is given twice: out and --save_path"),
    ):
        with pytest.raises(UsageError, match=sentence):
            translate(argv, VALUES)


def test_the_hub_s_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """--transformers-cache is the cache of the hub's client for the run."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_CACHE", "before")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "before")
    assert translate(["--transformers-cache", str(tmp_path)], VALUES) == ([], [])
    assert str(tmp_path) == constants.HF_HUB_CACHE


def test_a_command_of_mergekit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A command as mergekit's documentation has it merges to the same weights as --config, and reports its options."""
    base = make_llama(tmp_path / "base", layers=2, hidden=32, vocab=64)
    fine_tune(base, tmp_path / "a", seed=1)
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        f"merge_method: dare_ties\nbase_model: {base}\nmodels: [{{model: {tmp_path / 'a'}}}]\n"
        "parameters: {density: 0.5, weight: 1}\n"
    )
    common = [str(recipe), str(tmp_path / "one"), "--allow-crimes", "--lazy-unpickle", "--copy-tokenizer"]
    assert run(main, [*common, "--random-seed", "5", "--out-shard-size", "1B", "--no-cuda"]) == 0
    assert "--allow-crimes has no effect: tensors are matched by name" in capsys.readouterr().err
    assert run(main, ["--quiet", "--config", str(recipe), "--save_path", str(tmp_path / "two"), "--seed", "5"]) == 0
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in two)
