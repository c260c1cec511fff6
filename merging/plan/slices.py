"""Which tensor of which model goes into which tensor of the result: by name, or by layers where a recipe has slices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from common.errors import CheckpointError, UsageError
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.tensor_names import in_part, layer_of, role_of, stacks_of
from merging.plan.prediction import main_depths, prediction_names
from merging.recipe.schedules import Section


@dataclass(frozen=True)
class Inputs:
    """The checkpoints of a merge. The donor gives the names, the config and what is copied; it may be the base or the
    first model. `base` is None where the method works without one."""

    donor: Checkpoint
    models: tuple[Checkpoint, ...]
    base: Checkpoint | None

    @property
    def all(self) -> list[Checkpoint]:
        """Every checkpoint once, the donor first."""
        return list({id(c): c for c in (self.donor, *self.models, *([self.base] if self.base else []))}.values())

    @property
    def distinct(self) -> list[Checkpoint]:
        """Every checkpoint once by name: a base that is one of the models too is opened for each."""
        named: dict[str, Checkpoint] = {}
        for checkpoint in self.all:
            named.setdefault(checkpoint.name, checkpoint)
        return list(named.values())


@dataclass(frozen=True)
class Slot:
    """One tensor of the result: the section it belongs to (None: copied from its own checkpoint) and where it is found.

    own: the checkpoint and name that its shape (and what is not merged) is taken from; models: the name in each model
    of the section; depth in [0, 1] is the layer's position in its section, 0 outside layers.
    """

    name: str
    section: Section | None
    depth: float
    own: tuple[Checkpoint, str]
    models: tuple[str, ...]
    base: str


def slots_of(
    inputs: Inputs, sections: Sequence[Section], names: Sequence[str], predicting: Collection[str] = ()
) -> list[Slot]:
    """Lay out every tensor of the result; `names` are the donor's.

    predicting: those of the donor that predict further tokens, which a result of slices has behind its layers. Raises
    UsageError for slices that cannot be.
    """
    for section in sections:
        in_part("", section.module)  # a part that is not known is an error before anything else
    depths = stacks_of(names)
    slots: list[Slot] = []
    for part in dict.fromkeys(section.module for section in sections):
        mine = [section for section in sections if section.module == part]
        inside = [name for name in names if in_part(name, part)]
        if mine[0].layers is None:
            slots += [_in_place(name, mine[0], inputs, depths) for name in inside]
        else:
            slots += _sliced(inside, mine, inputs)
    placed = {slot.name for slot in slots}
    left = [name for name in names if name not in placed and not _in_any_part(name, sections)]
    if any(section.layers is not None for section in sections):
        slots = [slot for slot in slots if slot.own[1] not in predicting]
        left = [name for name in left if name not in predicting]
        slots += _behind(inputs.donor, slots, predicting)
    slots += [Slot(name, None, 0.0, (inputs.donor, name), (), name) for name in left]
    if all(section.layers is None for section in sections):
        order = {name: i for i, name in enumerate(names)}
        slots.sort(key=lambda slot: order[slot.name])
    return slots


def _behind(donor: Checkpoint, slots: Sequence[Slot], predicting: Collection[str]) -> Iterator[Slot]:
    """The donor's tensors that predict further tokens, copied; layers behind the others are renumbered."""
    result = stacks_of(slot.name for slot in slots)
    depths = stacks_of(name for name in donor.tensors if name not in predicting)
    for name in donor.tensors:
        if name not in predicting:
            continue
        found = layer_of(name)
        if found and found[0] in depths:
            place = result.get(found[0], 0) + found[1] - depths[found[0]]
            yield Slot(f"{found[0]}{place}{found[2]}", None, 0.0, (donor, name), (), name)
        else:
            yield Slot(name, None, 0.0, (donor, name), (), name)


def _in_any_part(name: str, sections: Sequence[Section]) -> bool:
    return any(in_part(name, section.module) for section in sections)


def _in_place(name: str, section: Section, inputs: Inputs, depths: dict[str, int]) -> Slot:
    found = layer_of(name)
    depth = 0.0 if found is None else _depth(found[1], depths[found[0]])
    return Slot(name, section, depth, (inputs.donor, name), (name,) * len(section.models), name)


def _depth(index: int, layers: int) -> float:
    """Position of a layer for gradients, as mergekit has it: 1 where there is only one layer."""
    return index / (layers - 1) if layers > 1 else 1.0


def _sliced(names: Sequence[str], sections: Sequence[Section], inputs: Inputs) -> Iterator[Slot]:
    """Tensors before the layers from the first section's sources, layers from each in turn, the rest from the last."""
    outside = [name for name in names if layer_of(name) is None]
    whole = partial(_in_place, inputs=inputs, depths={})
    yield from (whole(name, sections[0]) for name in outside if role_of(name) == "input")
    at = 0
    for section in sections:
        yield from _layers(section, at, inputs)
        at += section.depth
    yield from (whole(name, sections[-1]) for name in outside if role_of(name) != "input")


def _layers(section: Section, at: int, inputs: Inputs) -> Iterator[Slot]:
    """The tensors of one slice, its first layer being layer number `at` of the result."""
    assert section.layers is not None
    models = [inputs.models[i] for i in section.models]
    stack = _stack((*models, inputs.donor)[0], section.module)
    for model, (_, stop) in zip(models, section.layers, strict=True):
        _check_range(model, stack, stop)
    if inputs.base is not None and section.base_layers is None:
        raise UsageError(f"A slice names no layers of the base {inputs.base.name}, which the method needs.")
    if inputs.base is not None and section.base_layers is not None:
        _check_range(inputs.base, stack, section.base_layers[1])
    first = (*section.layers, section.base_layers or (0, 0))[0][0]
    base_first = section.base_layers[0] if section.base_layers else first
    own, own_first = (inputs.base, base_first) if inputs.base is not None else (models[0], first)
    rests: dict[int, list[str]] = defaultdict(list)
    for name in own.tensors:
        if (found := layer_of(name)) and found[0] == stack:
            rests[found[1]].append(found[2])
    for k in range(section.depth):
        for rest in rests[own_first + k]:
            yield Slot(
                name=f"{stack}{at + k}{rest}",
                section=section,
                depth=_depth(k, section.depth),
                own=(own, f"{stack}{own_first + k}{rest}"),
                models=tuple(f"{stack}{start + k}{rest}" for start, _ in section.layers),
                base=f"{stack}{base_first + k}{rest}",
            )


def _stack(model: Checkpoint, part: str | None) -> str:
    """The one stack of layers of a model (or of a part of it). Raises UsageError where there are several."""
    predicting = prediction_names(model)
    stacks = stacks_of(name for name in model.tensors if in_part(name, part) and name not in predicting)
    if len(stacks) != 1:
        raise UsageError(
            f"{model.name} has {len(stacks)} stacks of layers ({', '.join(stacks) or 'none'}); "
            "slices work on one: use modules to say which part of the model they are for."
        )
    return next(iter(stacks))


def _check_range(model: Checkpoint, stack: str, stop: int) -> None:
    layers = main_depths(model).get(stack, 0)
    if stop > layers:
        raise CheckpointError(f"A slice takes layers up to {stop} of {model.name}, which has {layers} ({stack}*).")
