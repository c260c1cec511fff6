"""What a result's files and sentences claim: equality with the base, omegas, importance, card, signs of zeros."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save_file

from aim.calibration.config import Calibration
from aim.calibration.flags import calibration_of
from aim.config import AimConfig
from aim.importance import Importance, fingerprint
from aim.measure import Settings, load_importance
from aim.omegas import omega_folder, parse_omegas
from aim.pipeline import plan_relaxation, relax
from aim.relax import relax_tensor
from common.errors import CheckpointError, UsageError
from merging.checkpoints.checkpoint import open_checkpoint
from merging.engine.execution import ExecutionConfig
from merging.methods.contract import load_method
from merging.ops.kernels.kernels import kernels
from merging.ops.sparse.magprune import probabilities
from merging.ops.tensor_blocks import TensorGroup
from merging.output.records.card import AIM_TAG
from merging.pipeline import merge
from merging.plan.merge_plan import OutputConfig
from merging.recipe import make_recipe
from merging.recipe.method_registry import find_method
from tests.helpers.merging import merge_group
from tests.helpers.tiny import make_llama, train, weights

CPU = torch.device("cpu")


def changed(base: Path, out: Path, name: str, index: tuple[int, ...], value: float) -> Path:
    """A copy of a checkpoint with one other value."""
    out.mkdir()
    for file in base.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    stored = weights(base)
    stored[name] = stored[name].clone()
    stored[name][index] = value
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in bfloat16."""
    return make_llama(tmp_path_factory.mktemp("reports") / "base", hidden=16, layers=1)


def recipe_of(base: Path, other: Path | str, **more: Any) -> Any:
    """Task arithmetic of one model."""
    return make_recipe(
        {"method": "task_arithmetic", "base_model": str(base), "models_to_merge": str(other), **more}, {}
    )


# equality with the base


def test_a_result_equal_to_the_base_is_reported(base: Path, tmp_path: Path, capsys) -> None:
    """A model equal to the base, and weight 0: the sentence and the record report it; one other value, and neither."""
    same = changed(base, tmp_path / "same", "lm_head.weight", (0, 0), float(weights(base)["lm_head.weight"][0, 0]))
    other = changed(base, tmp_path / "other", "lm_head.weight", (319, 15), 3.0)
    for name, model, more, equal in (
        ("a", same, {}, True), ("b", other, {"weights": 0.0}, True), ("c", other, {}, False)
    ):  # fmt: skip
        merge(recipe_of(base, model, **more), OutputConfig(tmp_path / name))
        assert ("equals the base" in capsys.readouterr().err) is equal
        assert json.loads((tmp_path / name / "run_record.json").read_text()).get("equals_base", False) is equal


def test_an_adapter_that_changes_nothing(base: Path, tmp_path: Path, capsys) -> None:
    """An adapter without a tensor is refused; one whose B is zero gives the base, which is reported."""
    train(base, tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    stored = weights(tmp_path / "lora")
    save_file({n: t * 0 if "lora_B" in n else t for n, t in stored.items()}, file)
    merge(recipe_of(base, f"{base}+{tmp_path / 'lora'}"), OutputConfig(tmp_path / "zero"))
    assert "equals the base" in capsys.readouterr().err
    save_file({}, file)
    with pytest.raises(CheckpointError, match=r"lora.* no tensor"):
        merge(recipe_of(base, f"{base}+{tmp_path / 'lora'}"), OutputConfig(tmp_path / "none"))


def test_nothing_to_relax_means_every_value(base: Path, tmp_path: Path) -> None:
    """Two models that differ in the last value of one tensor are relaxed; equal ones are refused."""
    (tmp_path / "x.txt").write_text("w3")
    aim = AimConfig(
        (0.4,), Settings(Calibration(str(tmp_path / "x.txt")), importance_file=tmp_path / "imp.safetensors")
    )
    same = changed(base, tmp_path / "same", "lm_head.weight", (0, 0), float(weights(base)["lm_head.weight"][0, 0]))
    with pytest.raises(UsageError, match="hold the same weights"):
        plan_relaxation(str(same), str(base), aim, OutputConfig(tmp_path / "out"), None)
    other = changed(base, tmp_path / "other", "lm_head.weight", (319, 15), 3.0)
    assert plan_relaxation(str(other), str(base), aim, OutputConfig(tmp_path / "out"), None).layout.tensors


# signs of zeros


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("task_arithmetic", {}), ("ties", {"density": 0.5}), ("dare_linear", {"density": 0.5}), ("widen", {}),
        ("della", {"density": 0.5, "epsilon": 0.1}), ("linear", {}), ("sce", {}), ("nearswap", {}),
    ],
)  # fmt: skip
def test_a_zero_keeps_the_bases_sign(method: str, more: dict[str, Any], compiled: bool) -> None:
    """Where no model moves an entry the result has the base's bits, -0.0 among them, by kernel and by expression."""
    if compiled and kernels() is None:
        pytest.skip("no compiler for the kernels")
    tensor = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))
    tensor[::2] = -0.0
    count = 1 if method == "nearswap" else 2
    known = find_method(method)
    parameters = {n: p.for_models(more.get(n, p.default if p.default is not None else 1), count)
                  for n, p in known.parameters.items()}  # fmt: skip
    anchor = None if method == "linear" else tensor
    group = TensorGroup("w.weight", anchor, (tensor.clone(),) * count, CPU)
    merged = merge_group(
        group, ExecutionConfig(load_method(known.name), CPU, compiled=compiled), parameters, torch.float32
    )
    assert torch.equal(merged.view(torch.int32), tensor.view(torch.int32))


def test_relaxing_keeps_the_sign_of_zeros() -> None:
    """Equal tensors are their own relaxation bit for bit, at every pull, by kernel and by expression."""
    tensor = torch.tensor([[-0.0, 0.0, 1.0, -0.0, -2.0]]).repeat(5, 1)
    pull = torch.tensor([0.0, 0.3, 0.5, 0.8, 1.0])
    assert torch.equal(relax_tensor(tensor, tensor, pull, 0.0).view(torch.int32), tensor.view(torch.int32))
    compiled = kernels()
    if compiled is not None:
        out = torch.empty_like(tensor)
        assert compiled.relax(tensor, tensor, pull, False, out)
        assert torch.equal(out.view(torch.int32), tensor.view(torch.int32))


# omegas, experts, values of another type


def test_omegas_that_print_alike_have_folders_of_their_own() -> None:
    """By hand: the shortest text that is that number."""
    omegas = (0.4, 1.0, 0.0, 0.3, 0.30000000000000004, 0.1234567, 0.12345671)
    names = [omega_folder(omega) for omega in omegas]
    assert names[:5] == ["omega-0.4", "omega-1", "omega-0", "omega-0.3", "omega-0.30000000000000004"]
    assert len(set(names)) == len(omegas)
    assert [float(name.removeprefix("omega-")) for name in names] == list(omegas)


def test_true_is_no_number() -> None:
    """true for an omega or a weight of calibration data is refused, alone and in a list."""
    for value in (True, [0.4, True]):
        with pytest.raises(UsageError, match="--omega must be a number"):
            parse_omegas(value)
        with pytest.raises(UsageError, match="calibration_weights must be numbers"):
            calibration_of({"calibration": "pile", "calibration_weights": value})


def test_della_ranks_stacked_experts_apart() -> None:
    """The probabilities of experts in one tensor are those of each expert's matrix alone."""
    from merging.ops.sparse import magprune

    tensors = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(5))
    seen: list[torch.Tensor] = []
    keep = magprune.keep_mask

    def kept(block: Any, shape: Any, **given: Any) -> torch.Tensor:
        seen.append(given["density"])
        return keep(block, shape, **given)

    group = TensorGroup("model.layers.0.mlp.experts.down_proj", torch.zeros(3, 4, 6), (tensors,), CPU)
    parameters = {"density": [0.5], "epsilon": [0.2], "rescale": "none"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(magprune, "keep_mask", kept)
        found = magprune.magprune_masks(group, **parameters)
        for block in group.blocks():
            found.for_block(block)
    apart = torch.stack([probabilities(expert.abs(), 0.5, 0.2) for expert in tensors])
    assert torch.equal(torch.cat(seen), apart)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("int", 2.7, None), ("int", True, None), ("int", "2.7", None), ("int", 2.0, 2), ("int", "3", 3),
        ("float", True, None), ("float", "true", None), ("float", 1, 1.0), ("float", [1.0], None),
        ("bool", 1.0, True), ("bool", 0, False), ("bool", 0.0, False), ("bool", 2, None), ("bool", 0.5, None),
        ("str", 1, None), ("str", True, None),
    ],
)  # fmt: skip
def test_values_of_another_type(name: str, value: Any, expected: Any) -> None:
    """A value is taken in its type or refused by the parameter's name; mergekit's 1.0 for a flag is true."""
    parameters = [p for m in ("ties", "wudi", "task_arithmetic") for p in find_method(m).parameters.values()]
    parameter = replace(next(p for p in parameters if p.type == name), choices=())
    if expected is None:
        with pytest.raises(UsageError, match=f"{parameter.name} must be"):
            parameter.parse(value)
    else:
        assert parameter.parse(value) == expected
        assert type(parameter.parse(value)) is type(expected)


# importance files


def test_the_fingerprint_covers_every_value(base: Path, tmp_path: Path) -> None:
    """Any one value of a base changes its fingerprint; where it is stored does not."""
    mark = fingerprint(open_checkpoint(str(base)))
    for row in (0, 1, 7, 100, 319):
        other = changed(base, tmp_path / str(row), "lm_head.weight", (row, row % 16), 3.0)
        assert fingerprint(open_checkpoint(str(other))) != mark
    halves = tmp_path / "halves"
    stored = list(weights(base).items())
    halves.mkdir()
    (halves / "config.json").write_bytes((base / "config.json").read_bytes())
    names = {}
    for i, part in enumerate((stored[:5], stored[5:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file(dict(part), halves / file, metadata={"format": "pt"})
        names |= {name: file for name, _ in part}
    (halves / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert fingerprint(open_checkpoint(str(halves))) == mark


def test_importance_names_its_statistic(base: Path, tmp_path: Path) -> None:
    """A file has its statistic and the mode that the umask leaves; one of another statistic is refused."""
    opened = open_checkpoint(str(base))
    about = {"name": "base", "commit": None, "fingerprint": fingerprint(opened)}
    made = Importance({"w": torch.rand(4)}, {"w": 1}, {}, {}, about)
    old = os.umask(0o027)
    try:
        made.save(tmp_path / "imp.safetensors")
    finally:
        os.umask(old)
    assert (tmp_path / "imp.safetensors").stat().st_mode & 0o777 == 0o640
    assert load_importance(tmp_path / "imp.safetensors", opened, reference=False).statistic == "mean_abs_input"
    replace(made, statistic="mean_square_input").save(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="mean_square_input, and --statistic mean_abs needs mean_abs_input"):
        load_importance(tmp_path / "other.safetensors", opened, reference=False)


# model cards

CARDS = {
    "known": ("license: apache-2.0\n", {"license": "apache-2.0"}),
    "named": (
        "license: other\nlicense_name: qwen-research\nlicense_link: LICENSE\n",
        {"license": "other", "license_name": "qwen-research", "license_link": "LICENSE"},
    ),
    "list": ("license: [mit, apache-2.0]\n", None),
    "none": ("language: en\n", {}),
}


@pytest.mark.parametrize("kind", CARDS)
def test_a_cards_license(base: Path, tmp_path: Path, kind: str) -> None:
    """The license of inputs that agree survives with name and link; huggingface_hub reads the card back as written."""
    text, expected = CARDS[kind]
    other = changed(base, tmp_path / "other", "lm_head.weight", (0, 0), 3.0)
    mine = changed(base, tmp_path / "mine", "lm_head.weight", (0, 0), 1.0)
    for folder in (mine, other):
        (folder / "README.md").write_text(f"---\n{text}---\n# x\n")
    merge(recipe_of(mine, other), OutputConfig(tmp_path / "out"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert ModelCardData(**front).to_dict() == card.data.to_dict() == front
    if expected is not None:
        assert {k: v for k, v in front.items() if k.startswith("license")} == expected


def test_licenses_that_differ(base: Path, tmp_path: Path) -> None:
    """Inputs of two licenses: `other` with a name, which the hub asks for."""
    other = changed(base, tmp_path / "other", "lm_head.weight", (0, 0), 3.0)
    mine = changed(base, tmp_path / "mine", "lm_head.weight", (0, 0), 1.0)
    for folder, name in ((mine, "mit"), (other, "gemma")):
        (folder / "README.md").write_text(f"---\nlicense: {name}\n---\n")
    merge(recipe_of(mine, other), OutputConfig(tmp_path / "out"))
    data = ModelCard.load(tmp_path / "out" / "README.md").data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "licenses-of-the-inputs")


def test_the_card_of_a_relaxed_merge(family, tmp_path: Path) -> None:
    """After AIM the card names the merge's method, its paper and parameters, and AIM's; AIM's tag is there alone."""
    recipe = make_recipe(
        {"method": "ties", "base_model": str(family["base"]), "density": 0.25,
         "models_to_merge": f"{family['a']},{family['b']}"}, {},
    )  # fmt: skip
    merged = merge(recipe, OutputConfig(tmp_path / "merged"))
    assert AIM_TAG not in ModelCard.load(merged / "README.md").data.tags
    settings = Settings(Calibration(str(family["text"]), n_samples=40, block_size=64))
    relax(str(merged), str(family["base"]), AimConfig((0.4,), settings), OutputConfig(tmp_path / "out"), None)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert AIM_TAG in card.data.tags
    assert (
        f"Merged with ties ({find_method('ties').paper}), relaxed by AIM (arXiv:2502.02421) with omega 0.4."
        in card.text
    )
    assert "density:\n- 0.25" in card.text
    assert "## Relaxation" in card.text
