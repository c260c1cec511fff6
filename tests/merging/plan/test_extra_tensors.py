"""Parts that not every input has: multi-token prediction, vision towers beside text models; ties in two places."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from aim.calibration.config import Calibration
from aim.config import AimConfig
from aim.measure import Settings
from aim.pipeline import plan_relaxation
from common.errors import CheckpointError
from merging.pipeline import merge
from merging.plan.merge_plan import OutputConfig
from merging.planning import plan_merge
from merging.recipe import make_recipe
from tests.helpers.architectures import ARCHITECTURES, Architecture, fine_tuned, load, save
from tests.helpers.tiny import weights
from tests.merging.plan.test_layer_kinds import FAMILIES

MTP = {
    "behind": {f"model.layers.5.{name}": (16, 32) for name in ("eh_proj.weight", "shared_head.norm.weight")},
    "apart": {"mtp.fc.weight": (16, 32), "mtp.layers.0.mlp.up_proj.weight": (24, 16)},
}
"""Parts of a model that predict further tokens: in a layer behind the others, and under a name of their own."""


def with_part(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """The model with more tensors and other values in its config."""
    save_file({**weights(folder), **tensors}, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return folder


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Make a base and a tuned model, each with and without a part that predicts, once for each kind of part."""
    folder, made = tmp_path_factory.mktemp("mtp"), {}

    def get(kind: str) -> dict[str, Path]:
        if kind not in made:
            architecture = FAMILIES["deepseek" if kind == "behind" else "qwen3_next"]
            model = architecture.build()
            tuned = fine_tuned(model, 1)
            key = "num_nextn_predict_layers"
            made[kind] = {}
            for name, one, seed in (("base", model, 1), ("tuned", tuned, 2)):
                made[kind][name] = save(one, folder / f"{kind}-{name}")
                generator = torch.Generator().manual_seed(seed)
                part = {n: torch.randn(shape, generator=generator) for n, shape in MTP[kind].items()}
                made[kind][f"{name}+"] = with_part(save(one, folder / f"{kind}-{name}-part"), part, **{key: 1})
        return made[kind]

    return get


def recipe_of(base: Path, *others: Path, **more: Any) -> Any:
    """Task arithmetic of several models."""
    flags = {"method": "task_arithmetic", "base_model": str(base), "models_to_merge": ",".join(map(str, others))}
    return make_recipe({**flags, "dtype": "float32", **more}, {})


@pytest.mark.parametrize("kind", MTP)
@pytest.mark.parametrize("rule", [None, "keep", "drop", "error"])
def test_a_part_of_the_base_alone(family, tmp_path: Path, kind: str, rule: str | None, capsys) -> None:
    """The base predicts further tokens and the model does not: the rest is merged, the part is the base's or dropped,
    the config has as many layers for it as the tensors; `error` stops."""
    models = family(kind)
    recipe = recipe_of(models["base+"], models["tuned"], **({"extra_tensors": rule} if rule else {}))
    if rule == "error":
        with pytest.raises(CheckpointError, match=f"has no tensor {next(iter(MTP[kind]))}"):
            merge(recipe, OutputConfig(tmp_path / "out"))
        return
    merge(recipe, OutputConfig(tmp_path / "out"))
    assert "--extra_tensors" in capsys.readouterr().err
    merged, base = weights(tmp_path / "out"), weights(models["base+"])
    plain = merge(recipe_of(models["base"], models["tuned"]), OutputConfig(tmp_path / "plain"))
    kept = {} if rule == "drop" else {name: base[name] for name in MTP[kind]}
    expected = {**weights(plain), **kept}
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in merged)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == (0 if rule == "drop" else 1)


@pytest.mark.parametrize("kind", MTP)
def test_a_part_of_a_model_alone(family, tmp_path: Path, kind: str) -> None:
    """The model predicts and the base does not: the part is left out, with a sentence; both have it: it is merged."""
    models = family(kind)
    plan = plan_merge(recipe_of(models["base"], models["tuned+"]), OutputConfig(tmp_path / "out"))
    assert any("left out (--extra_tensors)" in note for note in plan.notes)
    assert not {tensor.name for tensor in plan.model.tensors} & MTP[kind].keys()
    merge(recipe_of(models["base+"], models["tuned+"]), OutputConfig(tmp_path / "both"))
    merged, tuned = weights(tmp_path / "both"), weights(models["tuned+"])
    assert all(torch.allclose(merged[name], tuned[name], atol=1e-6) for name in MTP[kind])


@pytest.mark.parametrize("kind", MTP)
@pytest.mark.parametrize("rule", [None, "drop"])
def test_a_part_and_slices(family, tmp_path: Path, kind: str, rule: str | None) -> None:
    """Slices take no part that predicts: it is copied behind the result's layers, or dropped."""
    models, layers = family(kind), (0, 2, 4)
    slices = [{"sources": [{"model": str(models["base+"]), "layer_range": [i, i + 1]}]} for i in layers]
    more = {"extra_tensors": rule} if rule else {}
    merge(
        make_recipe({}, {"merge_method": "passthrough", "slices": slices, "dtype": "float32", **more}),
        OutputConfig(tmp_path / "out"),
    )
    merged, base = weights(tmp_path / "out"), weights(models["base+"])
    found = {name: tensor for name, tensor in merged.items() if name.startswith(("mtp.", "model.layers.3."))}
    renamed = {name.replace("model.layers.5.", "model.layers.3."): base[name] for name in MTP[kind]}
    expected = {} if rule == "drop" else renamed
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (3, 0 if rule == "drop" else 1)


@pytest.mark.parametrize(("merged", "base"), [("tuned+", "base"), ("tuned", "base+"), ("tuned+", "base+")])
def test_a_part_and_aim(family, tmp_path: Path, merged: str, base: str) -> None:
    """A relaxation keeps the part of the merged model as it is, and does not ask the base for it."""
    models = family("behind")
    (tmp_path / "x.txt").write_text("w3")
    aim = AimConfig((0.4,), Settings(Calibration(str(tmp_path / "x.txt")), importance_file=tmp_path / "imp"))
    plan = plan_relaxation(str(models[merged]), str(models[base]), aim, OutputConfig(tmp_path / "out"), None)
    part = [tensor for tensor in plan.model.tensors if tensor.name in MTP["behind"]]
    assert bool(part) is (merged == "tuned+")
    assert all(tensor.is_merged is (base == "base+") for tensor in part)


def test_other_tensors_need_the_flag(family, tmp_path: Path) -> None:
    """A value head of one model is refused with the flag's name, and left out with it."""
    models = family("behind")
    folder = tmp_path / "head"
    folder.mkdir()
    for file in models["tuned"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with_part(folder, {"v_head.summary.weight": torch.ones(1, 16)})
    with pytest.raises(CheckpointError, match=r"v_head\.summary\.weight.*--extra_tensors"):
        plan_merge(recipe_of(models["base"], folder), OutputConfig(tmp_path / "out"))
    plan = plan_merge(recipe_of(models["base"], folder, extra_tensors="keep"), OutputConfig(tmp_path / "out"))
    assert plan.model.left_out[str(folder)] == ("v_head.summary.weight",)


# vision-language models

MODES = {"llava": ("LlamaForCausalLM", "LlamaConfig"), "gemma3_vision": ("Gemma3ForCausalLM", "Gemma3TextConfig")}


@pytest.mark.parametrize("form", ["hub", "own"])
@pytest.mark.parametrize("name", MODES)
def test_a_text_model_into_the_language_part(tmp_path: Path, name: str, form: str) -> None:
    """Text models merged into a vision-language model: its language part is theirs, its towers stay the base's, and it
    loads."""
    architecture = ARCHITECTURES[name]
    whole = architecture.build()
    base = save(whole, tmp_path / "base", form)
    text_class, config_class = MODES[name]
    values = {k: v for k, v in architecture.values["text_config"].items() if k != "model_type"}
    text = save(Architecture(text_class, config_class, values).build(5), tmp_path / "text")
    merge(recipe_of(base, text, scaling=1.0), OutputConfig(tmp_path / "out"))
    result, told = load(tmp_path / "out")
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    merged, before = result.state_dict(), load(base)[0].state_dict()
    expected = load(text)[0].state_dict()
    layers = [name for name in expected if ".layers." in name]
    assert layers
    for key in layers:
        ours = next(one for one in merged if one.endswith(key.removeprefix("model")) and "language_model" in one)
        torch.testing.assert_close(merged[ours], expected[key], rtol=1e-5, atol=1e-6)
    towers = [key for key in before if "vision" in key or "projector" in key]
    assert towers
    assert all(torch.equal(merged[key], before[key]) for key in towers)


def test_a_text_model_that_fits_several_parts(tmp_path: Path) -> None:
    """Where two parts have such layers, and where none has, a sentence says what to do."""
    base = save(ARCHITECTURES["llava"].build(), tmp_path / "base", "hub")
    values = {k: v for k, v in ARCHITECTURES["llava"].values["text_config"].items() if k != "model_type"}
    text = save(Architecture("LlamaForCausalLM", "LlamaConfig", values).build(5), tmp_path / "text")
    stored = weights(base)
    twice = {n.replace("language_model", "talker"): t.clone() for n, t in stored.items() if "language_model" in n}
    with_part(base, twice)
    with pytest.raises(CheckpointError, match=r"text is a text model .* fit several parts .*talker"):
        plan_merge(recipe_of(base, text), OutputConfig(tmp_path / "out"))
    other = save(ARCHITECTURES["gpt2"].build(), tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="fit no part of it"):
        plan_merge(recipe_of(base, other), OutputConfig(tmp_path / "out"))


@pytest.mark.parametrize(
    ("top", "inner", "head", "tied"),
    [
        (True, False, False, True), (False, True, True, False), (False, False, True, False), (True, True, False, True),
        (False, True, False, True), (None, True, False, True), (None, False, True, False),
    ],
)  # fmt: skip
def test_ties_in_two_places(tmp_path: Path, top: bool | None, inner: bool, head: bool, tied: bool) -> None:
    """transformers 5 writes tie_word_embeddings at the top and in the language part; the top decides, and where it says
    untied without a head the tensors do. The result has the head or not, loads, and says the same in both places."""
    values = {**ARCHITECTURES["llava"].values, "tie_word_embeddings": not head}
    model = Architecture("LlavaForConditionalGeneration", "LlavaConfig", values).build()
    folders = [save(one, tmp_path / name, "hub") for name, one in (("base", model), ("tuned", fine_tuned(model, 1)))]
    for folder in folders:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        config.pop("tie_word_embeddings", None)
        config |= {} if top is None else {"tie_word_embeddings": top}
        config["text_config"]["tie_word_embeddings"] = inner
        file.write_text(json.dumps(config))
        assert any("lm_head" in name for name in weights(folder)) is head
    merge(recipe_of(*folders), OutputConfig(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert any("lm_head" in name for name in weights(tmp_path / "out")) is head
    stated = {written.get("tie_word_embeddings", inner), written["text_config"]["tie_word_embeddings"]}
    assert stated == {tied}
    _, told = load(tmp_path / "out")
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_the_embedding_is_found_by_its_role(tmp_path: Path) -> None:
    """Embeddings per layer and of other parts stored before it do not pass for the input embedding."""
    from merging.checkpoints.tensor_names import main_embedding

    names = ["model.language_model.embed_tokens_per_layer.weight", "talker.model.codec_embedding.weight",
             "model.vision_tower.embeddings.weight", "model.language_model.embed_tokens.weight"]  # fmt: skip
    assert main_embedding(names) == names[-1]
    assert main_embedding(reversed(names)) == names[-1]
    assert main_embedding(["encoder.embed_tokens.weight", "shared.weight"]) == "shared.weight"
    assert main_embedding(["model.norm.weight"]) is None
