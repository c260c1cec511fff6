"""Laws of AIM: the relaxation, the importance it rests on, and what performAIM.py writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from aim.calibration.config import Calibration
from aim.capture.whole_model import calibrate
from aim.config import AimConfig
from aim.importance import Importance
from aim.measure import Settings
from aim.pipeline import relax, relaxation_spec
from aim.relax import importance, relax_tensor
from aim.relaxer import Rule
from common.errors import CheckpointError, UsageError
from merging.pipeline import merge
from merging.plan.merge_plan import OutputConfig
from merging.recipe import make_recipe
from tests.helpers.tiny import VOCABULARY, fine_tune, make_llama, weights, write_texts


@pytest.fixture(scope="module")
def merged(family, tmp_path_factory) -> Path:
    """Task arithmetic of two fine-tuned models."""
    out = tmp_path_factory.mktemp("merged") / "ta"
    recipe = make_recipe({"method": "task_arithmetic", "base_model": family["base"],
                          "models_to_merge": [str(family["a"]), str(family["b"])]}, {})  # fmt: skip
    return merge(recipe, OutputConfig(out))


@pytest.fixture(scope="module")
def settings(family, tmp_path_factory) -> Settings:
    """Calibration on the family's text, the importance kept in a file."""
    file = tmp_path_factory.mktemp("importance") / "imp.safetensors"
    return Settings(Calibration(str(family["text"]), n_samples=40, block_size=64), importance_file=file)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes."""
    return tensor.contiguous().view(torch.uint8)


def extreme(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """fp32 values of any exponent that bf16 has, zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-60, 60, shape, generator=generator)
    values[0, ::3] = 0.0
    values[1, ::3] = -0.0
    return values.bfloat16().float()


def test_relaxation_is_exact_at_both_ends() -> None:
    """Law 23: omega 1 and importance 0 give the merged bits, omega 0 at importance 1 the base's, at any exponents."""
    base, merged_tensor = extreme((32, 48), 1), extreme((32, 48), 2)
    s = torch.rand(48)
    s[0], s[1] = 1.0, 0.0
    assert torch.equal(bits(relax_tensor(base, merged_tensor, s, 1.0)), bits(merged_tensor))
    for omega in (0.0, 0.3, 0.9):
        relaxed = relax_tensor(base, merged_tensor, s, omega)
        assert torch.equal(bits(relaxed[:, 1]), bits(merged_tensor[:, 1]))
    assert torch.equal(bits(relax_tensor(base, merged_tensor, s, 0.0)[:, 0]), bits(base[:, 0]))


def test_relaxation_is_the_equation() -> None:
    """theta = theta_m - (1 - omega) s (theta_m - theta_0) in fp64, to fp32 accuracy; constant ratio down a column,
    within [omega, 1], affine in omega (law 24)."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 30, generator=generator)
    merged_tensor = base + torch.randn(40, 30, generator=generator)
    s = importance(torch.rand(30, generator=generator))
    ratios = []
    for omega in (0.0, 0.25, 0.5, 0.75, 1.0):
        relaxed = relax_tensor(base, merged_tensor, s, omega)
        expected = merged_tensor.double() - (1 - omega) * s.double() * (merged_tensor.double() - base.double())
        assert (relaxed - expected).abs().max() < 1e-6
        ratio = (relaxed.double() - base) / (merged_tensor.double() - base)
        middle = ratio.median(0).values
        assert (ratio - middle).abs().median() < 1e-6
        assert (middle >= omega - 1e-6).all()
        assert (middle <= 1 + 1e-6).all()
        ratios.append(middle)
    steps = torch.stack(ratios).diff(dim=0)
    assert (steps - steps[0]).abs().max() < 1e-5


def test_importance_is_scale_free_and_never_nan() -> None:
    """Law 24/25: s does not change when all activations of a module are doubled; all zero gives no relaxation."""
    a = torch.rand(16)
    assert torch.equal(importance(a), importance(4 * a))
    assert float(importance(a).max()) == 1.0
    assert torch.equal(importance(torch.zeros(16)), torch.zeros(16))


def test_statistics_are_the_definition(family) -> None:
    """a is the mean of |input| over all tokens: recomputed here from hidden states in fp64, for norms and linears."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family["base"], dtype=torch.float32).eval()
    blocks = torch.randint(3, VOCABULARY, (6, 32), generator=torch.Generator().manual_seed(1))
    found = calibrate(model, blocks)
    with torch.no_grad():
        hidden = model(blocks, output_hidden_states=True).hidden_states
    layer = model.model.layers[0]
    expected = {
        "model.layers.0.input_layernorm.weight": hidden[0],
        "model.layers.0.self_attn.q_proj.weight": layer.input_layernorm(hidden[0]),
        "model.layers.1.input_layernorm.weight": hidden[1],
        "lm_head.weight": hidden[-1],
    }
    for name, x in expected.items():
        a = x.double().abs().reshape(-1, x.shape[-1]).mean(0)
        assert torch.allclose(found.means[name].double(), a, rtol=1e-5), name
    assert all(axis == len(model.get_parameter(name).shape) - 1 for name, axis in found.axes.items())
    untouched = {name for name, _ in model.named_parameters()} - found.means.keys()
    assert untouched == {"model.embed_tokens.weight"}
    assert set(found.tokens.values()) == {6 * 32}


def test_statistics_do_not_depend_on_batches(family) -> None:
    """Law 24: batch size and order of the blocks change no activation beyond 1e-6 relative in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family["base"], dtype=torch.float32).eval()
    blocks = torch.randint(3, VOCABULARY, (12, 32), generator=torch.Generator().manual_seed(1))
    one = calibrate(model, blocks, batch_size=1).means
    five = calibrate(model, blocks.flip(0), batch_size=5).means
    for name in one:
        assert torch.allclose(one[name], five[name], rtol=1e-6, atol=0), name


def test_conv1d_is_measured_on_its_input_axis(tmp_path: Path) -> None:
    """GPT-2's Conv1D keeps its weight as [in, out]: its importance runs along axis 0, and relaxing follows it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()
    found = calibrate(model, torch.randint(0, 50, (4, 16)))
    assert found.axes["transformer.h.0.mlp.c_fc.weight"] == 0
    assert len(found.means["transformer.h.0.mlp.c_fc.weight"]) == 16
    assert len(found.means["transformer.h.0.mlp.c_proj.weight"]) == 64


def test_relaxed_checkpoint(family, merged: Path, settings: Settings, tmp_path: Path) -> None:
    """Law 25: embeddings stay merged, norms and head move, the ratio of each column is 1 - s (1 - omega), and the
    folder loads with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = relax(
        str(merged), str(family["base"]), AimConfig((0.4,), settings), OutputConfig(tmp_path / "out"), "float32"
    )
    base, before, after = weights(family["base"]), weights(merged), weights(out)
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"].float())
    assert settings.importance_file is not None
    measured = Importance.load(settings.importance_file)
    for name, a in measured.activations.items():
        s = (a / a.max()).double()
        delta = before[name].double() - base[name].double()
        expected = base[name].double() + delta * (1 - s * 0.6)
        assert (after[name].double() - expected).abs().max() < 1e-6, name
        assert not torch.equal(after[name], before[name].float()), name
    assert AutoTokenizer.from_pretrained(out).encode("w5 w6")
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.float32


def test_omega_one_keeps_the_bytes(family, merged: Path, settings: Settings, tmp_path: Path) -> None:
    """Law 23: with omega 1 the weights file is the merged one, byte for byte."""
    out = relax(str(merged), str(family["base"]), AimConfig((1.0,), settings), OutputConfig(tmp_path / "out"), None)
    assert (out / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()


def test_importance_is_reused(family, merged: Path, settings: Settings, tmp_path: Path, capsys) -> None:
    """A second run with the same importance file computes nothing and gives the same bytes."""
    from dataclasses import replace

    first = relax(str(merged), str(family["base"]), AimConfig((0.3,), settings), OutputConfig(tmp_path / "1"), None)
    capsys.readouterr()
    nowhere = replace(settings, calibration=Calibration("pile"))  # would fail if it were read
    second = relax(str(merged), str(family["base"]), AimConfig((0.3,), nowhere), OutputConfig(tmp_path / "2"), None)
    assert "Importance from" in capsys.readouterr().err
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_importance_of_another_base_is_refused(merged: Path, family, settings: Settings, tmp_path: Path) -> None:
    """An importance file made from other weights is refused by name, and nothing is written."""
    other = make_llama(tmp_path / "other", seed=9)
    relax(str(merged), str(family["base"]), AimConfig((0.3,), settings), OutputConfig(tmp_path / "1"), None)
    with pytest.raises(CheckpointError, match="whose weights are not those of"):
        relax(str(merged), str(other), AimConfig((0.3,), settings), OutputConfig(tmp_path / "out"), None)
    assert not (tmp_path / "out").exists()


def test_one_pass_is_two_passes_with_one_rounding_less(
    family, merged: Path, settings: Settings, tmp_path: Path
) -> None:
    """merge --omega equals merging in float32 and relaxing that, rounded once: bit for bit in bf16."""
    flags = {"method": "task_arithmetic", "base_model": family["base"],
             "models_to_merge": [str(family["a"]), str(family["b"])]}  # fmt: skip
    relax(str(merged), str(family["base"]), AimConfig((0.3,), settings), OutputConfig(tmp_path / "0"), None)
    exact = merge(make_recipe({**flags, "dtype": "float32"}, {}), OutputConfig(tmp_path / "exact"))
    two = relax(
        str(exact), str(family["base"]), AimConfig((0.4,), settings), OutputConfig(tmp_path / "two"), "bfloat16"
    )
    recipe = make_recipe(flags, {})
    output = OutputConfig(tmp_path / "one")
    one = merge(recipe, output, relaxation_spec(AimConfig((0.4,), settings), output, recipe))
    assert all(torch.equal(weights(one)[name], tensor) for name, tensor in weights(two).items())
    assert json.loads((one / "run_record.json").read_text())["lineage"]["omega"] == 0.4


def test_existing_importance_binds(family, merged: Path, settings: Settings, tmp_path: Path) -> None:
    """An importance file that stands is not silently another one: other numerics or other calibration are refused."""
    from dataclasses import replace

    relax(str(merged), str(family["base"]), AimConfig((0.3,), settings), OutputConfig(tmp_path / "0"), None)
    output = OutputConfig(tmp_path / "out")
    with pytest.raises(CheckpointError, match="was measured with --numerics float32"):
        relax(str(merged), str(family["base"]), AimConfig((0.3,), replace(settings, reference=True)), output, None)
    other = replace(settings, calibration=replace(settings.calibration, n_samples=5))
    with pytest.raises(UsageError, match="was measured with --n_samples 40, and 5 is asked for"):
        relax(str(merged), str(family["base"]), AimConfig((0.3,), other), output, None)
    assert not (tmp_path / "out").exists()


def test_importance_is_not_lost_in_the_target(family, merged: Path, settings: Settings, tmp_path: Path) -> None:
    """An importance file inside --save_path is refused before anything is measured: the folder would replace it."""
    from dataclasses import replace

    out = tmp_path / "out"
    inside = replace(settings, importance_file=out / "imp.safetensors")
    with pytest.raises(UsageError, match="would write over or into the input"):
        relax(str(merged), str(family["base"]), AimConfig((0.3,), inside), OutputConfig(out), None)
    assert not out.exists()


def test_gpt2_without_its_prefix(tmp_path: Path) -> None:
    """GPT-2 as the hub stores it (names without `transformer.`) is relaxed, its Conv1D along axis 0."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.helpers.tiny import make_tokenizer

    folders = []
    for i in range(2):
        torch.manual_seed(i)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=64, n_embd=16, n_layer=1, n_head=2))
        folder = tmp_path / f"m{i}"
        model.save_pretrained(folder)
        state = {k.removeprefix("transformer."): v for k, v in weights(folder).items()}
        from safetensors.torch import save_file

        save_file(state, folder / "model.safetensors", {"format": "pt"})
        make_tokenizer(folder, 60)
        folders.append(folder)
    text = write_texts(tmp_path / "text.jsonl")
    settings = Settings(Calibration(str(text), n_samples=20, block_size=42), importance_file=tmp_path / "imp")
    out = relax(
        str(folders[1]), str(folders[0]), AimConfig((0.0,), settings), OutputConfig(tmp_path / "out"), "float32"
    )
    base, before, after = weights(folders[0]), weights(folders[1]), weights(out)
    name = "h.0.mlp.c_fc.weight"
    a = Importance.load(tmp_path / "imp").activations[name].double()
    s = (a / a.max())[:, None]
    expected = before[name].double() - s * (before[name].double() - base[name].double())
    assert (after[name].double() - expected).abs().max() < 1e-6
    assert torch.equal(after["h.0.mlp.c_fc.bias"], before["h.0.mlp.c_fc.bias"])


def test_card_of_local_models_names_no_hub_id(family, merged: Path, settings: Settings, tmp_path: Path) -> None:
    """Local folders never appear as base_model in the card, whatever the current folder; the recipe of a one-pass
    merge has omega and the importance file."""
    relax(str(merged), str(family["base"]), AimConfig((0.3,), settings), OutputConfig(tmp_path / "0"), None)
    recipe = make_recipe({"method": "ties", "base_model": str(family["base"]), "models_to_merge": str(family["a"])}, {})
    output = OutputConfig(tmp_path / "one")
    out = merge(recipe, output, relaxation_spec(AimConfig((0.4,), settings), output, recipe))
    front, body = (out / "README.md").read_text().split("---\n", 2)[1:]
    assert "base_model" not in front
    assert "omega: 0.4\n" in body
    assert "importance: " in body


@pytest.mark.parametrize("relax_tied", [False, True])
def test_tied_embeddings(tmp_path: Path, relax_tied: bool) -> None:
    """A tied matrix is an embedding and stays merged, unless it is asked to be relaxed as the head it also is."""
    base = make_llama(tmp_path / "base", tied=True)
    tuned = fine_tune(base, tmp_path / "tuned", seed=1)
    text = write_texts(tmp_path / "text.jsonl")
    aim = AimConfig((0.2,), Settings(Calibration(str(text), n_samples=20, block_size=64)), Rule(relax_tied=relax_tied))
    out = relax(str(tuned), str(base), aim, OutputConfig(tmp_path / "out"), None)
    name = "model.embed_tokens.weight"
    assert torch.equal(weights(out)[name], weights(tuned)[name]) != relax_tied
    assert "lm_head.weight" not in weights(out)


def test_extra_token_row_is_left_as_merged(family, tmp_path: Path) -> None:
    """Base of 320 and merged model of 321 rows: the row of the token that the base lacks stays merged in the head."""
    merged = fine_tune(family["base"], tmp_path / "merged", seed=4, extra=("[PAD]",))
    settings = Settings(Calibration(str(family["text"]), n_samples=20, block_size=64))
    out = relax(str(merged), str(family["base"]), AimConfig((0.0,), settings), OutputConfig(tmp_path / "out"), None)
    before, after = weights(merged)["lm_head.weight"], weights(out)["lm_head.weight"]
    assert after.shape[0] == VOCABULARY + 1
    assert torch.equal(after[-1], before[-1])
    assert not torch.equal(after[:-1], before[:-1])


def test_block_longer_than_the_model(family, merged: Path, tmp_path: Path) -> None:
    """Blocks of more positions than the base has are refused before the model is loaded."""
    settings = Settings(Calibration(str(family["text"]), block_size=2049))
    with pytest.raises(UsageError, match="is more than the 2048 positions"):
        relax(str(merged), str(family["base"]), AimConfig((0.3,), settings), OutputConfig(tmp_path / "out"), None)


@pytest.mark.parametrize("omega", [-0.1, 1.1, float("nan")])
def test_omega_outside(family, merged: Path, settings: Settings, tmp_path: Path, omega: float) -> None:
    """An omega outside [0, 1] is a usage error before anything is read."""
    with pytest.raises(UsageError, match=r"--omega must be in \[0, 1\]"):
        relax(str(merged), str(family["base"]), AimConfig((omega,), settings), OutputConfig(tmp_path / "out"), None)
