"""--push_to_hub on both scripts, against the loopback hub, and the closing line that says what can be done next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import merge
import performAIM
from common.cli import run
from tests.helpers.hub_server import Hub, running_hub
from tests.helpers.tiny import train, weights


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that one token may write to, with weights over Git LFS as on the real one."""
    from huggingface_hub import constants

    with running_hub() as started:
        started.tokens = {"writer": 200, "reader": 403}
        started.large = (".safetensors",)
        monkeypatch.setattr(constants, "ENDPOINT", started.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "writer")
        yield started


def merging(family: dict[str, Path], out: Path, *more: object) -> int:
    """TIES of a and b."""
    flags = ["--method", "ties", "--base_model", family["base"], "--models_to_merge", f"{family['a']},{family['b']}"]
    return run(merge.main, list(map(str, [*flags, "--save_path", out, *more])))


def relaxing(family: dict[str, Path], out: Path, *more: object) -> int:
    """A relaxation of a."""
    flags = ["--merged_model", family["a"], "--pretrained_model_name", family["base"], "--calibration", family["text"],
             "--block_size", 64, "--n_samples", 8]  # fmt: skip
    return run(performAIM.main, list(map(str, [*flags, "--save_path", out, *more])))


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a result."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_a_merge(hub: Hub, family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A merge arrives whole and byte for byte, weights over LFS, in a repository that is private where asked for; its
    address and what can be done next are printed; a public repository is not taken for a private one."""
    assert merging(family, tmp_path / "out", "--push_to_hub", "org/merged", "--private") == 0
    assert hub.pushed["org/merged"] == files(tmp_path / "out")
    assert hub.public == set()
    assert len(hub.objects) == 1
    said = capsys.readouterr().err
    assert f"Pushed to {hub.url}/org/merged." in said
    assert f"`AutoModelForCausalLM.from_pretrained('{tmp_path / 'out'}')` in transformers" in said
    assert f"`vllm serve {tmp_path / 'out'}`" in said
    assert f"`python convert_hf_to_gguf.py {tmp_path / 'out'}` of llama.cpp" in said
    assert "`hf upload" not in said
    assert merging(family, tmp_path / "two", "--push_to_hub", "org/public") == 0
    assert hub.public == {"org/public"}
    assert merging(family, tmp_path / "three", "--push_to_hub", "org/public", "--private") == 1
    assert "org/public exists and is public" in capsys.readouterr().err
    assert weights(tmp_path / "three")


def test_several_omegas(hub: Hub, family: dict[str, Path], tmp_path: Path) -> None:
    """Each omega has a repository of its own, NAME-omega-X, so that each loads from its root."""
    assert relaxing(family, tmp_path / "out", "--omega", "0.2,0.6", "--push_to_hub", "org/aim", "--quiet") == 0
    assert sorted(hub.pushed) == ["org/aim-omega-0.2", "org/aim-omega-0.6"]
    for omega in ("omega-0.2", "omega-0.6"):
        assert hub.pushed[f"org/aim-{omega}"] == files(tmp_path / "out" / omega)
    again = ["--from_lock", str(tmp_path / "out" / "omega-0.6"), "--save_path", str(tmp_path / "again"), "--quiet"]
    assert run(performAIM.main, [*again, "--push_to_hub", "org/again"]) == 0
    assert hub.pushed["org/again"] == files(tmp_path / "again")


def test_a_push_that_fails(
    hub: Hub, family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The result is kept, and the sentence has the command that uploads what is left; before the run a name that is
    none, a missing token and --private alone are refused, and nothing is made."""
    hub.uploads_refused = {"org/sweep-omega-0.6": 500}
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    out = tmp_path / "out"
    assert relaxing(family, out, "--omega", "0.2,0.6", "--push_to_hub", "org/sweep", "--private") == 1
    said = capsys.readouterr().err
    command = f"hf upload org/sweep-omega-0.6 {out / 'omega-0.6'} --private"
    assert f"The result is kept in {out}; upload it by `{command}`." in said
    assert hub.pushed["org/sweep-omega-0.2"] == files(out / "omega-0.2")
    assert weights(out / "omega-0.6")
    monkeypatch.setenv("HF_TOKEN", "reader")
    assert merging(family, tmp_path / "denied", "--push_to_hub", "org/denied") == 1
    said = capsys.readouterr().err
    assert "may not write to org/denied (403)" in said
    assert f"`hf upload org/denied {tmp_path / 'denied'}`" in said
    monkeypatch.setenv("HF_TOKEN", "")
    for more, sentence in (
        (["--push_to_hub", "org/x"], "needs a token that may write: run `hf auth login`"),
        (["--push_to_hub", "x"], "--push_to_hub must be ORG/NAME, found 'x'"),
        (["--private"], "--private goes with --push_to_hub"),
    ):
        for made in (merging, relaxing):
            assert made(family, tmp_path / "none", *more) == 2
            assert sentence in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert merging(family, tmp_path / "none", "--push_to_hub", "org/x", "--dry_run") == 0


def test_closing_line(family: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a push the line has the upload; of an adapter it has PEFT's and vLLM's ways to load one; --quiet has
    no line."""
    assert merging(family, tmp_path / "out") == 0
    assert f"`hf upload ORG/NAME {tmp_path / 'out'}`." in capsys.readouterr().err
    train(family["base"], tmp_path / "lora")
    model = f"{family['base']}+{tmp_path / 'lora'}"
    flags = ["--merged_model", model, "--pretrained_model_name", family["base"], "--save_as", "adapter"]
    settings = [
        "--calibration",
        family["text"],
        "--block_size",
        64,
        "--n_samples",
        8,
        "--save_path",
        tmp_path / "lora2",
    ]
    assert run(performAIM.main, list(map(str, [*flags, *settings, "--save_path", tmp_path / "lora2"]))) == 0
    said = capsys.readouterr().err
    assert f"`PeftModel.from_pretrained(base, '{tmp_path / 'lora2'}')` in PEFT" in said
    assert f"--lora-modules merged={tmp_path / 'lora2'}`" in said
    assert merging(family, tmp_path / "quiet", "--quiet") == 0
    assert "Next" not in capsys.readouterr().err
