"""Adapters as PEFT saves them: the adapted model is what `merge_and_unload` makes, and computes what PEFT computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import merge as merge_script
from common.cli import run as run_main
from common.errors import CheckpointError
from merging.checkpoints.checkpoint import open_checkpoint
from tests.helpers.tiny import VOCABULARY, make_gpt2, make_llama, make_tokenizer, weights
from tests.helpers.tiny import train as train_plain

IDS = torch.arange(3, 35)[None]


def make_experts(folder: Path, kind: str) -> Path:
    """Save a tiny mixture of experts: stored apart (Mixtral, Qwen3) or stacked (experts, in, out) (gpt-oss)."""
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "num_experts_per_tok": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    model: Any
    if kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(hidden_size=32, intermediate_size=24, num_local_experts=3, **sizes))
    elif kind == "qwen3":
        experts = {"num_experts": 3, "moe_intermediate_size": 16, "decoder_sparse_step": 1, "head_dim": 8}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(hidden_size=32, intermediate_size=24, **experts, **sizes))
    else:  # down_proj is square, as in the published models
        config = GptOssConfig(hidden_size=32, intermediate_size=32, num_local_experts=3, head_dim=8, **sizes)
        model = GptOssForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama, one with a tied head, a GPT-2 and three mixtures of experts, in fp32."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        "llama": make_llama(folder / "llama", dtype=torch.float32),
        "tied": make_llama(folder / "tied", tied=True, dtype=torch.float32),
        "gpt2": make_gpt2(folder / "gpt2"),
        **{kind: make_experts(folder / kind, kind) for kind in ("mixtral", "qwen3", "gpt_oss")},
    }


def train(base: Path, folder: Path, rows: int | None = None, **settings: Any) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Save a random adapter by PEFT; return PEFT's logits with it, and after `merge_and_unload`, and that model."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    chosen = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, "target_modules": ["q_proj", "down_proj"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **(chosen | settings))).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and ("lora_" not in name or "magnitude" in name or "lora_B" in name):
                parameter.add_(torch.randn_like(parameter).abs() * 0.05)
    adapted.save_pretrained(str(folder))
    with torch.no_grad():
        running = adapted(IDS).logits
        merged = adapted.merge_and_unload()
        return running, merged(IDS).logits, merged


def ours(base: Path, adapter: Path, out: Path) -> Any:
    """The adapted model as `merge.py --method passthrough` saves it in fp32, loaded by transformers."""
    arguments = ["--method", "passthrough", "--models_to_merge", f"{base}+{adapter}", "--save_path", str(out)]
    assert run_main(merge_script.main, [*arguments, "--dtype", "float32", "--quiet"]) == 0
    model, report = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, tuple[str, int | None, dict[str, Any]]] = {
    "DoRA": ("llama", None, {"use_dora": True, "target_modules": LINEAR}),
    "DoRA, rank-stabilized, patterns": (
        "llama",
        None,
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5}},
    ),
    "DoRA of Conv1D": ("gpt2", None, {"use_dora": True, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "DoRA of square Conv1D": (
        "gpt2",
        None,
        {"use_dora": True, "target_modules": ["attn.c_proj"], "fan_in_fan_out": True},
    ),
    "DoRA of an embedding": ("llama", None, {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
    "bias of B": ("gpt2", None, {"lora_bias": True, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "single tokens": ("llama", None, {"trainable_token_indices": [1, 5, 300]}),
    "single tokens of a tied base": ("tied", None, {"trainable_token_indices": {"embed_tokens": [2, 7]}}),
    "single tokens of the head": ("llama", None, {"trainable_token_indices": {"lm_head": [2], "embed_tokens": [4, 0]}}),
    "more tokens, whole modules": ("llama", 325, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "fewer tokens, whole modules": ("llama", 311, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "more tokens, factors of both": ("llama", 325, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "more tokens, tied, whole embedding": ("tied", 325, {"modules_to_save": ["embed_tokens"]}),
    "more tokens, tied, both whole": ("tied", 325, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "more tokens, tied, factors of the head": ("tied", 325, {"target_modules": ["lm_head", "q_proj"]}),
    "tied on purpose, whole": ("tied", None, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied on purpose, factors": ("tied", None, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "experts of Mixtral": ("mixtral", None, EXPERTS),
    "experts and attention of Mixtral": (
        "mixtral",
        None,
        {**EXPERTS, "target_modules": ["q_proj"], "use_rslora": True},
    ),
    "down projections of Qwen3": ("qwen3", None, {**EXPERTS, "target_parameters": ["experts.down_proj"]}),
    "experts of Qwen3": ("qwen3", None, EXPERTS),
    "experts of gpt-oss": ("gpt_oss", None, EXPERTS),
}
RUNNING = ("more tokens, tied, factors of the head", "tied on purpose, factors")
"""Where PEFT's merge differs from its forward pass, which is what was trained: a tied table is changed in both places,
once for each of them."""


@pytest.mark.parametrize("kind", KINDS)
def test_adapted_model_is_that_of_peft(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Every weight is `merge_and_unload`'s to 1e-6, and the saved model computes PEFT's logits."""
    name, rows, settings = KINDS[kind]
    running, merged, model = train(bases[name], tmp_path / "lora", rows, **settings)
    if rows is not None and rows < VOCABULARY:
        make_tokenizer(tmp_path / "lora", rows)
    saved = ours(bases[name], tmp_path / "lora", tmp_path / "out")
    with torch.no_grad():
        logits = saved(IDS).logits
    torch.testing.assert_close(logits, running, rtol=1e-4, atol=2e-5)
    if kind in RUNNING:
        return
    torch.testing.assert_close(logits, merged, rtol=1e-4, atol=2e-5)
    theirs = model.state_dict()
    for key, tensor in saved.state_dict().items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-6, atol=1e-6)


def exchanged(folder: Path, experts: int, which: str) -> None:
    """Give the factors of `which` the sides that PEFT gave them before 0.19.1: A over the outputs."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in [k for k in tensors if k.endswith(which) and "lora_A" in k]:
        other = key.replace("lora_A", "lora_B")
        a, b = tensors[key], tensors[other]
        by_expert = a.reshape(experts, -1, a.shape[1])  # (e, r, i)
        outputs = b.reshape(b.shape[0], -1, experts)  # (o, r, e)
        tensors[key] = outputs.permute(2, 1, 0).reshape(-1, b.shape[0]).contiguous()
        tensors[other] = by_expert.permute(2, 1, 0).reshape(a.shape[1], -1).contiguous()
    save_file(tensors, file)


@pytest.mark.parametrize("base", ["mixtral", "qwen3"])
def test_factors_of_experts_from_before_peft_0_19_1(bases: dict[str, Path], tmp_path: Path, base: str) -> None:
    """The same delta, written with A over the outputs, gives the same model."""
    train(bases[base], tmp_path / "lora", **EXPERTS)
    with open_checkpoint(f"{bases[base]}+{tmp_path / 'lora'}") as new:
        expected = {name: new.read(name) for name in new.tensors}
    exchanged(tmp_path / "lora", 3, ".weight")
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_version": "0.18.0"}))
    with open_checkpoint(f"{bases[base]}+{tmp_path / 'lora'}") as old:
        for name, tensor in expected.items():
            torch.testing.assert_close(old.read(name), tensor, rtol=0, atol=1e-7)


def spoil(folder: Path, **settings: Any) -> None:
    """Change keys of adapter_config.json."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


REFUSED: dict[str, tuple[dict[str, Any], Callable[[Path], None], str]] = {
    "an adapter of mlx-lm": (
        {},
        lambda f: (
            (f / "adapter_config.json").write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}')
            and None
        ),
        r"is one of mlx-lm; fuse it with its base \(`mlx_lm\.fuse",
    ),
    "QA-LoRA": ({}, lambda f: spoil(f, use_qalora=True), r"uses QA-LoRA \(use_qalora\)"),
    "a bias without one in the base": (
        {"lora_bias": True},
        lambda f: None,
        r"lora_B\.bias is the bias of a module that has",
    ),
    "token ids of another count": (
        {"trainable_token_indices": [1, 5]},
        lambda f: spoil(f, trainable_token_indices=[1]),
        r"trainable_token_indices does not name the 2 rows",
    ),
    "token ids outside": (
        {"trainable_token_indices": [1, 5]},
        lambda f: spoil(f, trainable_token_indices=[1, 999]),
        r"trainable_token_indices has 999, model\.embed_tokens\.weight 320 rows",
    ),
    "experts of a model without": (
        {},
        lambda f: spoil(f, target_parameters=["mlp.down_proj.experts"]),
        r"the base has no stacked experts model\.layers\.0\.mlp\.down_proj\.experts",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_cannot_be_added_are_refused(bases: dict[str, Path], tmp_path: Path, case: str) -> None:
    """One sentence with the key, and what to do where there is something to do."""
    settings, change, message = REFUSED[case]
    train_plain(bases["llama"], tmp_path / "lora", **settings)
    change(tmp_path / "lora")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(f"{bases['llama']}+{tmp_path / 'lora'}")


def test_dora_is_not_saved_as_an_adapter(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A merge of DoRA adapters is no LoRA adapter: refused by name, before anything is written."""
    train(bases["llama"], tmp_path / "lora", use_dora=True)
    arguments = ["--method", "linear", "--models_to_merge", f"{bases['llama']}+{tmp_path / 'lora'}", "--quiet"]
    arguments += ["--save_as", "adapter", "--save_path", str(tmp_path / "out")]
    assert run_main(merge_script.main, arguments) == 2
    assert "has DoRA on model.layers.0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_blocks_of_any_size_are_the_whole(bases: dict[str, Path], tmp_path: Path) -> None:
    """DoRA by row and by column, experts and tokens give the same bits however rows are cut."""
    for base, settings in (
        ("llama", {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
        ("gpt_oss", EXPERTS),
        ("tied", {"trainable_token_indices": [1, 5]}),
    ):
        train(bases[base], tmp_path / base, **settings)
        with open_checkpoint(f"{bases[base]}+{tmp_path / base}") as opened:
            for name, info in opened.tensors.items():
                whole, rows = opened.read(name), opened.rows(name)
                parts = [rows[slice(i, min(i + 7, info.shape[0]))] for i in range(0, info.shape[0], 7)]
                assert torch.equal(torch.cat(parts), whole)


def test_weights_of_the_base_stay(bases: dict[str, Path], tmp_path: Path) -> None:
    """Tensors that an adapter does not name are the base's bytes."""
    train(bases["mixtral"], tmp_path / "lora", **EXPERTS)
    plain = weights(bases["mixtral"])
    with open_checkpoint(f"{bases['mixtral']}+{tmp_path / 'lora'}") as opened:
        untouched = [name for name in opened.tensors if ".experts." not in name]
        assert len(untouched) == 10
        assert all(torch.equal(opened.read(name), plain[name]) for name in untouched)


def test_adapted_tensors_are_stored_in_the_dtype_of_the_rest(tmp_path: Path) -> None:
    """An adapter is added in fp32, which is no dtype that a file stores: a merge of adapters alone is bfloat16."""
    base = make_llama(tmp_path / "base")
    for seed in (1, 2):
        train_plain(base, tmp_path / f"lora{seed}", seed)
    models = ",".join(f"{base}+{tmp_path / f'lora{seed}'}" for seed in (1, 2))
    arguments = ["--method", "linear", "--models_to_merge", models, "--save_path", str(tmp_path / "out"), "--quiet"]
    assert run_main(merge_script.main, arguments) == 0
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
