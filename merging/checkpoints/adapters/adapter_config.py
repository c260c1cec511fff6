"""Checks of PEFT's adapter_config.json: supported keys, types and values."""

from __future__ import annotations

from collections.abc import Mapping

from common.errors import CheckpointError
from common.files.bounded_reading import UnreadableError
from common.files.json_types import Between, Each, Fields, ListOf, Maybe, OneOf, check_shape
from common.files.json_values import JsonValue
from common.processes.bounded_regex import matches_end
from common.terminal_text import foreign

UNDERSTOOD = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "ensure_weight_tying", "megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "velora_config", "use_dora", "lora_bias", "target_parameters",
    "trainable_token_indices",
}  # fmt: skip
"""Keys of adapter_config.json that are used here or matter only in training; other keys, if set, are refused."""
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base unchanged; PiSSA, OLoRA and others change it."""
_LAYERS = OneOf((int, list))
_TEXTS = OneOf((str, list))
SHAPE = Fields(
    {},
    {
        "peft_type": Maybe(str), "task_type": Maybe(str), "base_model_name_or_path": Maybe(str), "revision": Maybe(str),
        "r": Between(1, 1 << 20), "lora_alpha": Between(-1e6, 1e6, numbers=True),
        "fan_in_fan_out": Maybe(bool), "use_rslora": Maybe(bool), "bias": Maybe(OneOf(("none", "all", "lora_only"))),
        "init_lora_weights": Maybe(OneOf((bool, str))), "modules_to_save": Maybe(ListOf(str)),
        "target_modules": Maybe(_TEXTS), "exclude_modules": Maybe(_TEXTS), "layers_to_transform": Maybe(_LAYERS),
        "layers_pattern": Maybe(_TEXTS), "rank_pattern": Maybe(Each(Between(1, 1 << 20))),
        "alpha_pattern": Maybe(Each(Between(1e-9, 1e6, numbers=True))),
        "use_dora": Maybe(bool), "lora_bias": Maybe(bool), "target_parameters": Maybe(ListOf(str)),
        "trainable_token_indices": Maybe(OneOf((list, dict))),
    },
)  # fmt: skip
"""Types of the keys of adapter_config.json that are used here or written again."""
NAMES = {"use_qalora": "QA-LoRA", "alora_invocation_tokens": "aLoRA", "layer_replication": "replicated layers"}


def check_adapter(label: str, config: Mapping[str, JsonValue]) -> None:
    """Refuse an adapter of another type than LoRA or with unsupported settings.

    Raises:
        CheckpointError: Naming the type or the setting.
    """
    kind = config.get("peft_type")
    if kind is None and ("lora_parameters" in config or "fine_tune_type" in config):
        raise CheckpointError(
            f"Adapter {label} is one of mlx-lm; fuse it with its base (`mlx_lm.fuse --model BASE --adapter-path "
            f"{label}`) and merge the fused model, or save it by PEFT."
        )
    if kind != "LORA":
        name = foreign(str(kind))
        raise CheckpointError(f"Adapter {label} is of type {name}; only LoRA can be added to a base's weights here.")
    try:
        check_shape(config, SHAPE, f"Adapter {label}: adapter_config.json")
    except UnreadableError as error:
        raise CheckpointError(str(error)) from error
    for key, value in config.items():
        if value and key not in UNDERSTOOD:
            what = f"{NAMES[key]} ({key})" if key in NAMES else foreign(key)
            raise CheckpointError(f"Adapter {label} uses {what}, which is not supported; merge it with PEFT first.")
    start = config.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise CheckpointError(
            f"Adapter {label} was started by {foreign(str(start))} (init_lora_weights), which changes the base too; "
            "convert it to plain LoRA with PEFT (save_pretrained, path_initial_model_for_weight_conversion) first."
        )
    for key in ("r", "lora_alpha"):
        if key not in config:
            raise CheckpointError(
                f"Adapter {label}: adapter_config.json should state r and lora_alpha, {key} is absent."
            )


def pattern_value(label: str, config: Mapping[str, JsonValue], key: str, module: str, default: float) -> float:
    """Return a module's value of rank_pattern or alpha_pattern: that of the first pattern that its name ends with.

    Args:
        label: Name of the adapter in messages.
        config: Content of adapter_config.json.
        key: "rank_pattern" or "alpha_pattern".
        module: Dotted name of the module.
        default: Value where no pattern matches.

    Raises:
        CheckpointError: A pattern is no regular expression, or its match takes too long.
    """
    for pattern, value in (config.get(key) or {}).items():
        try:
            matches = matches_end(pattern, module, f"Adapter {label}: {key}")
        except UnreadableError as error:
            raise CheckpointError(str(error)) from error
        if matches:
            return float(value) if isinstance(value, float) else int(value)
    return default
