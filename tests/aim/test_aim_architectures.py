"""AIM on any architecture: what is measured, against oracles in fp64, and what is relaxed, in each stored form."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Tokenizer

from aim.calibration.config import Calibration
from aim.capture.base_model import Skeleton, load_whole
from aim.capture.layerwise import calibrate_layerwise
from aim.capture.whole_model import calibrate
from aim.config import AimConfig
from aim.importance import Importance
from aim.measure import Settings
from aim.pipeline import relax
from aim.relaxer import Rule
from common.errors import CalibrationError
from merging.checkpoints.checkpoint import open_checkpoint
from merging.checkpoints.tensor_names import role_of
from merging.plan.merge_plan import OutputConfig
from tests.helpers.architectures import (
    ARCHITECTURES,
    VOCAB,
    fine_tuned,
    forms_of,
    load,
    make_word_tokenizer,
    quiet,
    save,
)
from tests.helpers.tiny import weights

CPU = torch.device("cpu")
FORMS = [(name, form) for name in ARCHITECTURES for form in forms_of(name) if form != "old"]
NEVER = re.compile(r"vision|visual|projector|\.(A_log|D)$|bias$|position_embeddings|token_type|wpe|embed_positions")
"""Tensors without an input in a forward pass over text: towers that see, tables, biases, Mamba's state."""
ENCODER_DECODERS = ("t5",)

Family = dict[str, Path]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Family]:
    """Give {"base", "tuned"} of an architecture in a form, made once each, in float32, with a tokenizer."""
    made: dict[tuple[str, str], Family] = {}

    def make(name: str, form: str = "hub") -> Family:
        if (name, form) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{form}")
            base = ARCHITECTURES[name].build()
            made[name, form] = {
                "base": save(base, folder / "base", form),
                "tuned": save(fine_tuned(base, 1), folder / "tuned", form),
            }
            make_tokenizer(name, folder / "base")
        return made[name, form]

    return make


def make_tokenizer(name: str, folder: Path) -> None:
    """Save a tokenizer of words; of characters where transformers takes its own class whatever the files say."""
    if name == "qwen2":
        letters = {letter: i for i, letter in enumerate("w0123456789Ġ", 3)}
        Qwen2Tokenizer(vocab={"<|endoftext|>": 0, **letters}, merges=[]).save_pretrained(folder)
    else:
        make_word_tokenizer(folder, range(VOCAB - 8))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 texts of 7 of the tokenizers' words."""
    file = tmp_path_factory.mktemp("text") / "words.txt"
    ids = torch.randint(3, VOCAB - 8, (60, 7), generator=torch.Generator().manual_seed(5)).tolist()
    file.write_text("\n\n".join(" ".join(f"w{i}" for i in row) for row in ids))
    return file


def settings_of(text: Path, file: Path | None = None, **more: Any) -> Settings:
    """Blocks of 32 tokens."""
    return Settings(Calibration(str(text), n_samples=60, block_size=32), importance_file=file, **more)


def blocks_of(n: int = 9, length: int = 12) -> Tensor:
    """Random blocks of ids that no model takes for an image."""
    return torch.randint(3, VOCAB - 8, (n, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("name", "form"), FORMS, ids=[f"{n}-{f}" for n, f in FORMS])
def test_everything_that_takes_text_is_relaxed(
    family: Callable[..., Family], text: Path, tmp_path: Path, name: str, form: str
) -> None:
    """In each stored form of each architecture, every matrix and norm that text reaches is relaxed by the equation in
    fp64, channels along the axis where its inputs are; everything else is as merged; the result loads and is finite."""
    models = family(name, form)
    aim = AimConfig((0.3,), settings_of(text, tmp_path / "imp"), Rule(min_tokens=1))
    out = relax(str(models["tuned"]), str(models["base"]), aim, OutputConfig(tmp_path / "out"), "float32")
    base, merged, relaxed = weights(models["base"]), weights(models["tuned"]), weights(out)
    found = Importance.load(tmp_path / "imp")
    moved = set()
    for key, tensor in relaxed.items():
        if role_of(key) == "input" or key not in found.activations or key.endswith("bias"):
            assert torch.equal(tensor, merged[key]), key
            continue
        expected = merged[key].double() - 0.7 * share(found, key, base[key].shape) * (merged[key] - base[key]).double()
        assert (tensor - expected).abs().max() < 1e-6, key
        moved.add(key)
    takes = {key for key in relaxed if role_of(key) != "input" and not NEVER.search(key)}
    assert moved == {key for key in takes if "relative_attention_bias" not in key}
    model, _ = load(out)
    ids = blocks_of(2)
    extra = {"decoder_input_ids": ids} if name in ENCODER_DECODERS else {}
    with torch.no_grad():
        assert torch.isfinite(model.eval()(input_ids=ids, **extra).logits).all()


def share(found: Importance, key: str, shape: torch.Size) -> Tensor:
    """s = a / max a in fp64, of the weight's number of dimensions."""
    a, axis = found.activations[key].double(), found.axes[key] % len(shape)
    s = a / a.amax(-1, keepdim=True).clamp(min=1e-300)
    wanted = [len(a) if i == 0 and a.dim() == 2 else -1 if i == axis else 1 for i in range(len(shape))]
    return s.reshape(wanted)


def test_both_forms_of_experts_are_relaxed_alike(family: Callable[..., Family], text: Path, tmp_path: Path) -> None:
    """One matrix per expert or all in one tensor: the relaxed weights are the same, and so are the token counts."""
    for name in ("mixtral", "qwen3_moe"):
        models: dict[str, Any] = {}
        for form in ("hub", "own"):
            aim = AimConfig((0.3,), settings_of(text, tmp_path / name / f"{form}.imp"), Rule(min_tokens=1))
            pair, out = family(name, form), tmp_path / name / form
            relax(str(pair["tuned"]), str(pair["base"]), aim, OutputConfig(out), "float32")
            models[form] = load(out)[0].state_dict()
        assert models["hub"].keys() == models["own"].keys()
        for key, tensor in models["hub"].items():
            assert torch.allclose(tensor, models["own"][key], rtol=1e-6, atol=1e-7), key
        hub, own = (Importance.load(tmp_path / name / f"{form}.imp") for form in ("hub", "own"))
        fused = next(key for key in own.tokens if key.endswith("experts.down_proj"))
        single = [count for key, count in hub.tokens.items() if re.search(r"layers\.0\..*experts\.\d\.(w2|down)", key)]
        assert own.tokens[fused] == single
        assert sum(single) == 2 * hub.tokens["model.norm.weight"]  # two experts a token


# what is measured


def recorded(model: nn.Module, wanted: Mapping[str, type | str]) -> tuple[dict[str, list[Tensor]], list[Any]]:
    """Hooks that keep the first input of the named modules, in fp64."""
    kept: dict[str, list[Tensor]] = {name: [] for name in wanted}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: kept[name].append((*args, *kwargs.values())[0].double())

    handles = [
        module.register_forward_pre_hook(keep(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name in wanted
    ]
    return kept, handles


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_neox", "bert", "t5", "falcon", "bloom", "phi3"])
def test_modules_are_measured_by_their_input(name: str) -> None:
    """For every linear layer, Conv1D and norm that runs, a is the mean of |input| over all tokens, computed here from
    hooks in fp64; the output head's is the last norm's output."""
    model = ARCHITECTURES[name].build()
    blocks = blocks_of()
    found = calibrate(model, blocks, batch_size=4)
    kinds = (nn.Linear, nn.LayerNorm)
    wanted = {
        path: type(module)
        for path, module in model.named_modules()
        if isinstance(module, kinds) or type(module).__name__ == "Conv1D" or "Norm" in type(module).__name__
    }
    kept, handles = recorded(model, wanted)
    extra = {"decoder_input_ids": blocks} if name in ENCODER_DECODERS else {}
    with torch.no_grad():
        model(input_ids=blocks, **extra)
    for handle in handles:
        handle.remove()
    checked = 0
    for path, inputs in kept.items():
        if inputs:
            a = torch.cat([x.abs().reshape(-1, x.shape[-1]) for x in inputs]).mean(0)
            assert torch.allclose(found.means[f"{path}.weight"].double(), a, rtol=1e-5), path
            checked += 1
    assert checked == len(found.means)


def test_experts_are_measured_by_the_tokens_routed_to_them() -> None:
    """Each expert's a is the mean over the tokens that the router sends to it, of its input and of what its first
    product makes of them, computed here in fp64 from the router's choices."""
    model = ARCHITECTURES["mixtral"].build()
    model.set_experts_implementation("eager")
    blocks = blocks_of()
    found = calibrate(model, blocks, batch_size=2)
    experts = model.model.layers[1].mlp.experts
    calls: list[Any] = []
    handle = experts.register_forward_pre_hook(lambda module, args: calls.append(args))
    with torch.no_grad():
        model(input_ids=blocks)
    handle.remove()
    ((hidden, chosen, _),) = calls
    name = "model.layers.1.mlp.experts"
    for e in range(3):
        x = hidden[(chosen == e).any(-1)].double()
        assert found.tokens[f"{name}.gate_up_proj"][e] == len(x) > 0
        gate, up = (x @ experts.gate_up_proj[e].double().T).chunk(2, -1)
        inner = (torch.nn.functional.silu(gate) * up).abs().mean(0)
        assert torch.allclose(found.means[f"{name}.gate_up_proj"][e].double(), x.abs().mean(0), rtol=1e-5)
        assert torch.allclose(found.means[f"{name}.down_proj"][e].double(), inner, rtol=1e-4)
    assert (found.axes[f"{name}.gate_up_proj"], found.axes[f"{name}.down_proj"]) == (2, 2)


def test_mamba_is_measured_where_its_weights_are_used() -> None:
    """Mamba uses its convolution and the projection of its time steps without calling their modules: their channels
    are the convolution's inputs, along axis 0, and the first part of x_proj's output; in fp64."""
    model = ARCHITECTURES["mamba"].build()
    blocks = blocks_of()
    found = calibrate(model, blocks, batch_size=4)
    mixer = model.backbone.layers[1].mixer
    kept, handles = recorded(model, {"backbone.layers.1.mixer.in_proj": "", "backbone.layers.1.mixer.out_proj": ""})
    with torch.no_grad():
        model(input_ids=blocks, use_cache=False)
    for handle in handles:
        handle.remove()
    (x,) = kept["backbone.layers.1.mixer.in_proj"]
    hidden = (x @ mixer.in_proj.weight.double().T).chunk(2, -1)[0]
    channels = hidden.shape[-1]
    conv = nn.functional.conv1d(
        hidden.transpose(1, 2), mixer.conv1d.weight.double(), mixer.conv1d.bias.double(), padding=3, groups=channels
    )[..., : blocks.shape[1]]
    active = nn.functional.silu(conv).transpose(1, 2)
    steps = (active @ mixer.x_proj.weight.double().T)[..., : mixer.time_step_rank]
    expected = {"in_proj": x, "conv1d": hidden, "x_proj": active, "dt_proj": steps}
    for part, value in expected.items():
        a = value.abs().reshape(-1, value.shape[-1]).mean(0)
        assert torch.allclose(found.means[f"backbone.layers.1.mixer.{part}.weight"].double(), a, rtol=1e-4), part
    assert found.axes["backbone.layers.1.mixer.conv1d.weight"] == 0
    assert found.axes["backbone.layers.1.mixer.dt_proj.weight"] == 1


# layer by layer


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ENCODER_DECODERS])
def test_layerwise_is_whole(family: Callable[..., Family], name: str) -> None:
    """One layer at a time over any batches gives the statistics of the whole model to 1e-5 relative, the same token
    counts and the same weights."""
    base = open_checkpoint(str(family(name)["base"]))
    blocks = blocks_of()
    whole = calibrate(load_whole(base, "float32", CPU), blocks, batch_size=3)
    layered = calibrate_layerwise(Skeleton(base, "float32", CPU), blocks, batch_size=2)
    assert layered.tokens == whole.tokens
    assert layered.axes == whole.axes
    for key, mean in whole.means.items():
        assert torch.allclose(layered.means[key], mean, rtol=1e-5, atol=1e-12), key


def test_layerwise_reads_each_tensor_once(family: Callable[..., Family], monkeypatch: pytest.MonkeyPatch) -> None:
    """A layerwise calibration reads every stored tensor at most once, and nothing that text does not reach."""
    from merging.checkpoints.checkpoint import Checkpoint

    read: list[str] = []
    real = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: (read.append(name), real(self, name))[1])
    base = open_checkpoint(str(family("llava")["base"]))
    calibrate_layerwise(Skeleton(base, "float32", CPU), blocks_of(), batch_size=4)
    assert len(read) == len(set(read))
    assert not [name for name in read if "vision" in name or "lm_head" in name]
    assert len([name for name in read if ".layers.1." in name]) == 9


def test_layerwise_on_the_disk(family: Callable[..., Family], tmp_path: Path) -> None:
    """Hidden states in a file give the same numbers as in memory, and the file is gone."""
    base = open_checkpoint(str(family("llama")["base"]))
    found = [
        calibrate_layerwise(Skeleton(base, "float32", CPU), blocks_of(), batch_size=4, place=place, folder=tmp_path)
        for place in ("host", "disk")
    ]
    assert all(torch.equal(mean, found[1].means[key]) for key, mean in found[0].means.items())
    assert not list(tmp_path.iterdir())


def test_what_cannot_go_by_layers_is_refused(family: Callable[..., Family]) -> None:
    """A model with an encoder and a decoder is refused with the way that works."""
    base = open_checkpoint(str(family("t5")["base"]))
    with pytest.raises(CalibrationError, match="an encoder and a decoder; use --calibration_mode whole"):
        calibrate_layerwise(Skeleton(base, "float32", CPU), blocks_of())


class Between(nn.Module):
    """A layer that does something to what it hands on."""

    def __init__(self, layer: nn.Module, what: str) -> None:
        super().__init__()
        self.layer, self.what = layer, what

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        """Leave something behind, or call the layer."""
        if self.what == "left":
            kwargs["memory"]["seen"] = hidden_states
        return self.layer(hidden_states, **{k: v for k, v in kwargs.items() if k != "memory"})


@pytest.mark.parametrize(
    ("what", "sentence"),
    [("computed", "something is computed between layers 0 and 1"), ("left", "leaves something for later layers")],
)
def test_more_than_handing_on_is_noticed(family: Callable[..., Family], what: str, sentence: str, monkeypatch) -> None:
    """Where hidden states change between layers, or a layer leaves something for later ones, nothing is measured
    wrongly: it is refused."""
    import types

    base = open_checkpoint(str(family("llama")["base"]))
    skeleton = Skeleton(base, "float32", CPU)
    inner = skeleton.model.model

    def forward(self, input_ids=None, **kwargs):  # type: ignore[no-untyped-def]
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        rotary = self.rotary_emb(hidden, positions)
        memory: dict[str, Tensor] = {}
        for layer in self.layers:
            more = {"memory": memory} if what == "left" else {}
            hidden = layer(hidden, position_embeddings=rotary, **more)
            hidden = hidden * 1.5 if what == "computed" else hidden
        return types.SimpleNamespace(last_hidden_state=self.norm(hidden))

    inner.forward = types.MethodType(forward, inner)
    if what == "left":
        real = type(inner.layers[0]).forward

        def leaving(self, hidden_states, memory=None, **kwargs):  # type: ignore[no-untyped-def]
            memory[id(self)] = hidden_states
            return real(self, hidden_states, **kwargs)

        monkeypatch.setattr(type(inner.layers[0]), "forward", leaving)
    with pytest.raises(CalibrationError, match=sentence):
        calibrate_layerwise(skeleton, blocks_of())


# what is not measured


def test_experts_without_tokens_are_left_as_merged(
    family: Callable[..., Family], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Experts that too few tokens were routed to stay as merged, byte for byte, are counted and said; the others are
    relaxed; in both stored forms, and nothing is ever NaN."""
    for form in ("hub", "own"):
        pair = family("qwen3_moe", form)
        aim = AimConfig((0.0,), settings_of(text, tmp_path / f"{form}.imp"), Rule(min_tokens=1))
        relax(str(pair["tuned"]), str(pair["base"]), aim, OutputConfig(tmp_path / f"{form}-all"), "float32")
        found = Importance.load(tmp_path / f"{form}.imp")
        counts = {key: count for key, count in found.tokens.items() if "experts" in key}
        least = min(c for count in counts.values() for c in (count if isinstance(count, list) else [count]))
        few = AimConfig((0.0,), aim.settings, Rule(min_tokens=least + 1))
        out = tmp_path / f"{form}-few"
        capsys.readouterr()
        relax(str(pair["tuned"]), str(pair["base"]), few, OutputConfig(out), "float32")
        assert f"with fewer than {least + 1} tokens" in capsys.readouterr().err
        merged, relaxed = weights(pair["tuned"]), weights(out)
        left = 0
        for key, count in counts.items():
            for i, c in enumerate(count if isinstance(count, list) else [count]):
                same = torch.equal(*(w[key][i] if isinstance(count, list) else w[key] for w in (merged, relaxed)))
                assert same == (c <= least), (key, i)
                left += same
        assert left
        assert all(torch.isfinite(tensor).all() for tensor in relaxed.values())


def test_rules_on_names(family: Callable[..., Family], text: Path, tmp_path: Path) -> None:
    """--include, --exclude and --keep_base by regular expression: tensors not included or excluded are as merged, those
    kept are the base's, byte for byte, whatever the activations say."""
    pair = family("llava")
    rule = Rule(include=r"layers|vision", exclude=r"mlp", keep_base=r"vision_tower")
    aim = AimConfig((0.2,), settings_of(text), rule)
    out = relax(str(pair["tuned"]), str(pair["base"]), aim, OutputConfig(tmp_path / "out"), None)
    base, merged, relaxed = weights(pair["base"]), weights(pair["tuned"]), weights(out)
    for key, tensor in relaxed.items():
        if "vision_tower" in key:
            assert torch.equal(tensor, base[key]), key
        elif "mlp" in key or "language_model.model.layers" not in key:
            assert torch.equal(tensor, merged[key]), key
        else:
            assert not torch.equal(tensor, merged[key]), key


def test_vision_is_left_as_merged_and_said(
    family: Callable[..., Family], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text does not reach a vision tower: it is left as merged, and the screen says why."""
    pair = family("gemma3_vision")
    relax(
        str(pair["tuned"]),
        str(pair["base"]),
        AimConfig((0.2,), settings_of(text)),
        OutputConfig(tmp_path / "out"),
        None,
    )
    assert "text does not reach the vision tower" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["qwen2", "bert", "gpt2"])
def test_tied_head_is_relaxed_on_request(family: Callable[..., Family], text: Path, tmp_path: Path, name: str) -> None:
    """A tied embedding is as merged, and with relax_tied relaxed by what the output head gets, whatever its name."""
    pair = family(name)
    table = next(key for key in weights(pair["base"]) if role_of(key) == "input")
    merged, base = weights(pair["tuned"])[table], weights(pair["base"])[table]
    for tied in (False, True):
        aim = AimConfig((0.0,), settings_of(text, tmp_path / f"{tied}.imp"), Rule(relax_tied=tied))
        out = relax(str(pair["tuned"]), str(pair["base"]), aim, OutputConfig(tmp_path / f"{tied}"), None)
        found = Importance.load(tmp_path / f"{tied}.imp")
        a = found.activations[found.heads[table]]
        top = int(a.argmax())
        relaxed = weights(out)[table]
        assert torch.equal(relaxed[:, top], (base if tied else merged)[:, top])
        assert torch.equal(relaxed, merged) != tied
    with quiet():
        load(tmp_path / "True")
