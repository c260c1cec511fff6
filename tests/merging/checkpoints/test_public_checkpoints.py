"""Configs of public checkpoints, written down by hand, through a dry run and a merge at tiny size.

The configs in tests/public_checkpoints/ have the published values. A test shrinks sizes and numbers of layers, leaves
everything else as published, and makes weights of two models with transformers, sharded with an index.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import merge as merge_script
from merging.checkpoints.parsed_config import parse_config
from tests.helpers.architectures import fine_tuned, load, quiet
from tests.helpers.tiny import weights

FOLDER = Path(__file__).parents[2] / "public_checkpoints"
NAMES = sorted(file.stem for file in FOLDER.glob("*.json"))
SIZES = {
    "hidden_size": 16, "n_embd": 16, "embed_dim": 16, "intermediate_size": 32, "intermediate_size_mlp": 24,
    "num_attention_heads": 2, "n_head": 2, "attention_heads": 2, "num_heads": 2, "head_dim": 8, "vocab_size": 64,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 8, "experts_per_token": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 2,
    "topk_group": 1, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "state_size": 4, "mamba_d_state": 4, "mamba_dt_rank": 2, "time_step_rank": 2,
    "depth": 2, "projection_dim": 16, "num_global_layers": 1, "max_num_tiles": 1,
}  # fmt: skip
LAYERS = {
    "gemma-2-2b": 4, "gemma-3-4b": 6, "qwen3-next-80b-a3b": 4, "jamba-v0.1": 8, "deepseek-v3": 4, "gpt-oss-20b": 4,
    "llama-3.2-11b-vision": 5,
}  # fmt: skip
"""Enough for one layer of each kind; 2 elsewhere."""
PARTS = {
    "llama-4-scout": {
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 64, "image_size": 16, "patch_size": 4, "projector_input_dim": 16,
            "projector_output_dim": 16, "vision_output_dim": 16, "num_hidden_layers": 1,
        },
    },
    "gemma-3-4b": {"": {"mm_tokens_per_image": 4}, "vision_config": {"image_size": 16, "patch_size": 8}},
    "llama-3.2-11b-vision": {
        "vision_config": {
            "image_size": 16, "patch_size": 8, "vision_output_dim": 32, "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]], "num_hidden_layers": 1,
        },
    },
    "qwen2-vl-2b": {
        "": {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        "vision_config": {"patch_size": 4, "hidden_size": 16},
    },
    "llava-1.5-7b": {
        "text_config": {
            "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2,
            "num_hidden_layers": 2,
        },
        "vision_config": {"image_size": 16, "patch_size": 8},
    },
}  # fmt: skip
"""Values that depend on each other in vision towers, and sizes that the published file leaves to defaults."""


def shrunk(name: str) -> dict[str, Any]:
    """The published config at tiny size."""
    config: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    layers = LAYERS.get(name, 2)
    _shrink(config, layers)
    for part, values in PARTS.get(name, {}).items():
        (config[part] if part else config).update(copy.deepcopy(values))
    return config


def _shrink(part: dict[str, Any], layers: int) -> None:
    heads = part.get("num_attention_heads")
    for key, value in list(part.items()):
        if isinstance(value, dict) and key.endswith("_config"):
            _shrink(value, layers)
        elif key == "num_key_value_heads":
            part[key] = 2 if value == heads else 1
        elif key in ("num_hidden_layers", "n_layer"):
            part[key] = layers
        elif key == "num_experts_per_tok":
            part[key] = min(value, 2)
        elif key == "layer_types":
            part[key] = value[:layers]
        elif key in ("moe_layers", "cross_attention_layers"):
            part[key] = [i for i in value if i < layers]
        elif re.search(r"_token_(id|index)$", key) and isinstance(value, int) and value >= 64:
            part[key] = 20 + value % 40
        elif key == "eos_token_id" and isinstance(value, list):
            part[key] = [1, 6]
        elif key in SIZES and value is not None:
            part[key] = SIZES[key]


def made(name: str, folder: Path) -> list[Path]:
    """Save a base and a tuned model of the shrunk config: weights in shards with an index.

    The base has the config as published, the tuned model as this transformers writes it.
    """
    config = shrunk(name)
    torch.manual_seed(0)
    parsed = parse_config(config).source
    assert parsed is not None, f"transformers does not read the config of {name}"
    model = getattr(transformers, config["architectures"][0])(parsed)
    folders = []
    for role, one in (("base", model), ("tuned", fine_tuned(model, 1))):
        with quiet():
            one.save_pretrained(folder / role, max_shard_size="6KB")
        if role == "base":
            (folder / role / "config.json").write_text(json.dumps(config))
        folders.append(folder / role)
    return folders


def add_prediction(folder: Path, layer: int) -> None:
    """Add a layer that predicts further tokens behind the others, as DeepSeek-V3 stores it."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = [name for name in index["weight_map"] if name.startswith(f"model.layers.{layer - 1}.")]
    shards = {file: load_file(folder / file) for file in set(index["weight_map"].values())}
    part = {
        name.replace(f"layers.{layer - 1}.", f"layers.{layer}."): shards[index["weight_map"][name]][name].clone()
        for name in names
    }
    part[f"model.layers.{layer}.eh_proj.weight"] = torch.ones(16, 32)
    save_file(part, folder / "model-mtp.safetensors", metadata={"format": "pt"})
    index["weight_map"] |= dict.fromkeys(part, "model-mtp.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", NAMES)
def test_a_public_checkpoint(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The dry run takes the published config; the merge is base + half the change in every tensor, loads whole, and its
    config means what the base's means."""
    base, tuned = made(name, tmp_path)
    if name == "deepseek-v3":
        add_prediction(base, LAYERS[name])
    assert (base / "model.safetensors.index.json").is_file()
    argv = ["--method", "task_arithmetic", "--base_model", str(base), "--models_to_merge", str(tuned), "--scaling",
            "0.5", "--dtype", "float32"]  # fmt: skip
    assert merge_script.main([*argv, "--dry_run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    stored, changed = weights(base), weights(tuned)
    assert plan["tensors"]["total"] == len(stored)
    assert merge_script.main([*argv, "--save_path", str(tmp_path / "out"), "--quiet"]) == 0
    merged = weights(tmp_path / "out")
    assert merged.keys() == stored.keys()
    for key, tensor in stored.items():
        change = changed[key].float() - tensor.float() if key in changed else torch.zeros(())
        torch.testing.assert_close(merged[key].float(), tensor.float() + 0.5 * change, rtol=1e-5, atol=1e-6)
    _, told = load(tmp_path / "out")
    behind = f"model.layers.{LAYERS[name]}." if name == "deepseek-v3" else "none"  # its experts are fused by then
    extra = {key for key in told["unexpected_keys"] if key not in stored and not key.startswith(behind)}
    assert not told["missing_keys"]
    assert not told["mismatched_keys"]
    assert not extra
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", base))
    for config in (ours, theirs):
        for key in ("torch_dtype", "dtype"):
            config.pop(key, None)
    if "tie_word_embeddings" not in theirs:  # the result may state what the base leaves to its class
        ours.pop("tie_word_embeddings", None)
    assert parse_config(ours).values == parse_config(theirs).values


def test_there_are_enough() -> None:
    """Twenty public checkpoints and more, of different families."""
    types = {json.loads((FOLDER / f"{name}.json").read_text())["model_type"] for name in NAMES}
    assert len(NAMES) >= 20
    assert len(types) >= 20
