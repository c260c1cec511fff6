"""Slices of models whose layers differ in kind: each layer of the result is of the kind it came with, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from common.errors import CheckpointError
from merging.pipeline import merge
from merging.plan.merge_plan import OutputConfig
from merging.planning import plan_merge
from merging.recipe import make_recipe
from tests.helpers.architectures import DECODER, ENDS, VISION, Architecture, fine_tuned, load, save

SMALL = {**DECODER, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
MOE = {"num_experts_per_tok": 1, "moe_intermediate_size": 8}
LLAMA4 = {
    **SMALL, "num_hidden_layers": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 16,
    "interleave_moe_layer_step": 2, "attention_chunk_size": 32,
}  # fmt: skip
DEEPSEEK = {
    **DECODER, **MOE, "num_hidden_layers": 5, "num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "n_shared_experts": 1, "num_nextn_predict_layers": 0,
}  # fmt: skip
FAMILIES: dict[str, Architecture] = {
    "gemma2": Architecture("Gemma2ForCausalLM", "Gemma2Config", {**SMALL, "num_hidden_layers": 6, "sliding_window": 4}),
    "gemma3": Architecture(
        "Gemma3ForCausalLM", "Gemma3TextConfig",
        {**SMALL, "num_hidden_layers": 6, "sliding_window": 4, "sliding_window_pattern": 3},
    ),
    "cohere2": Architecture(
        "Cohere2ForCausalLM", "Cohere2Config", {**SMALL, "num_hidden_layers": 6, "sliding_window_pattern": 3}
    ),
    "qwen2": Architecture(
        "Qwen2ForCausalLM", "Qwen2Config",
        {**DECODER, "num_hidden_layers": 6, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    ),
    "smollm3": Architecture("SmolLM3ForCausalLM", "SmolLM3Config", {**SMALL, "num_hidden_layers": 6}),
    "llama4": Architecture("Llama4ForCausalLM", "Llama4TextConfig", LLAMA4),
    "qwen3_next": Architecture(
        "Qwen3NextForCausalLM", "Qwen3NextConfig",
        {
            **SMALL, **MOE, "num_hidden_layers": 6, "num_experts": 2, "shared_expert_intermediate_size": 8,
            "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "full_attention_interval": 3,
        },
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        {**SMALL, **MOE, "num_hidden_layers": 6, "num_experts": 2, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    ),
    "deepseek": Architecture("DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK),
    "jamba": Architecture(
        "JambaForCausalLM", "JambaConfig",
        {
            **DECODER, "num_hidden_layers": 8, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 4,
            "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False,
            "mamba_d_state": 4,
        },
    ),
    "gpt_neo": Architecture(
        "GPTNeoForCausalLM", "GPTNeoConfig",
        {
            **ENDS, "vocab_size": 64, "hidden_size": 16, "num_layers": 6, "num_heads": 2, "window_size": 4,
            "max_position_embeddings": 64, "attention_types": [[["global", "local"], 3]],
        },
    ),
    "gemma3_vision": Architecture(
        "Gemma3ForConditionalGeneration", "Gemma3Config",
        {
            "text_config": {**SMALL, "num_hidden_layers": 6, "sliding_window": 4, "sliding_window_pattern": 3},
            "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 63,
        },
    ),
    "mllama": Architecture(
        "MllamaForConditionalGeneration", "MllamaConfig",
        {
            "text_config": {
                **DECODER, "num_key_value_heads": 2, "num_hidden_layers": 6, "cross_attention_layers": [1, 4],
            },
            "vision_config": {
                **VISION, "num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 32,
                "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1,
            },
        },
    ),
}  # fmt: skip


def layers_of(model: PreTrainedModel) -> Any:
    """The language model's layers."""
    names = ("model.layers", "transformer.h", "model.language_model.layers")
    found = (dict(model.named_modules()).get(name) for name in names)
    return next(layers for layers in found if layers is not None)


def kind_of(layer: Any) -> tuple[Any, ...]:
    """By hand: what makes one layer other than another in these families."""
    attention = getattr(layer, "self_attn", getattr(layer, "attn", None))
    inner = getattr(attention, "attention", attention)
    feed = getattr(layer, "mlp", getattr(layer, "feed_forward", None))
    window = getattr(inner, "sliding_window", None), getattr(inner, "is_sliding", None)
    local = getattr(inner, "attention_type", None)
    return (
        type(layer).__name__,
        type(inner).__name__,
        window,
        getattr(inner, "use_rope", None),
        local,
        type(feed).__name__,
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Make a model of a family and save it as the hub has it, lists of kinds left to their patterns; and another."""
    folder, made = tmp_path_factory.mktemp("kinds"), {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            model = FAMILIES[name].build()
            folders = save(model, folder / name), save(fine_tuned(model, 1), folder / f"{name}-tuned")
            for one in folders:
                unlist(one, FAMILIES[name])
            made[name] = folders
        return made[name]

    return get


def unlist(folder: Path, family: Architecture) -> None:
    """Take what transformers derived from the config again, as published configs have it."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    derived = ("layer_types", "no_rope_layers", "layers_block_type", "attention_layers")
    stated = {**family.values, **family.values.get("text_config", {})}
    for part in (config, config.get("text_config", {})):
        for key in (*derived, "moe_layers"):
            if key not in stated:
                part.pop(key, None)
    if "sliding_window_pattern" in stated:
        config.get("text_config", config)["sliding_window_pattern"] = stated["sliding_window_pattern"]
    if "full_attention_interval" in stated:
        config["full_attention_interval"] = stated["full_attention_interval"]
    file.write_text(json.dumps(config))


def sliced(base: Path, other: Path, chosen: list[int], models: bool = False) -> Any:
    """A recipe of single layers: of one model stacked, or of two merged."""
    slices = []
    for i in chosen:
        one = {"model": str(other), "layer_range": [i, i + 1], "parameters": {"weight": 0.5}}
        two = {"model": str(base), "layer_range": [i, i + 1]}
        slices.append({"sources": [one, two] if models else [{key: two[key] for key in ("model", "layer_range")}]})
    if models:
        return {"merge_method": "task_arithmetic", "base_model": str(base), "slices": slices, "dtype": "float32"}
    return {"merge_method": "passthrough", "slices": slices, "dtype": "float32"}


CHOSEN = {
    "gemma2": [0, 2, 3, 3, 5], "gemma3": [0, 2, 3, 5, 5], "cohere2": [2, 3, 5], "qwen2": [1, 3, 3, 5],
    "smollm3": [0, 3, 4], "llama4": [0, 3, 3, 5, 6], "qwen3_next": [0, 2, 2, 5], "qwen3_moe": [0, 1, 3, 3, 4],
    "deepseek": [0, 2, 4, 4], "jamba": [2, 3, 6, 7], "gpt_neo": [0, 0, 1, 5], "mllama": [0, 1, 2, 4],
    "gemma3_vision": [0, 2, 2, 5],
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_each_layer_keeps_its_kind(pair, tmp_path: Path, name: str) -> None:
    """Layers left out and repeated: the loaded result's layers have the classes, windows, rotary embeddings and experts
    of the layers that they come from, and every weight is loaded."""
    base, tuned = pair(name)
    modules = {"modules": {"text_decoder": {"slices": sliced(base, tuned, CHOSEN[name], models=True)["slices"]}}}
    recipe = sliced(base, tuned, CHOSEN[name], models=True)
    if name in ("mllama", "gemma3_vision"):
        del recipe["slices"]
        whole = {"models": [{"model": str(tuned), "parameters": {"weight": 0.5}}]}
        recipe |= {"modules": {**modules["modules"], "vision_tower": whole, "multi_modal_projector": whole}}
    merge(make_recipe({}, recipe), OutputConfig(tmp_path / "out"))
    result, told = load(tmp_path / "out")
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    source, _ = load(base)
    kinds = [kind_of(layer) for layer in layers_of(source)]
    assert len(set(kinds)) > 1
    assert [kind_of(layer) for layer in layers_of(result)] == [kinds[i] for i in CHOSEN[name]]
    if name in ("gemma2", "gemma3", "qwen2"):
        assert result.config.layer_types == [source.config.layer_types[i] for i in CHOSEN[name]]


@pytest.mark.parametrize(
    ("name", "chosen", "key"),
    [("deepseek", [0, 2, 1], "first_k_dense_replace"), ("jamba", [2, 2, 3, 6], "attn_layer_period")],
)
def test_kinds_that_the_config_cannot_express(pair, tmp_path: Path, name: str, chosen: list[int], key: str) -> None:
    """A dense layer behind one with experts, attention at no fixed distance: refused by the key, in a dry run too."""
    base, tuned = pair(name)
    recipe = make_recipe({}, sliced(base, tuned, chosen))
    with pytest.raises(CheckpointError, match=rf"Slices of model\.layers\.\*: layer \d of the result would .*{key}"):
        merge(recipe, OutputConfig(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_layers_of_two_kinds_are_not_merged(pair, tmp_path: Path) -> None:
    """A slice of a windowed layer of one model and a full one of the other is refused; the flag lets it pass."""
    base, tuned = pair("gemma2")
    recipe = sliced(base, tuned, [0, 1], models=True)
    recipe["slices"][0]["sources"][0]["layer_range"] = [1, 2]
    with pytest.raises(CheckpointError, match=r"layer 1 of .*tuned .*full.*with layer 0 of .*sliding"):
        plan_merge(make_recipe({}, recipe), OutputConfig(tmp_path / "out"))
    allowed = make_recipe({}, {**recipe, "allow_config_mismatch": True})
    assert any("layer 1 of" in note for note in plan_merge(allowed, OutputConfig(tmp_path / "out")).notes)


def test_a_scale_that_counts_the_layers(pair, tmp_path: Path) -> None:
    """GPT-2's scale_attn_by_inverse_layer_idx divides by the layer's place, so that a layer that moves is refused."""
    values = {**ENDS, "vocab_size": 64, "n_positions": 64, "n_embd": 16, "n_layer": 3, "n_head": 2}
    family = Architecture("GPT2LMHeadModel", "GPT2Config", {**values, "scale_attn_by_inverse_layer_idx": True})
    base = save(family.build(), tmp_path / "base")
    merge(make_recipe({}, sliced(base, base, [0, 1])), OutputConfig(tmp_path / "first"))
    layer = family.build().transformer.h[2].attn
    moved = make_recipe({}, sliced(base, base, [0, 2]))
    if any(v != getattr(family.build().transformer.h[0].attn, k, v) for k, v in vars(layer).items() if "scal" in k):
        with pytest.raises(CheckpointError, match="layer 1 of the result would have"):
            merge(moved, OutputConfig(tmp_path / "out"))


def test_layers_of_a_model_that_transformers_does_not_know(pair, tmp_path: Path) -> None:
    """Kinds by a pattern that cannot be checked are refused by the key's name; without such a key slices are merged."""
    base, _ = pair("gemma2")
    folder = tmp_path / "own"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = {**json.loads((base / "config.json").read_text()), "model_type": "of_its_own", "architectures": ["Own"]}
    (folder / "config.json").write_text(json.dumps(config))
    merge(make_recipe({}, sliced(folder, folder, [0, 2])), OutputConfig(tmp_path / "plain", load_check=False))
    (folder / "config.json").write_text(json.dumps({**config, "window_pattern": 2}))
    with pytest.raises(
        CheckpointError, match="the kinds of its layers by window_pattern, and transformers cannot build this"
    ):
        merge(make_recipe({}, sliced(folder, folder, [0, 2])), OutputConfig(tmp_path / "out"))


def test_layers_of_two_models_of_another_depth(pair, tmp_path: Path) -> None:
    """Layers of a deeper model beside the template model's: each has its kind in its own model."""
    base, _ = pair("gemma2")
    values = {**FAMILIES["gemma2"].values, "num_hidden_layers": 9}
    deeper = save(Architecture("Gemma2ForCausalLM", "Gemma2Config", values).build(3), tmp_path / "deeper")
    slices = [{"sources": [{"model": str(m), "layer_range": r}]} for m, r in ((base, [0, 1]), (deeper, [6, 9]))]
    merge(
        make_recipe({}, {"merge_method": "passthrough", "slices": slices, "dtype": "float32"}),
        OutputConfig(tmp_path / "out"),
    )
    result, _ = load(tmp_path / "out")
    kinds = [load(folder)[0].config.layer_types for folder in (base, deeper)]
    assert result.config.layer_types == [kinds[0][0], *kinds[1][6:9]]
    with torch.no_grad():
        assert torch.isfinite(result(input_ids=torch.tensor([[3, 4, 5, 6, 7, 8]])).logits).all()
