"""`merge.py --config FILE` on files of mergekit's form gives what mergekit makes of the same file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from common.cli import run
from merge import main
from merging.recipe import make_recipe, recipe_as_yaml
from merging.recipe.mergekit.writer import as_mergekit, to_text
from tests.helpers.mergekit_examples import EXAMPLES, TOKENIZERS, placed
from tests.helpers.tiny import fine_tune, make_llama, weights

FILES = {**EXAMPLES, **TOKENIZERS}
RANDOM = ("dare_ties", "dare_linear", "della", "della_linear")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of base, a, b and c: float32, so that magnitudes are distinct and trimming has no equal entries."""
    folder = tmp_path_factory.mktemp("parity")
    base = make_llama(folder / "base", dtype=torch.float32, layers=4, hidden=32)
    for seed, name in enumerate("abc", 1):
        fine_tune(base, folder / name, seed=seed)
    return folder


def text_of(name: str, models: Path) -> str:
    """The example; where masks are drawn, at density 1, since two programs draw different ones."""
    text = re.sub(r"density: (\[.*?\]|[\d.]+)", "density: 1.0", FILES[name]) if name in RANDOM else FILES[name]
    return placed(text, models)


def by_mergekit(text: str, out: Path) -> dict[str, torch.Tensor]:
    """Merge with mergekit's package."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), MergeOptions())
    return weights(out)


def by_us(text: str, out: Path) -> dict[str, torch.Tensor]:
    """Merge with merge.py's own entry point."""
    file = out.with_suffix(".yaml")
    file.write_text(text)
    assert run(main, ["--config", str(file), "--save_path", str(out), "--quiet"]) == 0
    return weights(out)


def assert_close(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Same tensors, equal to 2e-6 of each one's largest value."""
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (mine[name] - tensor).abs().max() <= 2e-6 * tensor.abs().max() + 1e-9, name


@pytest.mark.parametrize("name", FILES)
def test_the_same_file_gives_the_same_model(name: str, models: Path, tmp_path: Path) -> None:
    """In float32 every tensor of every documented example agrees with mergekit 0.1.5's to 2e-6 of its largest value,
    and the config has as many layers as the weights."""
    text = text_of(name, models)
    theirs = by_mergekit(text, tmp_path / "theirs")
    mine = by_us(text, tmp_path / "mine")
    assert_close(mine, theirs)
    layers = {int(found[1]) for key in mine if (found := re.search(r"layers\.(\d+)\.", key))}
    assert layers == set(range(json.loads((tmp_path / "mine" / "config.json").read_text())["num_hidden_layers"]))


@pytest.mark.parametrize("name", FILES)
def test_what_is_written_for_mergekit_gives_the_same_model(name: str, models: Path, tmp_path: Path) -> None:
    """The recipe written for mergekit, with our defaults in it, is merged by mergekit to what merge.py makes of the
    file that it came from (masks aside, which are drawn by other numbers)."""
    text = text_of(name, models)
    document, _ = as_mergekit(make_recipe({}, yaml.safe_load(text)))
    assert_close(by_us(text, tmp_path / "mine"), by_mergekit(to_text(document), tmp_path / "theirs"))


@pytest.mark.parametrize("name", ["ties", "dare_ties", "every level", "passthrough"])
def test_a_recipe_s_own_form_gives_the_same_bytes(name: str, models: Path, tmp_path: Path) -> None:
    """The recipe as it is recorded (as_yaml_dict) merges to the same bytes as the file, random masks included."""
    text = placed(EXAMPLES[name], models)
    first = by_us(text, tmp_path / "first")
    again = by_us(to_text(recipe_as_yaml(make_recipe({}, yaml.safe_load(text)))), tmp_path / "again")
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_both_forms_give_the_same_bytes(models: Path, tmp_path: Path) -> None:
    """TIES in mergekit's form (with our own save_path beside) and with flags is the same file, byte for byte."""
    text = placed(
        "models:\n- model: a\n  parameters: {weight: 0.5, density: 0.3}\n- model: b\n  parameters: {density: 0.7}\n"
        "merge_method: ties\nbase_model: base\nparameters: {lambda: 0.9, weight: 1}\nout_dtype: bfloat16\n",
        models,
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{text}save_path: {tmp_path / 'mine'}\n")
    assert run(main, ["--quiet", "--config", str(file)]) == 0
    flags = {
        "method": "ties",
        "base_model": models / "base",
        "models_to_merge": f"{models / 'a'},{models / 'b'}",
        "weights": "0.5,1",
        "density": "0.3,0.7",
        "scaling": "0.9",
        "save_path": tmp_path / "flags",
    }
    assert run(main, ["--quiet", *(f"--{key}={value}" for key, value in flags.items())]) == 0
    one, other = (tmp_path / where / "model.safetensors" for where in ("mine", "flags"))
    assert one.read_bytes() == other.read_bytes()
