"""Configs that differ in the function of the weights are refused by key; other spellings of one value are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import CheckpointError
from merging.checkpoints.checkpoint import open_checkpoint
from merging.pipeline import merge
from merging.plan.config_meaning import ConfigDifference, compare_configs, note_differences
from merging.plan.merge_plan import OutputConfig
from merging.planning import plan_merge
from merging.recipe import make_recipe, recipe_as_yaml
from tests.helpers.tiny import fine_tune, make_llama, weights


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and a fine-tuned model, float32."""
    folder = tmp_path_factory.mktemp("pair")
    base = make_llama(folder / "base", dtype=torch.float32, hidden=16, layers=1)
    return {"base": base, "tuned": fine_tune(base, folder / "tuned", seed=1)}


def with_config(folder: Path, out: Path, **changes: Any) -> Path:
    """The model with other values in its config; a key is taken out where the value is ...."""
    shutil.copytree(folder, out)
    config = {**json.loads((out / "config.json").read_text()), **changes}
    (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return out


def recipe_of(base: Path, other: Path, **more: object) -> Any:
    """Task arithmetic of one model."""
    return make_recipe(
        {"method": "task_arithmetic", "base_model": str(base), "models_to_merge": str(other), **more}, {}
    )


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2}, "num_attention_heads"),
        ({"num_key_value_heads": 1}, "num_key_value_heads"),
        ({"head_dim": 8}, "head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope.rope_theta"),
        ({"rope_parameters": ..., "rope_theta": 5e5}, "rope.rope_theta"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope.rope_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "model_type"),
    ],
)  # fmt: skip
def test_what_changes_a_weights_function_is_refused(pair, tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    """Each is refused by its key with both values, in a look at the plan too, and passes with the flag, reported."""
    other = with_config(pair["tuned"], tmp_path / "other", **changes)
    output = OutputConfig(tmp_path / "out", load_check=False)
    for headers_only in (True, False):
        with pytest.raises(
            CheckpointError, match=rf"change the function of the weights: .*{key} is .* in .*other and .* in .*base"
        ):
            plan_merge(recipe_of(pair["base"], other), output, headers_only=headers_only)
    plan = plan_merge(recipe_of(pair["base"], other, allow_config_mismatch=True), output)
    assert any("allowed by --allow_config_mismatch" in note and key in note for note in plan.notes)
    assert plan.recipe["allow_config_mismatch"] is True


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": ..., "rope_theta": 10000.0, "rope_scaling": None},
        {"rope_parameters": ...},
        {"rope_parameters": ..., "rope_theta": 10000, "rope_scaling": {"type": "default"}},
        {"head_dim": ..., "mlp_bias": ..., "attention_bias": ..., "num_key_value_heads": 2},
        {"hidden_act": "swish"},
        {"rms_norm_eps": 9.999999974752427e-07},
        {"attention_dropout": 0.1, "use_cache": False, "initializer_range": 0.01, "transformers_version": "4.40.0"},
        {"torch_dtype": "float16", "dtype": ..., "_name_or_path": "x", "pretraining_tp": 2, "unsloth_version": "1"},
        {"eos_token_id": [2, 3], "pad_token_id": 0},
    ],
)
def test_equal_meaning_in_other_words(pair, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Defaults left out, rope as transformers 4 or 5 spells it, names of one function, training keys: no difference."""
    other = open_checkpoint(str(with_config(pair["tuned"], tmp_path / "other", **changes)))
    assert compare_configs(open_checkpoint(str(pair["base"])), [other]) == ([], [])


def test_longest_text_is_reported(pair, tmp_path: Path) -> None:
    """max_position_embeddings changes no weight, unless the rotary embedding goes by it."""
    longer = with_config(pair["tuned"], tmp_path / "longer", max_position_embeddings=4096)
    plan = plan_merge(recipe_of(pair["base"], longer), OutputConfig(tmp_path / "out", load_check=False))
    (note,) = [note for note in plan.notes if "without effect" in note]
    assert "max_position_embeddings is 4096" in note
    assert "2048" in note
    rope = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    base = with_config(pair["base"], tmp_path / "base", **rope)
    longer = with_config(pair["tuned"], tmp_path / "dynamic", max_position_embeddings=4096, **rope)
    with pytest.raises(CheckpointError, match="max_position_embeddings is 4096"):
        plan_merge(recipe_of(base, longer), OutputConfig(tmp_path / "out", load_check=False))


def compare(tmp_path: Path, pair: Any, ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The conflicting keys of two configs, which need not be of the tensors beside them."""
    folders = []
    for name, config in (("ours", ours), ("theirs", theirs)):
        folder = tmp_path / name
        shutil.copytree(pair["base"], folder)
        (folder / "config.json").write_text(json.dumps(config))
        folders.append(open_checkpoint(str(folder)))
    conflicts, _ = compare_configs(folders[0], folders[1:])
    return [difference.key for difference in conflicts]


GEMMA3 = {"model_type": "gemma3_text", "num_hidden_layers": 8, "rope_theta": 1e6, "sliding_window": 1024}
SLIDING = ["sliding_attention"] * 5
CLASSIFIER = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
QWEN2 = {"model_type": "qwen2", "num_hidden_layers": 4, "rope_theta": 1e6}


@pytest.mark.parametrize(
    ("ours", "theirs", "keys"),
    [
        (GEMMA3, {**GEMMA3, "query_pre_attn_scalar": 168}, ["query_pre_attn_scalar"]),
        (GEMMA3, {**GEMMA3, "final_logit_softcapping": 30.0}, ["final_logit_softcapping"]),
        (GEMMA3, {**GEMMA3, "sliding_window": 512}, ["sliding_window"]),
        (GEMMA3, {**GEMMA3, "sliding_window_pattern": 6}, []),
        (GEMMA3, {**GEMMA3, "sliding_window_pattern": 4}, ["layer_types"]),
        (GEMMA3, {**GEMMA3, "layer_types": [*SLIDING, "full_attention", *SLIDING[:2]]}, []),
        (GEMMA3, {**GEMMA3, "rope_local_base_freq": 5e4}, ["rope.sliding_attention.rope_theta"]),
        (QWEN2, {**QWEN2, "max_window_layers": 2, "sliding_window": 4096}, []),
        (QWEN2, {**QWEN2, "max_window_layers": 2, "sliding_window": 4096, "use_sliding_window": True},
         ["sliding_window", "layer_types"]),
        ({"model_type": "granite"}, {"model_type": "granite", "logits_scaling": 8.0, "residual_multiplier": 0.22},
         ["residual_multiplier", "logits_scaling"]),
        ({"model_type": "cohere"}, {"model_type": "cohere", "logit_scale": 0.25}, ["logit_scale"]),
        ({"model_type": "qwen3_moe"}, {"model_type": "qwen3_moe", "num_experts_per_tok": 4, "norm_topk_prob": True},
         ["num_experts_per_tok", "norm_topk_prob"]),
        ({"model_type": "deepseek_v3"}, {"model_type": "deepseek_v3", "routed_scaling_factor": 1.0, "n_group": 4},
         ["routed_scaling_factor", "n_group"]),
        ({"model_type": "falcon"}, {"model_type": "falcon", "alibi": True, "parallel_attn": False},
         ["alibi", "parallel_attn"]),
        ({"model_type": "gpt_neox"}, {"model_type": "gpt_neox", "rotary_pct": 0.5, "use_parallel_residual": False},
         ["use_parallel_residual", "rope.partial_rotary_factor"]),
        ({"model_type": "mamba"}, {"model_type": "mamba", "time_step_rank": 100, "layer_norm_epsilon": 1e-6},
         ["layer_norm_epsilon", "time_step_rank"]),
        ({"model_type": "jamba"}, {"model_type": "jamba", "attn_layer_offset": 3}, ["attn_layer_offset"]),
        ({"model_type": "llama4", "text_config": {"num_hidden_layers": 4}},
         {"model_type": "llama4", "text_config": {"num_hidden_layers": 4, "attn_scale": 0.2}},
         ["text_config.attn_scale"]),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}},
         {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_feature_layer": -1},
         ["vision_feature_layer"]),
        ({"model_type": "gemma3", "text_config": GEMMA3}, GEMMA3, []),
        ({"model_type": "gemma3", "text_config": GEMMA3}, {**GEMMA3, "rope_theta": 1e4},
         ["rope.full_attention.rope_theta"]),
        ({"model_type": "of_its_own", "emb_scale": 1, "note": "a"},
         {"model_type": "of_its_own", "emb_scale": 2, "note": "b"},
         ["emb_scale"]),
        ({**CLASSIFIER, "id2label": {"0": "no", "1": "yes"}}, {**CLASSIFIER, "id2label": {"0": "yes", "1": "no"}},
         ["id2label"]),
    ],
)  # fmt: skip
def test_keys_of_other_families(
    pair, tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any], keys: list[str]
) -> None:
    """Scales, caps, routers, windows, kinds of layers, parts inside a config: the keys that change the function."""
    assert sorted(compare(tmp_path, pair, ours, theirs)) == sorted(keys)


def test_a_mismatch_that_is_allowed_repeats_from_its_recipe(pair, tmp_path: Path) -> None:
    """The merge with the flag has the base's config, and its recipe reads back with the flag."""
    other = with_config(pair["tuned"], tmp_path / "other", rms_norm_eps=1e-5)
    asked = recipe_of(pair["base"], other, allow_config_mismatch=True, dtype="float32")
    assert make_recipe({}, recipe_as_yaml(asked)) == asked
    merge(asked, OutputConfig(tmp_path / "out", load_check=False))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rms_norm_eps"] == 1e-6
    merged, tuned = weights(tmp_path / "out"), weights(other)
    assert all(torch.allclose(merged[name], tuned[name], atol=1e-6) for name in tuned)


def test_long_keys_and_values_of_a_stranger_stay_short() -> None:
    """A message on differences quotes at most 300 characters of the configs, however many and long they are."""
    long = tuple(ConfigDifference("k" * 500, "a", "v" * 500, "b", "w" * 500) for _ in range(9))
    (note,) = note_differences((), long, False)
    assert sum(note.count(letter) for letter in "kvw") < 300
    with pytest.raises(CheckpointError) as refused:
        note_differences(long, (), False)
    assert sum(str(refused.value).count(letter) for letter in "kvw") < 300
    short = tuple(ConfigDifference(f"key{i}", "a", i, "b", None) for i in range(6))
    assert "key4 is 4 in a and None in b (and 1 more)" in note_differences((), short, False)[0]
