"""--exclude: tensors that match are those of the base or a named model; the others are merged as without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from common.cli import run
from merge import main
from tests.helpers.tiny import fine_tune, make_llama, make_tokenizer, weights


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and two fine-tuned models, float32."""
    folder = tmp_path_factory.mktemp("exclude")
    base = make_llama(folder / "base", dtype=torch.float32, layers=3, hidden=32, vocab=64)
    return {"base": base, **{name: fine_tune(base, folder / name, seed=i) for i, name in enumerate("ab", 1)}}


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base classifier of two labels, and two fine-tuned ones of three and five."""
    folder = tmp_path_factory.mktemp("classifiers")
    found = {}
    for seed, (name, labels) in enumerate((("base", 2), ("a", 3), ("b", 5))):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_labels=labels, pad_token_id=2, id2label={i: f"{name}{i}" for i in range(labels)},
        )  # fmt: skip
        LlamaForSequenceClassification(config).save_pretrained(folder / name)
        make_tokenizer(folder / name, 64)
        found[name] = folder / name
    return found


def merged(models: dict[str, Path], out: Path, *more: str) -> dict[str, torch.Tensor]:
    """TIES of a and b, in float32."""
    flags = {"base_model": models["base"], "models_to_merge": f"{models['a']},{models['b']}", "save_path": out}
    command = ["--quiet", "--method", "ties", "--dtype", "float32", *(f"--{k}={v}" for k, v in flags.items()), *more]
    assert run(main, command) == 0
    return weights(out)


@pytest.mark.parametrize("owner", ["base", "a", "b"])
def test_excluded_tensors_are_the_owner_s(llamas: dict[str, Path], tmp_path: Path, owner: str) -> None:
    """What matches has the owner's bytes, everything else those of the merge without --exclude; the lock repeats it."""
    plain = merged(llamas, tmp_path / "plain")
    more = [] if owner == "base" else ["--exclude_from", str(llamas[owner])]
    some = merged(llamas, tmp_path / "some", "--exclude", r"lm_head|layers\.1\.mlp", *more)
    own, count = weights(llamas[owner]), 0
    for name, tensor in some.items():
        excluded = "lm_head" in name or "layers.1.mlp" in name
        count += excluded
        assert torch.equal(tensor, own[name] if excluded else plain[name]), name
    assert count == 4
    again = ["--quiet", "--from_lock", str(tmp_path / "some"), "--save_path", str(tmp_path / "again")]
    assert run(main, again) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "some" / "model.safetensors"
    ).read_bytes()


def test_slices(llamas: dict[str, Path], tmp_path: Path) -> None:
    """In slices the name is that in the result, and the tensor that of the owner's layer which lies there."""
    file = tmp_path / "recipe.yml"
    file.write_text(
        f"merge_method: task_arithmetic\nbase_model: {llamas['base']}\ndtype: float32\nexclude: [layers.0.self_attn]\n"
        f"exclude_from: {llamas['a']}\nslices:\n- sources:\n  - {{model: {llamas['base']}, layer_range: [0, 2]}}\n"
        f"  - {{model: {llamas['a']}, layer_range: [1, 3], parameters: {{weight: 1}}}}\n"
    )
    assert run(main, ["--quiet", "--config", str(file), "--save_path", str(tmp_path / "out")]) == 0
    out, a, base = weights(tmp_path / "out"), weights(llamas["a"]), weights(llamas["base"])
    q, up = "model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(out[q.format(0)], a[q.format(1)])
    mine = base[up.format(0)] + (a[up.format(1)] - base[up.format(0)])
    assert (out[up.format(0)] - mine).abs().max() < 1e-6


def test_classifier_heads(classifiers: dict[str, Path], tmp_path: Path) -> None:
    """Heads of different sizes: the named model's head and labels, in a result that transformers loads."""
    out = merged(
        classifiers, tmp_path / "out", "--exclude", r"^score\.", "--exclude_from", str(classifiers["b"])
    )  # fmt: skip
    assert torch.equal(out["score.weight"], weights(classifiers["b"])["score.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {str(i): f"b{i}" for i in range(5)}
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").num_labels == 5
    of_base = merged(classifiers, tmp_path / "base", "--exclude", r"^score\.")
    assert torch.equal(of_base["score.weight"], weights(classifiers["base"])["score.weight"])
    assert all(torch.equal(out[name], of_base[name]) for name in out if name != "score.weight")


def test_a_head_that_only_some_have(llamas: dict[str, Path], classifiers: dict[str, Path], tmp_path: Path) -> None:
    """Of the excluded tensors the result has those of the owner and no others: a classifier from a language model's
    base, and a language model from a base that classifies."""
    folder = tmp_path / "lm"
    make_llama(folder, dtype=torch.float32, layers=2, hidden=32, vocab=64)
    models = {"base": folder, "a": classifiers["a"], "b": classifiers["b"]}
    out = merged(models, tmp_path / "out", "--exclude", "lm_head|score", "--exclude_from", str(models["a"]))
    assert "lm_head.weight" not in out
    assert torch.equal(out["score.weight"], weights(models["a"])["score.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    kept = merged(models, tmp_path / "kept", "--exclude", "lm_head|score")
    assert torch.equal(kept["lm_head.weight"], weights(folder)["lm_head.weight"])
    assert "score.weight" not in kept


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--exclude", "nowhere"], "--exclude 'nowhere' matches no tensor; the first is "),
        (["--exclude", "("], "exclude '(' is no regular expression"),
        (["--exclude_from", "a"], "exclude_from is the source of the excluded tensors: give exclude too."),
        (["--exclude", "lm_head", "--exclude_from", "nobody"], "--exclude_from 'nobody' must be base or one of the"),
    ],
)
def test_mistakes(
    llamas: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:
    """Each mistake is one sentence, and nothing is written."""
    flags = ["--base_model", str(llamas["base"]), "--models_to_merge", str(llamas["a"]), "--save_path"]
    assert run(main, ["--quiet", "--method", "ties", *flags, str(tmp_path / "out"), *more]) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")
    assert not (tmp_path / "out").exists()
