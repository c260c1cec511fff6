"""Dtypes of results: what every input stores wider keeps its dtype; float64 is not narrowed without being asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from common.errors import CheckpointError
from merging.pipeline import merge
from merging.plan.merge_plan import OutputConfig
from merging.planning import plan_merge
from merging.recipe import make_recipe, recipe_as_yaml
from tests.helpers.tiny import fine_tune, make_llama, weights


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and a fine-tuned model in bfloat16, their norms in float32 as both store them."""
    folder = tmp_path_factory.mktemp("pair")
    base = make_llama(folder / "base", hidden=16, layers=1)
    tuned = fine_tune(base, folder / "tuned", seed=1)
    for one in (base, tuned):
        stored = {n: t.float() if n.endswith("norm.weight") else t for n, t in weights(one).items()}
        save_file(stored, one / "model.safetensors", metadata={"format": "pt"})
    return {"base": base, "tuned": tuned}


def recipe_of(pair: dict[str, Path], **more: Any) -> Any:
    """Task arithmetic of the tuned model."""
    flags = {"method": "task_arithmetic", "base_model": str(pair["base"]), "models_to_merge": str(pair["tuned"])}
    return make_recipe({**flags, "scaling": 1.0, **more}, {})


def test_wide_tensors_keep_their_dtype(pair, tmp_path: Path) -> None:
    """Norms that both store in float32 stay so, equal to the tuned model's to float32; others are bfloat16. The lock's
    recipe repeats that, and --dtype is for all."""
    recipe = recipe_of(pair)
    merge(recipe, OutputConfig(tmp_path / "out"))
    merged, tuned = weights(tmp_path / "out"), weights(pair["tuned"])
    assert {n: t.dtype for n, t in merged.items()} == {n: t.dtype for n, t in tuned.items()}
    name = "model.norm.weight"
    torch.testing.assert_close(merged[name], tuned[name], rtol=1e-6, atol=1e-7)
    again = make_recipe({}, recipe_as_yaml(recipe))
    assert (again, again.options.keep_wide) == (recipe, True)
    plan = plan_merge(recipe, OutputConfig(tmp_path / "plan"), headers_only=True)
    assert any(note.startswith("Kept in float32") and "model.norm.weight" in note for note in plan.notes)
    merge(recipe_of(pair, dtype="bfloat16"), OutputConfig(tmp_path / "given"))
    assert {t.dtype for t in weights(tmp_path / "given").values()} == {torch.bfloat16}


def test_wide_in_one_input_alone(pair, tmp_path: Path) -> None:
    """A tensor that one input stores in float32 and the other in bfloat16 has the result's dtype."""
    narrow = make_llama(tmp_path / "base", hidden=16, layers=1)
    plan = plan_merge(recipe_of({**pair, "base": narrow}), OutputConfig(tmp_path / "out")).model
    assert {tensor.dtype for tensor in plan.tensors} == {"bfloat16"}


def test_float64_is_not_narrowed_silently(pair, tmp_path: Path) -> None:
    """float64 weights are refused by name unless --dtype says what the result has."""
    for role in ("base", "tuned"):
        folder = tmp_path / role
        folder.mkdir()
        for file in pair[role].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        stored = {n: t.double() for n, t in weights(pair[role]).items()}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    double = {role: tmp_path / role for role in ("base", "tuned")}
    with pytest.raises(CheckpointError, match=r"tuned: tensor .* is stored as float64.*--dtype float32"):
        plan_merge(recipe_of({**pair, "tuned": double["tuned"]}), OutputConfig(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="float64"):
        merge(recipe_of(double), OutputConfig(tmp_path / "out"))
    merge(recipe_of(double, dtype="float32"), OutputConfig(tmp_path / "out"))
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {torch.float32}
