"""A config that tells of the layers of a result made of slices: their number, and lists with an entry for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from console.errors import CheckpointError
from merging.names import PARTS

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "encoder_layers")
ENCODER = ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers")
DECODER = ("decoder_layers", "num_decoder_layers")
"""Keys that tell the depth of a model (or of a part with a config of its own), and of two stacks in one config."""


def take_layers(
    config: dict[str, Any], depths: Mapping[str, int], origins: Mapping[str, tuple[int, ...]], donor: str
) -> None:
    """Change a config to have, in each stack of `origins`, the donor's layers of those numbers in that order.

    depths: {stack: number of layers} of the donor, whose config it is. Raises CheckpointError where no key of the
    config tells the depth of a stack, or a list has no entry for a layer.
    """
    paired = any("encoder." in stack for stack in depths) and any("decoder." in stack for stack in depths)
    if paired and "num_decoder_layers" not in config and "num_layers" in config:
        config["num_decoder_layers"] = config["num_layers"]  # unsaid, it follows the encoder's
    for stack, origin in origins.items():
        found = [
            (part, key)
            for part, keys in _places(config, stack, paired)
            for key in keys
            if part.get(key) == depths.get(stack)
        ]
        if not found:
            raise CheckpointError(
                f"Slices of {stack}*: config.json of {donor} has no key that tells how many layers it has "
                f"({depths.get(stack)}), so that the result's could not tell it either."
            )
        for part in {id(part): part for part, _ in found}.values():
            if not (paired and part is config):  # a list there could be of the other stack
                _take_entries(part, depths[stack], origin, donor)
        for part, key in found:
            part[key] = len(origin)


def _places(config: dict[str, Any], stack: str, paired: bool) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """The parts of a config that may tell the depth of a stack, and the keys there."""
    nested = {name: part for name, part in config.items() if isinstance(part, dict)}
    for word, name in (("vision_tower", "vision_config"), ("audio_tower", "audio_config")):
        if PARTS[word].search(stack):
            yield from ((nested[key], DEPTHS) for key in (name,) if key in nested)
            return
    if not paired:
        yield config, DEPTHS
        yield from ((nested[key], DEPTHS) for key in ("text_config",) if key in nested)
        return
    side, keys = ("encoder", ENCODER) if PARTS["encoder"].search(stack) else ("decoder", DECODER)
    if side in nested:
        yield nested[side], DEPTHS
    else:
        yield config, keys


def _take_entries(part: dict[str, Any], depth: int, origin: tuple[int, ...], donor: str) -> None:
    """Take, of each list that has an entry per layer, the entries of the layers that are left."""
    for key, value in part.items():
        per_layer = isinstance(value, list) and len(value) == depth
        if not per_layer or key == "architectures" or key.endswith(("token_id", "token_ids")):
            continue
        if max(origin) >= depth:
            raise CheckpointError(
                f"config.json of {donor} lists {key} for its {depth} layers, and a slice takes layer {max(origin)} "
                "from another model; put the model with the most layers first, or give it as base_model."
            )
        part[key] = [value[i] for i in origin]
