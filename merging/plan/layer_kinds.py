"""Kinds of layers in transformers' model on the meta device: classes, windows, rotary embeddings, experts.

The result's layers are compared with their source layers, so that no layer changes its kind with its position.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import CheckpointError
from common.files.json_values import JsonValue
from common.terminal_text import quoted
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.parsed_config import ParsedConfig, parse_config
from merging.checkpoints.tensor_names import PARTS
from merging.plan.config_meaning import BY_LAYER, DEPTHS
from merging.plan.prediction import main_depths
from merging.plan.types import LayerOrigin

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

NUMBERED = re.compile(r"(layer_?(idx|id|index|number|num)|idx|index|layer_n\w*|block_(idx|id))")
"""Attributes that hold a layer's number."""
Attributes = Mapping[tuple[str, str], object]
"""{(path of a module in the layer, attribute): value}; the module's class is the attribute "class"."""


@dataclass(frozen=True)
class LayerKinds:
    """The attributes of every layer of one stack."""

    layers: tuple[Attributes, ...]

    def varying(self) -> set[tuple[str, str]]:
        """Return the attributes in which two layers differ, except layer numbers."""
        keys = {key for layer in self.layers for key in layer}
        first = self.layers[0]
        return {
            key for key in keys
            if not self._is_layer_number(key) and any(layer.get(key) != first.get(key) for layer in self.layers)
        }  # fmt: skip

    def _is_layer_number(self, key: tuple[str, str]) -> bool:
        values = [layer.get(key) for layer in self.layers]
        return bool(NUMBERED.fullmatch(key[1])) or values == list(range(len(values)))


def check_kinds(
    config: Mapping[str, JsonValue], template_model: Checkpoint, origins: Mapping[str, tuple[LayerOrigin, ...]]
) -> None:
    """Compare each layer of the result with its source layer.

    Args:
        config: Config of the result.
        template_model: The base or the first model.
        origins: {stack: source of each layer}.

    Raises:
        CheckpointError: A layer would be of another kind than its source, or that cannot be checked; names the keys
            that define the kinds.
    """
    for stack, origin in origins.items():
        result = kinds_of(parse_config(config), config, stack, len(origin))
        sources = {id(one.checkpoint): _stored_kinds(one.checkpoint, stack) for one in origin}
        template_kinds = _stored_kinds(template_model, stack)
        keys = _keys_by_layer(template_model, config)
        if result is None or template_kinds is None or any(kinds is None for kinds in sources.values()):
            if keys:
                raise CheckpointError(
                    f"Slices of {stack}*: config.json of {template_model.name} defines the kinds of its layers by "
                    f"{keys}, and transformers cannot build this model to check them; merge whole models."
                )
            continue
        difference = _difference(result, template_kinds, [(one, sources[id(one.checkpoint)]) for one in origin])
        if difference is not None:
            place, (path, attribute), value, expected, one = difference
            what = f"{path}.{attribute}" if path else attribute
            raise CheckpointError(
                f"Slices of {stack}*: layer {place} of the result would have {what} {quoted(value)}, and layer "
                f"{one.index} of {one.checkpoint.name}, its source, has {quoted(expected)}; config.json "
                f"defines the kinds of layers by {keys or 'their number'}, and no value fits these slices; choose "
                "other layers."
            )


def check_sources(origins: Mapping[str, tuple[LayerOrigin, ...]]) -> Iterator[str]:
    """Yield a description for each stack in which a slice merges layers of different kinds."""
    for stack, origin in origins.items():
        for one in origin:
            first = _stored_kinds(one.checkpoint, stack) if one.further_sources else None
            for checkpoint, index in one.further_sources:
                other = _stored_kinds(checkpoint, stack)
                if first is None or other is None or (checkpoint is one.checkpoint and index == one.index):
                    continue
                for key in sorted(first.varying() | other.varying()):
                    value, expected = other.layers[index].get(key), first.layers[one.index].get(key)
                    if value != expected:
                        attribute = ".".join(filter(None, key))
                        yield (
                            f"a slice merges layer {index} of {checkpoint.name} ({stack}*, {attribute} "
                            f"{quoted(value)}) with layer {one.index} of {one.checkpoint.name} ({quoted(expected)})"
                        )
                        return


def _difference(
    result: LayerKinds, template_kinds: LayerKinds, sources: Sequence[tuple[LayerOrigin, LayerKinds | None]]
) -> tuple[int, tuple[str, str], object, object, LayerOrigin] | None:
    """Return the first attribute in which a layer of the result differs from its source layer."""
    varying = template_kinds.varying() | result.varying()
    for _, kinds in sources:
        varying |= kinds.varying() if kinds is not None else set()
    constant = {key for key in template_kinds.layers[0] if key not in varying and not NUMBERED.fullmatch(key[1])}
    for place, (one, kinds) in enumerate(sources):
        assert kinds is not None
        layer, source = result.layers[place], kinds.layers[one.index]
        for key in sorted(varying):
            if layer.get(key) != source.get(key):
                return place, key, layer.get(key), source.get(key), one
        for key in sorted(constant):  # a value that depends on the number of layers
            if layer.get(key) != template_kinds.layers[0].get(key):
                return place, key, layer.get(key), template_kinds.layers[0].get(key), one
    return None


def _keys_by_layer(template_model: Checkpoint, config: Mapping[str, JsonValue]) -> str:
    """Return the config keys that define the kinds of layers, as text."""
    parts = (template_model.parsed_config.text, template_model.text_config, config)
    keys = [key for part in parts for key, value in part.items() if BY_LAYER.fullmatch(key) and value]
    return ", ".join(dict.fromkeys(key for key in keys if not key.startswith("_")))


def _stored_kinds(checkpoint: Checkpoint, stack: str) -> LayerKinds | None:
    """Return the kinds of a checkpoint's layers, cached."""
    cache: dict[str, LayerKinds | None] = checkpoint.__dict__.setdefault("_layer_kinds", {})
    if stack not in cache:
        depth = main_depths(checkpoint).get(stack, 0)
        cache[stack] = kinds_of(checkpoint.parsed_config, checkpoint.config, stack, depth)
    return cache[stack]


def kinds_of(parsed: ParsedConfig, config: Mapping[str, JsonValue], stack: str, depth: int) -> LayerKinds | None:
    """Return the attributes of a stack's layers in transformers' model; None where it cannot be built.

    The model is built on the meta device, without memory for weights.

    Args:
        parsed: The config with defaults.
        config: The config as written, for `architectures`.
        stack: Prefix of the stack's tensor names ("model.layers.").
        depth: Number of its layers.
    """
    if parsed.source is None:
        return None
    try:
        import torch

        from common.quiet_transformers import quiet_transformers

        with quiet_transformers(), torch.device("meta"):
            model = _build_model(parsed.source, config)
        lists = [
            (name, module) for name, module in model.named_modules()
            if isinstance(module, torch.nn.ModuleList) and len(module) == depth and _fits(name, stack)
        ]  # fmt: skip
    except Exception:  # the class cannot be built from a config alone: the caller decides
        return None
    if not lists:
        return None
    _, layers = min(lists, key=lambda entry: (entry[0].count("."), entry[0]))
    entries = _config_entries(parsed, depth)
    return LayerKinds(tuple({**_attributes(layer, depth), **entries[i]} for i, layer in enumerate(layers)))


def _build_model(source: PretrainedConfig, config: Mapping[str, JsonValue]) -> nn.Module:
    """Return the model of a config: of the class in `architectures`, else the causal LM, else the base model."""
    import transformers

    names = config.get("architectures") or []
    named = getattr(transformers, names[0], None) if names else None
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named(source)
    try:
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(source, trust_remote_code=False)
    except ValueError:
        model = transformers.AutoModel.from_config(source, trust_remote_code=False)
    return model


def _fits(name: str, stack: str) -> bool:
    """Return True where a module list has the last component of a stack's name, in the same part of the model."""
    last = stack.rstrip(".").rpartition(".")[2]

    def words(text: str) -> set[str]:
        return {word for word in ("vision_tower", "audio_tower") if PARTS[word].search(text)}

    def side(text: str) -> str:
        return "encoder" if "encoder." in text else "decoder" if "decoder." in text else ""

    path = f"{name}."
    sides = {side(path), side(stack)}
    return name.rpartition(".")[2] == last and words(path) == words(stack) and (len(sides) == 1 or "" in sides)


def _attributes(layer: nn.Module, depth: int) -> dict[tuple[str, str], object]:
    """Return classes, plain attributes and parameter shapes of a layer's modules, without whole-model attributes."""
    attributes: dict[tuple[str, str], object] = {}
    for path, module in layer.named_modules():
        attributes[path, "class"] = type(module).__name__
        for key, value in vars(module).items():
            whole = DEPTHS.fullmatch(key) or (isinstance(value, list | tuple) and len(value) == depth)
            if not key.startswith("_") and key != "training" and not whole and _is_plain(value):
                attributes[path, key] = value
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            attributes[path, f"shape of {key}"] = tuple(tensor.shape)
    return attributes


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _config_entries(parsed: ParsedConfig, depth: int) -> list[dict[tuple[str, str], object]]:
    """Return each layer's entries in the per-layer lists of the language model's config."""
    lists = {k: v for k, v in parsed.text.items() if isinstance(v, list) and len(v) == depth and BY_LAYER.fullmatch(k)}
    return [{("config", key): value[i] for key, value in lists.items()} for i in range(depth)]
