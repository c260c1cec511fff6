"""Adapters as results: a relaxed adapter, and a merge of adapters, are what the whole models would be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

import merge as merge_script
import performAIM
from aim.config import AimConfig
from aim.importance import Importance
from aim.pipeline import relax, relaxation_spec
from common.cli import run as run_main
from common.errors import CheckpointError, UsageError
from merging.checkpoints.checkpoint import open_checkpoint
from merging.lora.tensors import inner_products, relax_columns
from merging.pipeline import merge
from merging.plan.merge_plan import OutputConfig
from merging.recipe import make_recipe
from scripts import verify
from tests.helpers.tiny import VOCABULARY, fine_tune, make_gpt2, make_llama, make_tokenizer, train, weights, write_texts

Bases = dict[str, Path]
A, B = "lora_A.weight", "lora_B.weight"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """A bf16 Llama, one whose embeddings are tied, and a GPT-2, and where their importance will be kept."""
    folder = tmp_path_factory.mktemp("bases")
    write_texts(folder / "text.jsonl", n=20)
    return {
        "llama": make_llama(folder / "llama"),
        "tied": make_llama(folder / "tied", tied=True),
        "gpt2": make_gpt2(folder / "gpt2"),
    }


def asked(base: Path, omega: Any = 0.4, **given: Any) -> AimConfig:
    """AIM with the base's importance, which the first that asks for it measures."""
    file = base.with_name(f"{base.name}.importance.safetensors")
    text = {} if file.exists() else {"calibration": str(base.with_name("text.jsonl")), "block_size": 64}
    return AimConfig.from_mapping({"omega": omega, "importance": file, **text, **given})


def relaxed(base: Path, adapter: Path, out: Path, omega: Any = 0.4, dtype: str | None = None, **given: Any) -> Path:
    """The relaxed adapter."""
    output = OutputConfig(out, save_as="adapter")
    return relax(f"{base}+{adapter}", str(base), asked(base, omega, **given), output, dtype)


def merged(base: Path, adapters: list[Path], out: Path, save_as: str = "adapter", **flags: Any) -> Path:
    """Adapters merged over their base; omega relaxes in the same pass."""
    omega = flags.pop("omega", None)
    models = [f"{base}+{adapter}" for adapter in adapters]
    recipe = make_recipe({"method": "task_arithmetic", "base_model": str(base), "models_to_merge": models, **flags}, {})
    output = OutputConfig(out, save_as=save_as)
    return merge(recipe, output, None if omega is None else relaxation_spec(asked(base, omega), output, recipe))


def tensors(adapter: Path) -> dict[str, torch.Tensor]:
    """What an adapter's file holds, by what PEFT calls it in the model."""
    found = load_file(adapter / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model."): tensor for key, tensor in found.items()}


def settings(adapter: Path) -> dict[str, Any]:
    """Its config."""
    return json.loads((adapter / "adapter_config.json").read_text())


def activations(base: Path) -> Importance:
    """The base's importance file."""
    return Importance.load(base.with_name(f"{base.name}.importance.safetensors"))


def logits(base: Path, adapter: Path | None = None) -> torch.Tensor:
    """What a model, or PEFT with an adapter, computes of a few tokens in fp32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return model(torch.arange(3, 35)[None]).logits


def same_model(base: Path, adapter: Path, full: Path) -> None:
    """Assert that base+adapter has the weights of a checkpoint to fp32 rounding, and PEFT its logits."""
    ours, theirs = open_checkpoint(f"{base}+{adapter}"), weights(full)
    for name in theirs:
        torch.testing.assert_close(ours.read(name).float(), theirs[name].float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(base, adapter), logits(full), rtol=1e-4, atol=2e-5)


# relaxing one adapter

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "alpha over r": ("llama", {}),
    "every linear layer, rsLoRA": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "patterns": ("llama", {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 3}}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "whole modules": ("llama", {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "whole modules of a tied base": ("tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "head of a tied base": ("tied", {"target_modules": ["lm_head", "q_proj"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "square Conv1D": ("gpt2", {"target_modules": ["attn.c_proj"], "fan_in_fan_out": False}),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_relaxed_adapter_is_the_relaxed_model(bases: Bases, tmp_path: Path, kind: str) -> None:
    """theta_0 + s B (A diag(f)) has the weights of the checkpoint that the ordinary relaxation writes; PEFT gives its
    logits."""
    base, how = bases[KINDS[kind][0]], KINDS[kind][1]
    train(base, tmp_path / "lora", **how)
    if kind == "square Conv1D":  # PEFT writes true there; other tools may not
        file = tmp_path / "lora" / "adapter_config.json"
        file.write_text(json.dumps(settings(tmp_path / "lora") | {"fan_in_fan_out": False}))
    full = relax(f"{base}+{tmp_path / 'lora'}", str(base), asked(base), OutputConfig(tmp_path / "full"), "float32")
    out = relaxed(base, tmp_path / "lora", tmp_path / "out")
    same_model(base, out, full)
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "merge.lock.json", "run_record.json",
    ]  # fmt: skip


def test_omega_1_keeps_the_adapter(bases: Bases, tmp_path: Path) -> None:
    """At omega 1 every tensor has the adapter's bytes and the config says what it said, zeros and their signs included;
    so has one that was saved as .bin, with the adapter's name in its keys."""
    base, lora = bases["llama"], tmp_path / "lora"
    train(base, lora, target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"], use_rslora=True)
    before = {key: tensor.bfloat16() for key, tensor in load_file(lora / "adapter_model.safetensors").items()}
    before["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"][0, :2] = torch.tensor([0.0, -0.0])
    save_file(before, lora / "adapter_model.safetensors")
    named = shutil.copytree(lora, tmp_path / "named")
    (named / "adapter_model.safetensors").unlink()
    torch.save({k.replace(".weight", ".default.weight") if "lora_" in k else k: v for k, v in before.items()},
               named / "adapter_model.bin")  # fmt: skip
    for adapter in (lora, named):
        out = relaxed(base, adapter, tmp_path / f"out-{adapter.name}", omega=1)
        after = load_file(out / "adapter_model.safetensors")
        assert after.keys() == before.keys()
        for key, tensor in before.items():
            assert torch.equal(after[key].view(torch.uint8), tensor.view(torch.uint8)), key
        assert settings(out) == settings(lora)


def test_the_most_active_channel_and_the_factors(bases: Bases, tmp_path: Path) -> None:
    """A' = A diag(1 - (1 - omega) s) rounded once to the stored dtype; at omega 0 the most active channel is +0; B is
    as it was; embeddings, looked up and not multiplied, keep both factors; one of several omegas is as alone."""
    base, lora = bases["llama"], tmp_path / "lora"
    train(base, lora, target_modules=["q_proj", "down_proj", "embed_tokens"])
    stored = {key: tensor.bfloat16() for key, tensor in load_file(lora / "adapter_model.safetensors").items()}
    save_file(stored, lora / "adapter_model.safetensors")
    before = tensors(lora)
    out = relaxed(base, lora, tmp_path / "out", omega=[0, 0.4])
    assert (relaxed(base, lora, tmp_path / "one") / "adapter_model.safetensors").read_bytes() == (
        out / "omega-0.4" / "adapter_model.safetensors"
    ).read_bytes()
    wide = relaxed(base, lora, tmp_path / "wide", dtype="float32")
    measured = activations(base).activations
    for folder, omega, dtype in ((out / "omega-0", 0.0, torch.bfloat16), (wide, 0.4, torch.float32)):
        after = tensors(folder)
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            assert after[name].dtype == dtype
            if not name.endswith(A):
                assert torch.equal(after[name], tensor.to(dtype)), name
                continue
            a = measured[name.replace(A, "weight")]
            pull = (a / a.max()).double() * (1 - omega)
            assert torch.equal(after[name], (tensor.double() * (1 - pull)).to(dtype)), name
            if omega == 0:
                column = after[name][:, a.argmax()]
                assert torch.equal(column.view(torch.int16), torch.zeros_like(column, dtype=torch.int16))
    record = json.loads((out / "omega-0" / "run_record.json").read_text())
    assert record["relaxation"]["not_relaxed"] == {"embedding": ["model.embed_tokens.weight"]}
    assert record["lineage"]["omega"] == 0


def test_columns_by_hand() -> None:
    """Columns shrink by 1 - pull; 0 keeps the bits of any value, 1 gives +0."""
    a = torch.tensor([[2.0, -0.0, -3.0], [1.0, 5.0, -1.0]])
    found = relax_columns(a, torch.tensor([0.25, 0.0, 1.0], dtype=torch.float64))
    assert found.tolist() == [[1.5, 0.0, 0.0], [0.75, 5.0, 0.0]]
    assert torch.equal(torch.signbit(found), torch.tensor([[False, True, False], [False, False, False]]))
    assert relax_columns(a, torch.zeros(3, dtype=torch.float64)) is a


def test_rules_hold_for_factors(bases: Bases, tmp_path: Path) -> None:
    """--exclude leaves factors as they are, --keep_base makes A zero, so that the module is the base's."""
    base, lora = bases["llama"], tmp_path / "lora"
    train(base, lora)
    after, before = (
        tensors(relaxed(base, lora, tmp_path / "out", exclude="down_proj", keep_base=r"layers\.1.*q_proj")),
        tensors(lora),
    )
    for name in before:
        if "layers.1.self_attn" in name and name.endswith(A):
            assert not after[name].any()
        elif "down_proj" in name or name.endswith(B):
            assert torch.equal(after[name], before[name])
        else:
            assert not torch.equal(after[name], before[name])


def test_factors_of_experts(bases: Bases, tmp_path: Path) -> None:
    """Factors of each expert of a mixture are relaxed by the expert's own channels and merged; PEFT, which fuses them
    on loading, computes the logits of the relaxed model."""
    base = tmp_path / "base"
    sizes = {"num_hidden_layers": 1, "num_local_experts": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, max_position_embeddings=64, **sizes
    )
    MixtralForCausalLM(config).save_pretrained(base)
    make_tokenizer(base)
    shutil.copy(bases["llama"].with_name("text.jsonl"), tmp_path)
    for adapter in ("1", "2"):
        factors = {}
        for name in weights(base):
            if ".experts." in name or "q_proj" in name:
                out, width = weights(base)[name].shape
                stem = f"base_model.model.{name.removesuffix('weight')}"
                factors |= {f"{stem}{A}": torch.randn(2, width) / 4, f"{stem}{B}": torch.randn(out, 2) / 4}
        (tmp_path / adapter).mkdir()
        save_file(factors, tmp_path / adapter / "adapter_model.safetensors")
        told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "w1", "w2", "w3"]}
        (tmp_path / adapter / "adapter_config.json").write_text(json.dumps(told))
    name, loose = f"{base}+{tmp_path / '1'}", {"omega": 0.2, "min_tokens": 1}
    full = relax(name, str(base), asked(base, **loose), OutputConfig(tmp_path / "full"), "float32")
    same_model(base, relaxed(base, tmp_path / "1", tmp_path / "out", **loose), full)
    both = [tmp_path / "1", tmp_path / "2"]
    same_model(base, merged(base, both, tmp_path / "m"), merged(base, both, tmp_path / "mf", "model", dtype="float32"))


def test_adapter_with_tokens_of_its_own(bases: Bases, tmp_path: Path) -> None:
    """An adapter with a new token keeps its rows and brings its tokenizer; the new row of the head has no base and
    stays, the others are relaxed as in the ordinary way."""
    base, lora, grown = bases["llama"], tmp_path / "lora", tmp_path / "grown"
    fine_tune(base, grown, seed=1, extra=("<new>",))
    train(grown, lora, modules_to_save=["embed_tokens", "lm_head"])
    AutoTokenizer.from_pretrained(grown).save_pretrained(lora)
    full = relax(f"{base}+{lora}", str(base), asked(base), OutputConfig(tmp_path / "full"), "float32")
    out = relaxed(base, lora, tmp_path / "out")
    for name, tensor in weights(full).items():
        torch.testing.assert_close(open_checkpoint(f"{base}+{out}").read(name).float(), tensor, rtol=0, atol=1e-6)
    assert torch.equal(tensors(out)["lm_head.weight"][-1], tensors(lora)["lm_head.weight"][-1])
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<new>") == VOCABULARY


# merging adapters

METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"weights": [1, -0.5, 0.3], "scaling": 0.8},
    "task_arithmetic, normalized": {"method": "task_arithmetic", "weights": [1, 2, 3], "normalize": True},
    "linear": {"weights": [1, 2, 1]},
    "linear of weights that add up": {"method": "linear", "weights": [0.5, 0.75, -0.25], "normalize": False},
    "model_stock": {},
    "multislerp": {"weights": [1, 2, 1]},
}


@pytest.fixture(scope="module")
def three(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of the Llama that differ in modules, rank, alpha, the square root, and dtype."""
    folder = tmp_path_factory.mktemp("three")
    ways: list[dict[str, Any]] = [
        {},
        {
            "target_modules": ["q_proj", "v_proj", "lm_head"],
            "r": 3,
            "lora_alpha": 6,
            "alpha_pattern": {"layers.0.*": 5},
        },
        {"target_modules": "all-linear", "r": 2, "use_rslora": True},
    ]
    for i, how in enumerate(ways):
        train(bases["llama"], folder / str(i), seed=i, **how)
    file = folder / "2" / "adapter_model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(file).items()}, file)
    return [folder / str(i) for i in range(3)]


@pytest.mark.parametrize("kind", METHODS)
def test_merged_adapter_is_the_merged_model(bases: Bases, three: list[Path], tmp_path: Path, kind: str) -> None:
    """Factors side by side are the checkpoint that the same method writes of the adapted models, relaxed or not."""
    flags = {"method": kind, **METHODS[kind]}
    flags["dtype"] = "float32"
    out = merged(bases["llama"], three, tmp_path / "out", **flags)
    same_model(bases["llama"], out, merged(bases["llama"], three, tmp_path / "full", "model", **flags))
    assert tensors(out)[f"model.layers.0.self_attn.q_proj.{A}"].shape == (4 + 3 + 2, 48)
    if kind == "task_arithmetic":
        relaxed_out = merged(bases["llama"], three, tmp_path / "relaxed", omega=0.3, **flags)
        full = merged(bases["llama"], three, tmp_path / "whole", "model", omega=0.3, **flags)
        same_model(bases["llama"], relaxed_out, full)


def test_two_adapters_on_their_arc(bases: Bases, three: list[Path], tmp_path: Path) -> None:
    """NuSLERP of task vectors is an adapter too."""
    flags = {"method": "nuslerp", "weights": [1, 2]}
    out = merged(bases["llama"], three[:2], tmp_path / "out", **flags)
    same_model(
        bases["llama"], out, merged(bases["llama"], three[:2], tmp_path / "full", "model", dtype="float32", **flags)
    )


def test_merged_adapter_is_pefts_concatenation(bases: Bases, three: list[Path], tmp_path: Path) -> None:
    """PEFT's own weighted concatenation of adapters computes the same logits."""
    first, second = three[0], tmp_path / "second"
    train(bases["llama"], second, seed=9, r=2)
    out = merged(bases["llama"], [first, second], tmp_path / "out", weights=[0.7, 0.6])
    model = AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.float32).eval()
    theirs = peft.PeftModel.from_pretrained(model, first, adapter_name="first")
    theirs.load_adapter(second, "second")
    theirs.add_weighted_adapter(["first", "second"], [0.7, 0.6], "both", combination_type="cat")
    theirs.set_adapter("both")
    with torch.no_grad():
        expected = theirs(torch.arange(3, 35)[None]).logits
    torch.testing.assert_close(logits(bases["llama"], out), expected, rtol=1e-4, atol=1e-5)


def test_adapters_that_count_alike_keep_their_bytes(bases: Bases, tmp_path: Path) -> None:
    """With equal scalings and weights nothing is rounded: the result's factors are the adapters', its alpha carries the
    rest, and where they select the same modules so does it; whole numbers stay whole."""
    for i in (1, 2):
        train(bases["llama"], tmp_path / str(i), seed=i)
    out = merged(bases["llama"], [tmp_path / "1", tmp_path / "2"], tmp_path / "out", method="linear")
    one, two, both = tensors(tmp_path / "1"), tensors(tmp_path / "2"), tensors(out)
    for name in one:
        assert torch.equal(both[name], torch.cat([one[name], two[name]], 0 if name.endswith(A) else 1))
    found = settings(out)
    assert (found["r"], found["lora_alpha"], found["rank_pattern"], found["alpha_pattern"]) == (8, 8, {}, {})
    assert sorted(found["target_modules"]) == ["down_proj", "q_proj"]
    assert settings(merged(bases["llama"], [tmp_path / "1"], tmp_path / "half", weights=0.5))["lora_alpha"] == 4


def test_what_is_whole_in_one_adapter(bases: Bases, tmp_path: Path) -> None:
    """Biases, whole modules, and a module that is whole in one adapter and adapted in another: each merged from the
    base's rows as the ordinary way does, and loaded by PEFT; relaxed too."""
    for base, one, two in (
        (bases["gpt2"], {"target_modules": ["c_attn"], "bias": "all"}, {"target_modules": ["c_proj"], "bias": "none"}),
        (
            bases["llama"],
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "layers.0.mlp.up_proj"]},
            {
                "target_modules": ["lm_head", "up_proj", "embed_tokens"],
                "modules_to_save": ["layers.1.self_attn.k_proj"],
            },
        ),
    ):
        turned = {"fan_in_fan_out": True} if base == bases["gpt2"] else {}
        folder = tmp_path / base.name
        train(base, folder / "1", seed=1, **one, **turned)
        train(base, folder / "2", seed=2, **two, **turned)
        for omega in (None, 0.2):
            flags = {"weights": [1, 0.5], "omega": omega}
            out = merged(base, [folder / "1", folder / "2"], folder / f"out{omega}", **flags)
            full = merged(
                base, [folder / "1", folder / "2"], folder / f"full{omega}", "model", dtype="float32", **flags
            )
            same_model(base, out, full)
    found = tensors(tmp_path / "llama" / "out0.2")
    for name in (f"layers.1.mlp.up_proj.{A}", "layers.0.mlp.up_proj.weight", "embed_tokens.lora_embedding_A"):
        assert f"model.{name}" in found


def test_base_weights_are_not_read(bases: Bases, three: list[Path], tmp_path: Path) -> None:
    """A merge of factors needs no value of the base: one whose weights are a hole behind their header does as well."""
    base = shutil.copytree(bases["llama"], tmp_path / "llama")
    expected = merged(base, three[::2], tmp_path / "out") / "adapter_model.safetensors"
    found = load_file(expected)
    kinds = [
        found[f"base_model.model.model.layers.0.{module}.{A}"].dtype for module in ("mlp.gate_proj", "mlp.down_proj")
    ]
    assert kinds == [torch.bfloat16, torch.float32]  # as stored in the one adapter that has it; the wider of two
    file = base / "model.safetensors"
    with file.open("r+b") as stream:
        size = file.stat().st_size
        stream.truncate(8 + int.from_bytes(stream.read(8), "little"))
        stream.truncate(size)
    again = merged(base, three[::2], tmp_path / "again") / "adapter_model.safetensors"
    assert again.read_bytes() == expected.read_bytes()


def test_inner_products_of_factors(bases: Bases, three: list[Path]) -> None:
    """<tau_i, tau_j> from small matrices are those of the matrices themselves, on one thread or two."""
    from merging.planning import plan_merge

    models = [f"{bases['llama']}+{adapter}" for adapter in three]
    recipe = make_recipe({"method": "model_stock", "base_model": str(bases["llama"]), "models_to_merge": models}, {})
    plan = plan_merge(recipe, OutputConfig(Path("out"), save_as="adapter"))
    base = open_checkpoint(str(bases["llama"]))
    for sum_ in plan.layout.sums[:4]:
        taus = [open_checkpoint(m).read(sum_.name).double() - base.read(sum_.name).double() for m in models]
        expected = torch.tensor([[float((x * y).sum()) for y in taus] for x in taus], dtype=torch.float64)
        torch.set_num_threads(1)
        found = inner_products(sum_)
        torch.set_num_threads(2)
        assert torch.equal(found, inner_products(sum_))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# what is refused

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a method of entries": ({"method": "ties"}, "ties changes single entries.*use linear, task_arithmetic"),
    "a scaled base": ({"method": "linear", "normalize": False}, "scales the base by the sum of the weights, 2"),
    "a scaled passthrough": ({"method": "passthrough", "scale": 0.5}, "scale of passthrough scales the base too"),
    "an angle for each row": ({"method": "model_stock", "filter_wise": True}, "take filter_wise away"),
    "no base for an arc": ({"method": "nuslerp", "base_model": None}, "only with --base_model"),
    "rows for the base": ({"pad_to_multiple_of": 64}, "pad_to_multiple_of gives the base more rows"),
    "the original's numerics": ({"numerics": "reference"}, "which is for whole models"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_adapter_is_refused(bases: Bases, three: list[Path], tmp_path: Path, what: str) -> None:
    """A result that is no product of two small matrices is refused with what to do instead, and nothing is written."""
    flags, says = REFUSED[what]
    adapters = three[:1] if flags.get("method") == "passthrough" else three[:2]
    with pytest.raises(UsageError, match=says):
        merged(
            bases["llama"],
            adapters,
            tmp_path / "out",
            **{k: v for k, v in flags.items() if v is not None}
            | ({"base_model": None} if "base_model" in flags else {}),
        )
    assert not list(tmp_path.iterdir())


def test_other_bases_and_whole_models_are_refused(bases: Bases, three: list[Path], tmp_path: Path) -> None:
    """Adapters must lie over one base, the one that is named; whole models and contradicting configs are refused."""
    base, other = bases["llama"], shutil.copytree(bases["llama"], tmp_path / "other")
    given = {"method": "task_arithmetic", "base_model": str(base)}
    out = OutputConfig(tmp_path / "out", save_as="adapter")
    for models, says in (
        ([f"{base}+{three[0]}", f"{other}+{three[1]}"], "has another base than"),
        ([f"{base}+{three[0]}", str(other)], "is a whole model"),
    ):
        with pytest.raises(UsageError, match=says):
            merge(make_recipe({**given, "models_to_merge": models}, {}), out)
    for merged_model, says in ((str(other), "is a whole model"), (f"{other}+{three[0]}", "has another base than")):
        with pytest.raises(UsageError, match=says):
            relax(merged_model, str(base), asked(base), out, None)
    dora = shutil.copytree(three[0], tmp_path / "dora")
    (dora / "adapter_config.json").write_text(json.dumps(settings(dora) | {"use_dora": True}))
    with pytest.raises(CheckpointError, match=r"states use_dora True and it has no magnitude vectors"):
        relaxed(base, dora, tmp_path / "out")
    with pytest.raises(UsageError, match="--layer_stats needs whole tensors"):
        relax(
            f"{base}+{three[0]}",
            str(base),
            asked(base),
            OutputConfig(tmp_path / "out", layer_stats=True, save_as="adapter"),
            None,
        )
    assert not (tmp_path / "out").exists()


def test_a_result_that_would_not_load_is_refused(bases: Bases, three: list[Path], tmp_path: Path) -> None:
    """PEFT is asked on the meta device before anything is written: a config that selects other modules is refused."""
    lora = shutil.copytree(three[0], tmp_path / "lora")
    for targets, says in (
        (["q_proj"], "unexpected: .*down_proj"),
        (["q_proj", "down_proj", "k_proj"], "missing: .*k_proj"),
    ):
        (lora / "adapter_config.json").write_text(json.dumps(settings(lora) | {"target_modules": targets}))
        with pytest.raises(CheckpointError, match=f"would not load in PEFT .*{says}"):
            relaxed(bases["llama"], lora, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_numbers_that_a_dtype_cannot_hold(bases: Bases, three: list[Path], tmp_path: Path) -> None:
    """A factor that overflows is refused by name, and the folder does not appear."""
    lora = shutil.copytree(three[0], tmp_path / "lora")
    file = lora / "adapter_model.safetensors"
    save_file({key: tensor * 1e30 for key, tensor in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match=r"down_proj\.lora_A\.weight of the result is not finite"):
        relaxed(bases["llama"], lora, tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


# the scripts


def test_repeating_checking_and_replacing(bases: Bases, three: list[Path], tmp_path: Path, capsys: Any) -> None:
    """--from_lock repeats a merge and a relaxation to the same bytes, verify.py recomputes them and finds a changed
    tensor, another base or another adapter; --overwrite replaces only what was written here."""
    base = shutil.copytree(bases["llama"], tmp_path / "llama")
    lora = shutil.copytree(three[1], tmp_path / "lora")
    importance = asked(bases["llama"]).settings.importance_file
    relaxed(bases["llama"], three[0], tmp_path / "first")  # measures the importance where no test did
    models = f"{base}+{three[0]},{base}+{lora}"
    common = ["--importance", str(importance), "--save_as", "adapter", "--quiet"]
    commands: list[tuple[Callable[..., int], list[str]]] = [
        (merge_script.main, ["--method", "linear", "--models_to_merge", models, "--omega", "0.3", *common]),
        (
            performAIM.main,
            ["--merged_model", f"{base}+{lora}", "--pretrained_model_name", str(base), "--omega", "0.3", *common],
        ),
    ]
    for i, (script, arguments) in enumerate(commands):
        out, again = tmp_path / f"out{i}", tmp_path / f"again{i}"
        assert run_main(script, [*arguments, "--save_path", str(out)]) == 0
        assert run_main(merge_script.main, ["--from_lock", str(out), "--save_path", str(again), "--quiet"]) == 0
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (out / name).read_bytes() == (again / name).read_bytes()
        assert run_main(verify.main, [str(out), "--recompute", "all", "--quiet"]) == 0
        assert run_main(script, [*arguments, "--save_path", str(out)]) == 2
        assert "is not empty" in capsys.readouterr().err
        assert run_main(script, [*arguments, "--save_path", str(out), "--overwrite"]) == 0
    onto = [
        "--merged_model",
        f"{base}+{out}",
        "--pretrained_model_name",
        str(base),
        "--save_path",
        str(out),
        "--overwrite",
    ]
    assert run_main(performAIM.main, [*onto, *common]) == 2
    assert "would write over or into the input" in capsys.readouterr().err
    file = again / "adapter_model.safetensors"
    changed = load_file(file)
    key = next(iter(changed))
    save_file(changed | {key: changed[key] + 1}, file)
    assert run_main(verify.main, [str(again), "--quiet"]) == 1
    moved = ["--models_to_merge", f"{bases['llama']}+{three[2]}", "--base_model", str(bases["llama"])]
    assert run_main(verify.main, [str(out), "--recompute", "all", *moved]) == 3
    assert "is not the file of the lock" in capsys.readouterr().err
    make_llama(tmp_path / "wide", hidden=64)
    save_file(load_file(tmp_path / "wide" / "model.safetensors"), base / "model.safetensors")
    assert run_main(verify.main, [str(out), "--recompute", "all"]) == 3


def test_dry_run_tells_and_writes_nothing(bases: Bases, three: list[Path], tmp_path: Path, capsys: Any) -> None:
    """--dry_run prints ranks, config and size, in words or as JSON."""
    models = ",".join(f"{bases['llama']}+{adapter}" for adapter in three)
    command = ["--method", "task_arithmetic", "--base_model", str(bases["llama"]), "--models_to_merge", models,
               "--save_path", str(tmp_path / "out"), "--save_as", "adapter", "--dry_run"]  # fmt: skip
    assert run_main(merge_script.main, command) == 0
    assert (
        "an adapter of 15 matrices: rank 2 (8), rank 3 (1), rank 5 (2), rank 6 (2), rank 9 (2)"
        in capsys.readouterr().out
    )
    (tmp_path / "recipe.yaml").write_text("save_as: adaptor")
    assert run_main(merge_script.main, [*command[:-3], "--dry_run", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert "save_as must be one of model, adapter, found 'adaptor'" in capsys.readouterr().err
    assert run_main(merge_script.main, [*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["result"]["factors"] == 15
    assert plan["settings"]["rank_pattern"]["q_proj"] == 9
    assert not (tmp_path / "out").exists()


def test_interrupted_and_resumed(bases: Bases, three: list[Path], tmp_path: Path, monkeypatch: Any) -> None:
    """An interrupted run leaves no folder at the target, and --resume ends with the same bytes."""
    from merging.output.writer import ShardedWriter

    whole = merged(bases["llama"], three, tmp_path / "whole")
    end, count = ShardedWriter.end, iter(range(100))

    def stops(self: ShardedWriter, *arguments: Any) -> None:
        if next(count) == 7:
            raise KeyboardInterrupt
        end(self, *arguments)

    monkeypatch.setattr(ShardedWriter, "end", stops)
    with pytest.raises(KeyboardInterrupt):
        merged(bases["llama"], three, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    models = [f"{bases['llama']}+{adapter}" for adapter in three]
    recipe = make_recipe(
        {"method": "task_arithmetic", "base_model": str(bases["llama"]), "models_to_merge": models}, {}
    )
    out = merge(recipe, OutputConfig(tmp_path / "out", resume=True, save_as="adapter"))
    assert (out / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
