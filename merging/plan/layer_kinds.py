"""Kinds of layers, read from transformers' model on the meta device: classes, windows, rotary embeddings, experts.

The result's layers are compared with the layers that they come from, so that no layer changes its kind by its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import CheckpointError
from common.terminal_text import quoted
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.parsed_config import ParsedConfig, parse_config
from merging.checkpoints.tensor_names import PARTS
from merging.plan.config_meaning import BY_LAYER, DEPTHS
from merging.plan.prediction import main_depths
from merging.plan.types import LayerOrigin

NUMBERED = re.compile(r"(layer_?(idx|id|index|number|num)|idx|index|layer_n\w*|block_(idx|id))")
"""Attributes that hold a layer's place."""
Attributes = Mapping[tuple[str, str], Any]
"""{(path of a module in the layer, attribute): value}; the module's class is the attribute "class"."""


@dataclass(frozen=True)
class LayerKinds:
    """The attributes of every layer of one stack."""

    layers: tuple[Attributes, ...]

    def varying(self) -> set[tuple[str, str]]:
        """Return the attributes in which two layers differ, their place in the stack excepted."""
        keys = {key for layer in self.layers for key in layer}
        return {
            key for key in keys
            if any(layer.get(key) != self.layers[0].get(key) for layer in self.layers) and not self._is_place(key)
        }  # fmt: skip

    def _is_place(self, key: tuple[str, str]) -> bool:
        values = [layer.get(key) for layer in self.layers]
        return bool(NUMBERED.fullmatch(key[1])) or values == list(range(len(values)))


def check_kinds(
    config: Mapping[str, Any], template_model: Checkpoint, origins: Mapping[str, tuple[LayerOrigin, ...]]
) -> None:
    """Compare each layer of the result with the layer that it comes from.

    config: of the result. Raises CheckpointError, naming the keys that give layers their kind, where a layer would be
    of another kind or depends on the number of layers, and where that cannot be found out.
    """
    for stack, origin in origins.items():
        result = kinds_of(parse_config(config), config, stack, len(origin))
        sources = {id(one.checkpoint): _stored_kinds(one.checkpoint, stack) for one in origin}
        own = _stored_kinds(template_model, stack)
        keys = _keys_by_layer(template_model, config)
        if result is None or own is None or any(kinds is None for kinds in sources.values()):
            if keys:
                raise CheckpointError(
                    f"Slices of {stack}*: config.json of {template_model.name} gives its layers their kind by {keys}, "
                    "and transformers cannot make this model to check them; merge whole models."
                )
            continue
        trouble = _difference(result, own, [(one, sources[id(one.checkpoint)]) for one in origin])
        if trouble is not None:
            place, (path, attribute), value, expected, one = trouble
            what = f"{path}.{attribute}" if path else attribute
            raise CheckpointError(
                f"Slices of {stack}*: layer {place} of the result would have {what} {quoted(value)}, and layer "
                f"{one.index} of {one.checkpoint.name}, which it comes from, has {quoted(expected)}; config.json gives "
                f"layers their kind by {keys or 'their number'}, and no value of it fits these slices: "
                "choose layers so that it does."
            )


def check_sources(origins: Mapping[str, tuple[LayerOrigin, ...]]) -> Iterator[str]:
    """Yield a sentence for each stack in which a slice merges layers of different kinds."""
    for stack, origin in origins.items():
        for one in origin:
            first = _stored_kinds(one.checkpoint, stack) if one.others else None
            for checkpoint, index in one.others:
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
    result: LayerKinds, own: LayerKinds, sources: Sequence[tuple[LayerOrigin, LayerKinds | None]]
) -> tuple[int, tuple[str, str], Any, Any, LayerOrigin] | None:
    """The first attribute in which a layer of the result differs from the layer that it comes from."""
    varying = own.varying() | result.varying()
    for _, kinds in sources:
        varying |= kinds.varying() if kinds is not None else set()
    constant = {key for key in own.layers[0] if key not in varying and not NUMBERED.fullmatch(key[1])}
    for place, (one, kinds) in enumerate(sources):
        assert kinds is not None
        layer, source = result.layers[place], kinds.layers[one.index]
        for key in sorted(varying):
            if layer.get(key) != source.get(key):
                return place, key, layer.get(key), source.get(key), one
        for key in sorted(constant):  # a value that depends on the number of layers
            if layer.get(key) != own.layers[0].get(key):
                return place, key, layer.get(key), own.layers[0].get(key), one
    return None


def _keys_by_layer(template_model: Checkpoint, config: Mapping[str, Any]) -> str:
    """The keys that give layers their kind, as words."""
    parts = (template_model.parsed_config.text, template_model.text_config, config)
    keys = [key for part in parts for key, value in part.items() if BY_LAYER.fullmatch(key) and value]
    return ", ".join(dict.fromkeys(key for key in keys if not key.startswith("_")))


def _stored_kinds(checkpoint: Checkpoint, stack: str) -> LayerKinds | None:
    """The kinds of a checkpoint's layers, read once."""
    cache: dict[str, LayerKinds | None] = checkpoint.__dict__.setdefault("_layer_kinds", {})
    if stack not in cache:
        depth = main_depths(checkpoint).get(stack, 0)
        cache[stack] = kinds_of(checkpoint.parsed_config, checkpoint.config, stack, depth)
    return cache[stack]


def kinds_of(parsed: ParsedConfig, config: Mapping[str, Any], stack: str, depth: int) -> LayerKinds | None:
    """Return the attributes of a stack's layers in the model that transformers makes of a config; None where it cannot.

    The model is made on the meta device, without memory for weights.
    """
    if not parsed.is_known:
        return None
    try:
        import torch
        import transformers

        from common.quiet_transformers import quiet_transformers

        with quiet_transformers(), torch.device("meta"):
            model = _made(transformers, parsed.source, config)
        lists = [
            (name, module) for name, module in model.named_modules()
            if isinstance(module, torch.nn.ModuleList) and len(module) == depth and _fits(name, stack)
        ]  # fmt: skip
    except Exception:  # a class that cannot be made this way: the caller decides
        return None
    if not lists:
        return None
    _, layers = min(lists, key=lambda entry: (entry[0].count("."), entry[0]))
    entries = _config_entries(parsed, depth)
    return LayerKinds(tuple({**_attributes(layer, depth), **entries[i]} for i, layer in enumerate(layers)))


def _made(transformers: Any, source: Any, config: Mapping[str, Any]) -> Any:
    """The model of a config: of the class that it names, else the one for text, else the bare one."""
    names = config.get("architectures") or []
    named = getattr(transformers, names[0], None) if names else None
    if named is not None:
        return named(source)
    try:
        return transformers.AutoModelForCausalLM.from_config(source)
    except ValueError:
        return transformers.AutoModel.from_config(source)


def _fits(name: str, stack: str) -> bool:
    """True where a module list has the last word of a stack, and is in the same part of the model."""
    last = stack.rstrip(".").rpartition(".")[2]

    def words(text: str) -> set[str]:
        return {word for word in ("vision_tower", "audio_tower") if PARTS[word].search(text)}

    def side(text: str) -> str:
        return "encoder" if "encoder." in text else "decoder" if "decoder." in text else ""

    path = f"{name}."
    sides = {side(path), side(stack)}
    return name.rpartition(".")[2] == last and words(path) == words(stack) and (len(sides) == 1 or "" in sides)


def _attributes(layer: Any, depth: int) -> dict[tuple[str, str], Any]:
    """Classes, plain attributes and parameter shapes of a layer's modules, without what describes the whole model."""
    found: dict[tuple[str, str], Any] = {}
    for path, module in layer.named_modules():
        found[path, "class"] = type(module).__name__
        for key, value in vars(module).items():
            whole = DEPTHS.fullmatch(key) or (isinstance(value, list | tuple) and len(value) == depth)
            if not key.startswith("_") and key != "training" and not whole and _is_plain(value):
                found[path, key] = value
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            found[path, f"shape of {key}"] = tuple(tensor.shape)
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _config_entries(parsed: ParsedConfig, depth: int) -> list[dict[tuple[str, str], Any]]:
    """Each layer's entries in the lists of the language model's config that have one per layer."""
    lists = {k: v for k, v in parsed.text.items() if isinstance(v, list) and len(v) == depth and BY_LAYER.fullmatch(k)}
    return [{("config", key): value[i] for key, value in lists.items()} for i in range(depth)]
