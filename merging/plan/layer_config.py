"""Config of a result made of slices: number of layers, and the kind of each layer as in its source model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from common.errors import CheckpointError
from common.files.json_values import JsonValue
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.parsed_config import parse_config
from merging.checkpoints.tensor_names import PARTS
from merging.plan.prediction import main_depths
from merging.plan.types import LayerOrigin

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "encoder_layers")
ENCODER = ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers")
DECODER = ("decoder_layers", "num_decoder_layers")
"""Keys for the depth of a model or a nested part, and of encoder and decoder in one config."""
INDEX_LISTS = re.compile(
    r"moe_layers|mlp_only_layers|cross_attention_layers|global_layers|\w*layers?_(ids|idxs?|indices)|full_attn_idxs"
)
"""Keys that list the layer numbers of one kind."""
DENSE_PREFIX = ("first_k_dense_replace", "num_dense_layers", "n_dense_layers", "num_kv_shared_layers")
"""Keys for the number of first layers (`num_kv_shared_layers`: last layers) of one kind."""
NOT_PER_LAYER = re.compile(r"architectures|\w*token_ids?|mrope_section|\w*_section|\w*factors?")


@dataclass(frozen=True)
class _Part:
    """The part of a config that describes a stack of layers: "" for the top level, else the key of a nested config."""

    name: str
    depth_keys: tuple[str, ...]

    def of(self, config: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
        """Return this part of a config; "" is the language part where the config nests one."""
        part = config.get(self.name) if self.name else config
        if self.name == "" and isinstance(config.get("text_config"), Mapping):
            part = config["text_config"]
        return part if isinstance(part, Mapping) else config


def adapt_layers(
    config: MutableMapping[str, JsonValue], template_model: Checkpoint, origins: Mapping[str, tuple[LayerOrigin, ...]]
) -> None:
    """Change the template model's config to the layers of `origins` in each stack, each layer of its kind.

    Raises CheckpointError where no key of the config holds the depth of a stack.
    """
    depths = main_depths(template_model)
    paired = any("encoder." in stack for stack in depths) and any("decoder." in stack for stack in depths)
    if paired and "num_decoder_layers" not in config and "num_layers" in config:
        config["num_decoder_layers"] = config["num_layers"]  # an absent key has the encoder's value
    for stack, origin in origins.items():
        parts = [part for part in _parts(config, stack, paired) if _depth_keys(config, part, depths.get(stack))]
        if not parts:
            raise CheckpointError(
                f"Slices of {stack}*: config.json of {template_model.name} has no key that holds its number of layers "
                f"({depths.get(stack)}), so that the result's number cannot be stored."
            )
        for part in parts:
            keys = _depth_keys(config, part, depths.get(stack))
            if not (paired and part.name == ""):  # a list at the top level could belong to the other stack
                _set_entries(_raw(config, part), part, depths[stack], origin)
            for key in keys:
                _raw(config, part)[key] = len(origin)
        if not paired or parts[0].name:
            _set_derived_lists(config, parts[-1], origin)


def _raw(config: MutableMapping[str, JsonValue], part: _Part) -> MutableMapping[str, JsonValue]:
    return config[part.name] if part.name else config


def _depth_keys(config: Mapping[str, JsonValue], part: _Part, depth: int | None) -> list[str]:
    raw = config[part.name] if part.name else config
    return [key for key in part.depth_keys if depth is not None and raw.get(key) == depth]


def _parts(config: Mapping[str, JsonValue], stack: str, paired: bool) -> Iterator[_Part]:
    """Yield the parts of a config that may hold the depth of a stack, with the keys for it."""
    nested = {name for name, part in config.items() if isinstance(part, Mapping)}
    for word, name in (("vision_tower", "vision_config"), ("audio_tower", "audio_config")):
        if PARTS[word].search(stack):
            yield from (_Part(key, DEPTHS) for key in (name,) if key in nested)
            return
    if not paired:
        yield _Part("", DEPTHS)
        yield from (_Part(key, DEPTHS) for key in ("text_config",) if key in nested)
        return
    side, keys = ("encoder", ENCODER) if PARTS["encoder"].search(stack) else ("decoder", DECODER)
    yield _Part(side, DEPTHS) if side in nested else _Part("", keys)


def _is_per_layer(key: str, value: object, depth: int) -> bool:
    """Return True for a list (or a pattern string) with one entry per layer."""
    if isinstance(value, str):
        return len(value) == depth and key.endswith("pattern")
    return (
        isinstance(value, list) and len(value) == depth and depth > 0
        and not NOT_PER_LAYER.fullmatch(key) and not INDEX_LISTS.fullmatch(key)
    )  # fmt: skip


def _set_entries(raw: MutableMapping[str, JsonValue], part: _Part, depth: int, origin: Sequence[LayerOrigin]) -> None:
    """Fill each list with one entry per layer with the entries from the configs of the layers' source models."""
    for key, value in list(raw.items()):
        if not _is_per_layer(key, value, depth):
            continue
        entries = [_entry(part, key, one) for one in origin]
        if any(entry is _MISSING for entry in entries):
            short = next(one for one, entry in zip(origin, entries, strict=True) if entry is _MISSING)
            raise CheckpointError(
                f"config.json lists {key} for its {depth} layers, and that of {short.checkpoint.name} has no entry for "
                f"layer {short.index}, which a slice takes; add the list to its config.json."
            )
        raw[key] = "".join(entries) if isinstance(value, str) else entries


_MISSING = object()


def _entry(part: _Part, key: str, origin: LayerOrigin) -> JsonValue:
    """Return a layer's entry in a list of its source model's config; _MISSING where there is none."""
    value = part.of(origin.checkpoint.parsed_config.values).get(key)
    if not isinstance(value, list | tuple | str) or origin.index >= len(value):
        value = part.of(origin.checkpoint.config).get(key)
    if isinstance(value, list | tuple | str) and origin.index < len(value):
        return value[origin.index]
    return _MISSING


def _set_derived_lists(config: MutableMapping[str, JsonValue], part: _Part, origin: Sequence[LayerOrigin]) -> None:
    """Write lists that transformers derives from patterns and numbers where the result's layers need other values."""
    raw = _raw(config, part)
    sources = {id(one.checkpoint): part.of(one.checkpoint.parsed_config.values) for one in origin}
    depths = {id(one.checkpoint): main_depth(one.checkpoint, part) for one in origin}
    first = part.of(origin[0].checkpoint.parsed_config.values)
    derived = part.of(parse_config(config).values)
    for key, value in first.items():
        if _is_per_layer(key, value, depths[id(origin[0].checkpoint)]) and not isinstance(value, str):
            entries = [_entry(part, key, one) for one in origin]
            if _MISSING not in entries and list(derived.get(key) or ()) != entries:
                raw[key] = entries
        elif INDEX_LISTS.fullmatch(key) and isinstance(value, list):
            chosen = [i for i, one in enumerate(origin) if one.index in (sources[id(one.checkpoint)].get(key) or ())]
            if chosen != list(derived.get(key) or ()):
                raw[key] = chosen
    _set_counts(raw, [(sources[id(one.checkpoint)], depths[id(one.checkpoint)], one.index) for one in origin])


def main_depth(checkpoint: Checkpoint, part: _Part) -> int:
    """Return the number of layers in a part of a model's config; -1 where no key holds it."""
    config = part.of(checkpoint.parsed_config.values)
    depths = (config[key] for key in part.depth_keys if isinstance(config.get(key), int))
    return next(depths, -1)


def _set_counts(
    raw: MutableMapping[str, JsonValue], layers: Sequence[tuple[Mapping[str, JsonValue], int, int]]
) -> None:
    """Set keys that define the kinds of layers by counts or periods; unchanged where no value fits.

    layers: config, depth and layer number of the source of each layer of the result.
    """
    first = layers[0][0]
    for key in DENSE_PREFIX:
        if isinstance(first.get(key), int) and (raw.get(key) is not None or first[key]):
            at_end = key == "num_kv_shared_layers"
            raw[key] = sum(
                i >= depth - (part.get(key) or 0) if at_end else i < (part.get(key) or 0) for part, depth, i in layers
            )
    for name in ("attn_layer", "expert_layer"):
        period, offset = f"{name}_period", f"{name}_offset"
        if isinstance(first.get(period), int) and isinstance(first.get(offset), int):
            selected = [i % part[period] == part[offset] for part, _, i in layers]
            fitting = _period(selected, first[period], first[offset])
            if fitting is not None:
                raw[period], raw[offset] = fitting
    if isinstance(first.get("decoder_sparse_step"), int) and first["decoder_sparse_step"] > 1:
        raw["mlp_only_layers"] = [
            k for k, (part, _, i) in enumerate(layers)
            if i in (part.get("mlp_only_layers") or ()) or (i + 1) % part["decoder_sparse_step"]
        ]  # fmt: skip
        raw["decoder_sparse_step"] = 1
    if isinstance(first.get("attention_types"), list) and isinstance(raw.get("attention_layers"), list):
        raw["attention_types"] = [[raw["attention_layers"], 1]]
    if isinstance(first.get("block_types"), list | tuple) and raw.get("block_types") is not None:
        kinds = [part["block_types"][i % len(part["block_types"])] for part, _, i in layers]
        raw["block_types"] = kinds


def _period(selected: Sequence[bool], period: int, offset: int) -> tuple[int, int] | None:
    """Return a period and offset that select exactly the given layers, the old ones if they do; None without any."""
    candidates = [(period, offset), *((p, o) for p in range(1, len(selected) + 2) for o in range(p))]
    return next((c for c in candidates if [i % c[0] == c[1] for i in range(len(selected))] == list(selected)), None)
