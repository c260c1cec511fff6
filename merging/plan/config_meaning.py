"""Comparison of the inputs' configs: keys that change the function of the weights, and keys that do not.

Models with weights of equal shapes but another number of heads, activation, norm epsilon, window, rotary embedding or
router must not be merged. Configs are compared with transformers' defaults filled in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import CheckpointError
from common.files.json_values import JsonObject, JsonValue
from common.terminal_text import foreign, quoted
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.parsed_config import ParsedConfig, parse_config

NO_EFFECT = re.compile(
    r"_name_or_path|name_or_path|_commit_hash|\w*_version|dtype|torch_dtype|use_bfloat16|bf16|fp16|fp32|auto_map"
    r"|use_cache|cache_implementation|return_dict\w*|use_return_dict|output_\w+|torchscript|pruned_heads"
    r"|\w*initializer\w*|init_(std|method|device|config)\w*|mup_\w*init\w*|rescale_prenorm_residual|rescale_every"
    r"|\w*drop(out|path|_path|_prob|_rate)?|\w*drop(out)?_\w+|\w*pdrop\w*|\w*layerdrop\w*|\w*jitter\w*"
    r"|\w*loss\w*|seq_aux|\w*gradient_checkpointing\w*|\w*attn_implementation\w*|attn_impl\w*|use_flash\w*|flash_\w*"
    r"|use_(mamba_kernels|mambapy|fused\w*|triton\w*|cuda\w*)|fused_\w+|fuse_\w+|pretraining_tp|tensor_parallel\w*"
    r"|chunk_size_feed_forward|tokenizer_class|processor_class|prefix|task_specific_params|finetuning_task"
    r"|problem_type|unsloth\w*|\w*quantization_config|compression_config|transformers\w*|\w*kernel_options"
    r"|vocab_size|vocab_size_per_layer_input|padded_vocab_size|pad_vocab_size_multiple\w*|num_labels|label2id"
    r"|tie_word_embeddings|tie_embeddings|tie_weights|share_input_output_embed\w*|_from_model_config|model_name"
    r"|generation_config|add_bos_token|add_eos_token|begin_suppress_tokens|suppress_tokens|forced_decoder_ids"
    r"|bad_words_ids|is_encoder_decoder_\w+|attn_softmax_in_fp32|softmax_in_fp32|attention_softmax_in_fp32"
    r"|reorder_and_upcast_attn|upcast_\w+|residual_in_fp32|fp32_\w+|keep_\w*in_fp32"
    r"|max_length|min_length|early_stopping|do_sample|num_beams|num_beam_groups|diversity_penalty|temperature|top_k"
    r"|top_p|typical_p|repetition_penalty|length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size"
    r"|num_return_sequences|remove_invalid_values|exponential_decay_length_penalty|cross_attention_hidden_size"
    r"|use_(dora|lora|unpad)|ep_size|layer_norm_type_\w+|expert_(parallel|model)\w*|mtp_loss\w*|run_name|wandb\w*"
)
"""Keys about training, precision, speed, generation, number of labels or names, which do not change the function of a
weight; vocabulary and tying are compared by tensors."""
TOKEN_IDS = re.compile(r"\w*(_token_ids?|_token_index|_token_indices|_tok_id)")
POSITIONS = re.compile(
    r"max_position_embeddings|n_positions|n_ctx|n_ctx_\w+|max_seq(uence)?_len(gth)?|seq_len(gth)?|sequence_length"
    r"|model_max_length|max_(source|target|decoder|encoder|2d)_positions?|initial_context_length|max_context_\w+"
    r"|training_seqlen|context_length|block_size|use_dynamic_ntk"
)
"""Keys for the maximum sequence length; a difference is reported. Position embeddings show it in their shape."""
DEPTHS = re.compile(r"num_hidden_layers|n_layers?|num_layers|n_layer|depth|(en|de)coder_layers|num_decoder_layers")
PREDICTION = re.compile(r"num_nextn_predict_layers|num_mtp_\w+|mtp_\w+|n_predict|num_nextn\w*")
BY_LAYER = re.compile(
    r"layer_types|layers_block_type|layer_block_types|block_types|\w*layer\w*_types?|attention_types|attention_layers"
    r"|moe_layers|mlp_only_layers|no_rope_layers|cross_attention_layers|\w*layers?_(ids|idxs?|indices)|full_attn_idxs"
    r"|\w*(pattern|interval|period|offset|freq|every_n_layers)|\w*_layer_step|decoder_sparse_step"
    r"|first_k_dense_replace|first_\w*dense\w*|max_window_layers|num_kv_shared_layers|moe_layer_\w+|use_sliding_window"
    r"|_?sliding_window_pattern|num_dense_layers|n_dense_layers|num_moe_layers|global_layers"
)
"""Keys that define the kind of each layer, by a list, a pattern or numbers."""
DERIVED = re.compile(
    r"max_window_layers|use_sliding_window|_?sliding_window_pattern|full_attention_interval|no_rope_layer_interval"
    r"|interleave_moe_layer_step|global_attn_every_n_layers|full_attn_idxs"
)
"""Keys of BY_LAYER from which transformers derives a list; that list is compared instead."""
WINDOWS = re.compile(r"sliding_window|attention_window|window_size|local_attention|attention_chunk_size|sliding_\w+")
FUNCTION = re.compile(
    r"head|act|eps|window|rope|rotary|theta|scal|softcap|multiplier|top_?k|expert|norm|alibi|parallel|layer_types"
    r"|pattern|period|offset|interval|logit|conv|state|dt_|chunk|group|qk_|bias|mask|causal|gate|residual|ntk|logn|mode"
)
"""Words in keys that change the function of weights, for model types that transformers does not know."""
ACTIVATIONS = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "gelu_python": "gelu"}
"""Synonyms of activation functions."""
HEAD_CLASSES = re.compile(r"For(Sequence|Token|Image|Audio)\w*Classification|RewardModel")
ROPE_KEYS = {
    "rope_theta": "rope_theta", "rotary_emb_base": "rope_theta", "rotary_base": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor", "rotary_pct": "partial_rotary_factor",
}  # fmt: skip
ROPE_PARTS = ("rope_parameters", "rope_scaling")
ROPE_TYPES = ("rope.rope_type", "rope.factor", "rope.low_freq_factor", "rope.high_freq_factor",
              "rope.original_max_position_embeddings")  # fmt: skip
"""RoPE keys whose values a .gguf file stores as a tensor."""
BY_LENGTH = ("dynamic", "longrope", "su")
"""Types of rotary embeddings that depend on the maximum sequence length."""
SHOWN, MAX_LISTED = 5, 340
"""Differences that a message lists, and their characters in all: keys and values may be a stranger's long text."""
FUNCTION_TOLERANCE = 1e-6
"""Relative difference up to which two numbers are equal; some formats store them in float32."""


@dataclass(frozen=True)
class ConfigDifference:
    """A key with different values in two configs; None stands for an absent key."""

    key: str
    model: str
    value: object
    template: str
    expected: object

    def __str__(self) -> str:
        value, expected = quoted(self.value, 60), quoted(self.expected, 60)
        return f"{foreign(self.key, 60)} is {value} in {self.model} and {expected} in {self.template}"


def note_differences(
    conflicts: Sequence[ConfigDifference], lengths: Sequence[ConfigDifference], allowed: bool
) -> list[str]:
    """Return a note for each kind of difference that `compare_configs` returns.

    Args:
        conflicts: Keys that change the function of the weights.
        lengths: Other keys.
        allowed: Report conflicts instead of raising.

    Raises:
        CheckpointError: There are conflicts and they are not allowed.
    """
    if conflicts and not allowed:
        raise CheckpointError(
            f"The configs differ in keys that change the function of the weights: {_listed(conflicts)}; "
            "merge models of one architecture and setting, correct config.json where it is wrong, or add "
            "--allow_config_mismatch."
        )
    notes = []
    for title, differences in (
        (
            "Configs differ in keys that change the function of the weights (allowed by --allow_config_mismatch)",
            conflicts,
        ),
        ("Configs differ without effect on the function of the weights", lengths),
    ):
        if differences:
            template = differences[0].template
            notes.append(f"{title}: {_listed(differences)}; the result has the value of {template}.")
    return notes


def _listed(differences: Sequence[ConfigDifference]) -> str:
    """Return the first differences as text: at most SHOWN, and further ones than the first within MAX_LISTED."""
    texts = [str(difference) for difference in differences[:SHOWN]]
    while len(texts) > 1 and len("; ".join(texts)) > MAX_LISTED:
        texts.pop()
    more = len(differences) - len(texts)
    return "; ".join(texts) + (f" (and {more} more)" if more else "")


def compare_configs(
    template: Checkpoint, models: Iterable[Checkpoint], by_layer: bool = True, ignored: Collection[str] = ()
) -> tuple[list[ConfigDifference], list[ConfigDifference]]:
    """Compare each model's config with the template model's.

    Args:
        template: The base or the first model.
        models: The other inputs.
        by_layer: Also compare the keys that define the kind of each layer; False for recipes with slices, whose layers
            `merging.plan.layer_kinds` compares one by one.
        ignored: Keys of tensors that are not merged.

    Returns:
        Keys that change the function of the weights; keys for the maximum sequence length, and those that transformers
        does not read.
    """
    conflicts: list[ConfigDifference] = []
    lengths: list[ConfigDifference] = []
    for other in models:
        if _effective_keys(other.config) == _effective_keys(template.config):
            continue  # without importing transformers
        for difference, kind in _differences(template, other):
            if not {difference.key.partition(".")[0], _last(difference.key)}.isdisjoint(ignored):
                continue
            if kind == "function" or (kind == "layers" and by_layer):
                conflicts.append(difference)
            elif kind == "length":
                lengths.append(difference)
    return conflicts, lengths


def _differences(template: Checkpoint, other: Checkpoint) -> Iterator[tuple[ConfigDifference, str]]:
    """Yield every key with an effect in which two parsed configs differ, and its kind."""
    pair = _comparable(template.parsed_config, other.parsed_config)
    template_values, model_values = (flatten(parsed.values) for parsed in pair)
    unstated = _unstated(template, template_values) | _unstated(other, model_values)
    for key in dict.fromkeys((*template_values, *model_values)):
        value, expected, name = model_values.get(key), template_values.get(key), _last(key)
        if (
            _equal(value, expected)
            or NO_EFFECT.fullmatch(name)
            or TOKEN_IDS.fullmatch(name)
            or _is_without_effect(key, pair)
        ):
            continue
        kind = "length" if key in unstated else _kind(key, pair, (template_values, model_values))
        yield ConfigDifference(key, other.name, value, template.name, expected), kind


def _effective_keys(config: Mapping[str, JsonValue]) -> JsonObject:
    """Return a config as written with dotted keys, without keys that have no effect."""
    flat = flatten(config).items()
    return {k: v for k, v in flat if not (NO_EFFECT.fullmatch(_last(k)) or TOKEN_IDS.fullmatch(_last(k)))}


def _unstated(checkpoint: Checkpoint, values: Mapping[str, JsonValue]) -> set[str]:
    """Return keys with default values in a .gguf file's config, since its metadata does not hold every key."""
    if not any(file.suffix == ".gguf" for file in checkpoint.files):
        return set()
    defaults = flatten(parse_config({"model_type": checkpoint.config.get("model_type")}).values)
    return {key for key in (*defaults, *values) if _equal(values.get(key), defaults.get(key))} | (
        {key for key in ROPE_TYPES if key not in values}
    )


def _comparable(first: ParsedConfig, second: ParsedConfig) -> tuple[ParsedConfig, ParsedConfig]:
    """Return two parsed configs; only the language part where one model is a text model and the other is not."""
    if _has_text_part(first) != _has_text_part(second):
        return _language_part(first), _language_part(second)
    return first, second


def _has_text_part(parsed: ParsedConfig) -> bool:
    nested = parsed.values.get("text_config")
    return isinstance(nested, Mapping) and ("text_config" in parsed.class_keys.get("", ()) or "hidden_size" in nested)


def _language_part(parsed: ParsedConfig) -> ParsedConfig:
    """Return the language model's part without model_type and architectures, which differ where it is nested."""
    nested = _has_text_part(parsed)
    values = {k: v for k, v in parsed.text.items() if k not in ("model_type", "architectures")}
    prefix = "text_config." if nested else ""
    class_keys = {
        path.removeprefix(prefix): keys for path, keys in parsed.class_keys.items() if path.startswith(prefix)
    }
    return ParsedConfig(values, class_keys, parsed.text_source)


def flatten(config: Mapping[str, JsonValue]) -> JsonObject:
    """Return a config with dotted keys, all spellings of rotary-embedding keys unified."""
    return dict(_flat_entries(config, ""))


def _flat_entries(part: Mapping[str, JsonValue], path: str) -> Iterator[tuple[str, JsonValue]]:
    rope: JsonObject = {}
    for key, value in part.items():
        if key in ROPE_KEYS:
            if value is not None:
                rope.setdefault(ROPE_KEYS[key], value)
        elif key in ROPE_PARTS:
            rope |= dict(_rope(value))
        elif key == "id2label":
            yield f"{path}{key}", _labels(value)
        elif isinstance(value, Mapping) and not NO_EFFECT.fullmatch(key):
            yield from _flat_entries(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", _canonical(key, value)
    rope = {key: value for key, value in rope.items() if not (key == "partial_rotary_factor" and value == 1)}
    yield from ((f"{path}rope.{key}", value) for key, value in rope.items())


def _rope(value: object, path: str = "") -> Iterator[tuple[str, JsonValue]]:
    """Yield the entries of rope_parameters or rope_scaling, also where they are nested by kind of layer."""
    if not isinstance(value, Mapping):
        return
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            yield from _rope(entry, f"{path}{key}.")
        elif key == "type":
            if "rope_type" not in value and entry != "mrope":
                yield f"{path}rope_type", entry
        elif not (key == "rope_type" and entry in (None, "default")):
            yield f"{path}{key}", entry


def _canonical(key: str, value: JsonValue) -> JsonValue:
    if isinstance(value, str) and "act" in key:
        return ACTIVATIONS.get(value, value)
    return value


def _labels(value: JsonValue) -> JsonValue:
    """Return the label names of a classifier; None for transformers' default names."""
    if not isinstance(value, Mapping):
        return value
    names = {str(i): name for i, name in value.items()}
    made_up = all(name == f"LABEL_{i}" for i, name in names.items())
    return None if made_up else [names[i] for i in sorted(names, key=lambda i: (len(i), i))]


def _equal(value: object, other: object) -> bool:
    """Return True for equal values: numbers up to float32 precision, lists by entry, absent as null."""
    if isinstance(value, bool) or isinstance(other, bool):
        return bool(value) == bool(other)
    if isinstance(value, int | float) and isinstance(other, int | float):
        return math.isclose(value, other, rel_tol=FUNCTION_TOLERANCE)
    if isinstance(value, list | tuple) and isinstance(other, list | tuple):
        return len(value) == len(other) and all(map(_equal, value, other))
    return bool(value == other)


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _part_of(parsed: ParsedConfig, key: str) -> Mapping[str, JsonValue]:
    """Return the part of a config that contains a dotted key."""
    part: Any = parsed.values
    for name in key.split(".")[:-1]:
        if isinstance(part, Mapping) and isinstance(part.get(name), Mapping):
            part = part[name]
    result: Mapping[str, JsonValue] = part
    return result


def _is_without_effect(key: str, pair: Sequence[ParsedConfig]) -> bool:
    """Return True for a key that neither config class reads, or that other keys override in both configs."""
    parts = [_part_of(parsed, key) for parsed in pair]
    kinds = [part.get("layer_types") for part in parts]
    if DERIVED.fullmatch(_last(key)) and all(isinstance(k, list) for k in kinds):
        return True
    if WINDOWS.fullmatch(_last(key)) and all(isinstance(k, list) for k in kinds):
        return not any(re.search(r"sliding|local|chunk|window", str(kind)) for k in kinds for kind in k or ())
    if key.startswith("id2label") or key.endswith(".id2label"):
        return not any(HEAD_CLASSES.search(str(p.values.get("architectures"))) for p in pair)
    if ".rope." in f".{key}":
        return False
    path = key.removesuffix(_last(key))
    class_keys = [parsed.class_keys.get(path) for parsed in pair]
    return all(keys is not None and _last(key) not in keys for keys in class_keys)


def _kind(key: str, pair: Sequence[ParsedConfig], values: Sequence[Mapping[str, JsonValue]]) -> str:
    """Return "function", "layers", "length" or "structure" for the effect of a key."""
    name, is_rope = _last(key), ".rope." in f".{key}"
    if DEPTHS.fullmatch(name) or PREDICTION.fullmatch(name):
        return "structure"  # compared with the tensors
    if BY_LAYER.fullmatch(name):
        return "layers"
    if POSITIONS.fullmatch(name) and not is_rope:
        rope = f"{key.removesuffix(name)}rope.rope_type"
        return "function" if any(flat.get(rope) in BY_LENGTH for flat in values) else "length"
    if name == "architectures":
        return "length"
    is_known = all(parsed.is_known for parsed in pair)
    return "function" if is_known or FUNCTION.search(name) or name == "model_type" else "length"
