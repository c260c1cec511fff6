"""Multi-token prediction: names of its tensors, and depths and configs without it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from common.files.json_values import JsonObject, JsonValue
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.tensor_names import layer_of, stacks_of

PARTS = re.compile(r"(^|\.)(mtp(_\w+)?|nextn\w*|model_mtp)\.")
"""Names of its parts: `mtp.layers.0...` (Qwen3-Next), `model.mtp_layers.0...` (MiMo, Ernie)."""
LAYER_PARTS = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head)\.")
"""Modules of a multi-token prediction layer of DeepSeek-V3 or GLM-4, which is stored after the decoder layers."""
COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules",
          "mtp_num_layers", "num_nextn_layers")  # fmt: skip
"""Config keys for the number of its layers."""
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def predicting_layers(checkpoint: Checkpoint) -> int:
    """Return the number of multi-token prediction layers in the config; 0 where it has none."""
    config = checkpoint.text_config
    return next((config[key] for key in COUNTS if isinstance(config.get(key), int)), 0)


def prediction_names(checkpoint: Checkpoint) -> frozenset[str]:
    """Return the names of the tensors of multi-token prediction, by name or in a layer after the config's last."""
    config = checkpoint.text_config
    depth = next((config[key] for key in DEPTHS if isinstance(config.get(key), int)), None)
    count = predicting_layers(checkpoint)
    behind = {
        (layer[0], layer[1])
        for name in checkpoint.tensors
        if depth is not None
        and (layer := layer_of(name))
        and layer[1] >= depth
        and (layer[1] < depth + count or LAYER_PARTS.search(name))
    }
    return frozenset(
        name for name in checkpoint.tensors
        if PARTS.search(name) or ((layer := layer_of(name)) and (layer[0], layer[1]) in behind)
    )  # fmt: skip


def main_depths(checkpoint: Checkpoint) -> dict[str, int]:
    """Return {stack: number of layers} without multi-token prediction layers."""
    predicting = prediction_names(checkpoint)
    return stacks_of(name for name in checkpoint.tensors if name not in predicting)


def without_prediction(config: Mapping[str, JsonValue]) -> JsonObject:
    """Return a config without multi-token prediction layers."""
    changed = {key: 0 if key in COUNTS and isinstance(value, int) else value for key, value in config.items()}
    nested = changed.get("text_config")
    return {**changed, **({"text_config": without_prediction(nested)} if isinstance(nested, Mapping) else {})}
