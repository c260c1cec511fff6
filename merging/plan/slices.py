"""Slots: the source tensors of each result tensor, by name, or by layers where a recipe has slices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from common.errors import CheckpointError, UsageError
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.tensor_names import in_part, layer_of, role_of, stacks_of
from merging.plan.prediction import main_depths, prediction_names
from merging.recipe.schedules import OutputSlice


@dataclass(frozen=True)
class Inputs:
    """Checkpoints of a merge.

    template_model: the base or the first model, from which names, config and copied tensors are taken; base: None where
    the method works without one.
    """

    template_model: Checkpoint
    models: tuple[Checkpoint, ...]
    base: Checkpoint | None

    @property
    def all(self) -> list[Checkpoint]:
        """Every checkpoint once, the template model first."""
        return list(
            {id(c): c for c in (self.template_model, *self.models, *([self.base] if self.base else []))}.values()
        )

    @property
    def distinct(self) -> list[Checkpoint]:
        """Every checkpoint once by name; a base that is also one of the models is opened twice."""
        named: dict[str, Checkpoint] = {}
        for checkpoint in self.all:
            named.setdefault(checkpoint.name, checkpoint)
        return list(named.values())


@dataclass(frozen=True)
class Slot:
    """One tensor of the result with its output slice and its names in the inputs.

    output_slice: None where the tensor is copied from `source`; depth: the layer's position in its output slice, in
    [0, 1], 0 outside layers; source: checkpoint and name that give the shape, and the values where nothing is merged;
    models: the name in each model of the output slice; base: the name in the base.
    """

    name: str
    output_slice: OutputSlice | None
    depth: float
    source: tuple[Checkpoint, str]
    models: tuple[str, ...]
    base: str


def slots_of(
    inputs: Inputs, output_slices: Sequence[OutputSlice], names: Sequence[str], predicting: Collection[str] = ()
) -> list[Slot]:
    """Return a slot for every tensor of the result.

    Args:
        inputs: The checkpoints of the merge.
        output_slices: The slices of the recipe; one without layers for whole models.
        names: Tensor names of the template model.
        predicting: Names among them that belong to multi-token prediction; a result of slices has them after its
            layers.

    Raises:
        UsageError: A slice names layers that a model does not have, or a part that no model has.
    """
    for output_slice in output_slices:
        in_part("", output_slice.module)  # raises for an unknown part
    depths = stacks_of(names)
    slots: list[Slot] = []
    for part in dict.fromkeys(output_slice.module for output_slice in output_slices):
        part_slices = [output_slice for output_slice in output_slices if output_slice.module == part]
        inside = [name for name in names if in_part(name, part)]
        if part_slices[0].layers is None:
            slots += [_whole_model_slot(name, part_slices[0], inputs, depths) for name in inside]
        else:
            slots += _slice_slots(inside, part_slices, inputs)
    placed = {slot.name for slot in slots}
    unplaced = [name for name in names if name not in placed and not _in_any_part(name, output_slices)]
    if any(output_slice.layers is not None for output_slice in output_slices):
        slots = [slot for slot in slots if slot.source[1] not in predicting]
        unplaced = [name for name in unplaced if name not in predicting]
        slots += _prediction_slots(inputs.template_model, slots, predicting)
    slots += [Slot(name, None, 0.0, (inputs.template_model, name), (), name) for name in unplaced]
    if all(output_slice.layers is None for output_slice in output_slices):
        order = {name: i for i, name in enumerate(names)}
        slots.sort(key=lambda slot: order[slot.name])
    return slots


def _prediction_slots(template_model: Checkpoint, slots: Sequence[Slot], predicting: Collection[str]) -> Iterator[Slot]:
    """Yield the template model's multi-token prediction tensors, copied; their layers are renumbered."""
    result = stacks_of(slot.name for slot in slots)
    depths = stacks_of(name for name in template_model.tensors if name not in predicting)
    for name in template_model.tensors:
        if name not in predicting:
            continue
        layer = layer_of(name)
        if layer and layer[0] in depths:
            place = result.get(layer[0], 0) + layer[1] - depths[layer[0]]
            yield Slot(f"{layer[0]}{place}{layer[2]}", None, 0.0, (template_model, name), (), name)
        else:
            yield Slot(name, None, 0.0, (template_model, name), (), name)


def _in_any_part(name: str, output_slices: Sequence[OutputSlice]) -> bool:
    return any(in_part(name, output_slice.module) for output_slice in output_slices)


def _whole_model_slot(name: str, output_slice: OutputSlice, inputs: Inputs, depths: dict[str, int]) -> Slot:
    layer = layer_of(name)
    depth = 0.0 if layer is None else _depth(layer[1], depths[layer[0]])
    return Slot(name, output_slice, depth, (inputs.template_model, name), (name,) * len(output_slice.models), name)


def _depth(index: int, layers: int) -> float:
    """Return the position of a layer in [0, 1] as in mergekit: 1 where there is only one layer."""
    return index / (layers - 1) if layers > 1 else 1.0


def _slice_slots(names: Sequence[str], output_slices: Sequence[OutputSlice], inputs: Inputs) -> Iterator[Slot]:
    """Yield the embedding of the first slice, the layers of each slice in turn, and the rest from the last slice."""
    outside = [name for name in names if layer_of(name) is None]
    whole = partial(_whole_model_slot, inputs=inputs, depths={})
    yield from (whole(name, output_slices[0]) for name in outside if role_of(name) == "input")
    at = 0
    for output_slice in output_slices:
        yield from _layer_slots(output_slice, at, inputs)
        at += output_slice.depth
    yield from (whole(name, output_slices[-1]) for name in outside if role_of(name) != "input")


def _layer_slots(output_slice: OutputSlice, at: int, inputs: Inputs) -> Iterator[Slot]:
    """Yield the tensors of one slice; `at` is the number of its first layer in the result."""
    assert output_slice.layers is not None
    models = [inputs.models[i] for i in output_slice.models]
    stack = _only_stack((*models, inputs.template_model)[0], output_slice.module)
    for model, (_, stop) in zip(models, output_slice.layers, strict=True):
        _check_range(model, stack, stop)
    if inputs.base is not None and output_slice.base_layers is None:
        raise UsageError(f"A slice names no layers of the base {inputs.base.name}, which the method needs.")
    if inputs.base is not None and output_slice.base_layers is not None:
        _check_range(inputs.base, stack, output_slice.base_layers[1])
    first = (*output_slice.layers, output_slice.base_layers or (0, 0))[0][0]
    base_first = output_slice.base_layers[0] if output_slice.base_layers else first
    checkpoint, first_layer = (inputs.base, base_first) if inputs.base is not None else (models[0], first)
    rests: dict[int, list[str]] = defaultdict(list)
    for name in checkpoint.tensors:
        if (layer := layer_of(name)) and layer[0] == stack:
            rests[layer[1]].append(layer[2])
    for k in range(output_slice.depth):
        for rest in rests[first_layer + k]:
            yield Slot(
                name=f"{stack}{at + k}{rest}",
                output_slice=output_slice,
                depth=_depth(k, output_slice.depth),
                source=(checkpoint, f"{stack}{first_layer + k}{rest}"),
                models=tuple(f"{stack}{start + k}{rest}" for start, _ in output_slice.layers),
                base=f"{stack}{base_first + k}{rest}",
            )


def _only_stack(model: Checkpoint, part: str | None) -> str:
    """Return the only stack of layers of a model or of a part of it. Raises UsageError where there are several."""
    predicting = prediction_names(model)
    stacks = stacks_of(name for name in model.tensors if in_part(name, part) and name not in predicting)
    if len(stacks) != 1:
        raise UsageError(
            f"{model.name} has {len(stacks)} stacks of layers ({', '.join(stacks) or 'none'}); "
            "slices apply to one: name the part of the model with modules."
        )
    return next(iter(stacks))


def _check_range(model: Checkpoint, stack: str, stop: int) -> None:
    layers = main_depths(model).get(stack, 0)
    if stop > layers:
        raise CheckpointError(f"A slice takes layers up to {stop} of {model.name}, which has {layers} ({stack}*).")
