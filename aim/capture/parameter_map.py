"""Map from parameters to stored tensors: a checkpoint's names and shapes may differ from those of the modules.

transformers 5 fuses experts and renames parts while it loads, by tables of its own; these are asked. Older versions
only rename.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

ROWWISE = ("MergeModulelist", "PermuteForRope", "Transpose")
"""Conversions that leave the order of the input channels alone; so do those that cut or join along another axis."""
ALONG = ("Concatenate", "Chunk", "Split", "Interleave")


@dataclass(frozen=True)
class Part:
    """A stored tensor of a parameter: which matrix of a stack (None: all, or no stack), and its channels' axis."""

    name: str
    expert: int | None
    axis: int


@dataclass(frozen=True)
class Binding:
    """The stored tensors that a parameter is made of, by the groups that transformers converts together.

    groups: stored names in order; operations: names and axes of the conversions ("Transpose", None); empty where the
    parameter is a stored tensor as it is.
    """

    groups: tuple[tuple[str, ...], ...]
    operations: tuple[tuple[str, int | None], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every stored name."""
        return tuple(name for group in self.groups for name in group)


def bindings(model: nn.Module, stored: Iterable[str]) -> dict[str, Binding]:
    """Return {parameter of the model: what is stored for it}; stored tensors that the model has not are left out."""
    parameter_names = set(model.state_dict())
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:
        return _renamed(model, stored, parameter_names)
    mapping: Sequence[Any] = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix, shapes = getattr(model, "base_model_prefix", ""), model.state_dict()
    groups: dict[str, dict[str, list[str]]] = {}
    operations: dict[str, tuple[tuple[str, int | None], ...]] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, shapes)
        if name not in parameter_names and key in parameter_names:
            name, pattern = key, None
        if name not in parameter_names:
            continue
        groups.setdefault(name, {}).setdefault(pattern or key, []).append(key)
        if pattern is not None:
            operations[name] = tuple(
                (type(o).__name__, getattr(o, "dim", None)) for o in by_pattern[pattern].operations
            )
    return {
        name: Binding(tuple(map(tuple, group.values())), operations.get(name, ())) for name, group in groups.items()
    }


def _renamed(model: nn.Module, stored: Iterable[str], parameter_names: set[str]) -> dict[str, Binding]:
    """The names alone, by the model's own table and with or without the inner model's prefix."""
    prefix = getattr(model, "base_model_prefix", "")
    table: Mapping[str, str] = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    renamed = {}
    for key in stored:
        other = key
        for pattern, replacement in table.items():
            other, count = re.subn(pattern, replacement, key)
            if count:
                break
        choices = (other, f"{prefix}.{other}", other.removeprefix(f"{prefix}."), key)
        name = next((choice for choice in choices if choice in parameter_names), None)
        if name is not None:
            renamed[name] = Binding(((key,),))
    return renamed


def parts(
    binding: Binding, axis: int, shape: Sequence[int], stacked: bool, stored: Mapping[str, Sequence[int]]
) -> list[Part]:
    """Return where a parameter's input channels are in the stored tensors.

    axis, shape: of the parameter's channels and the parameter; stacked: whether it stacks matrices along axis 0.
    A stored tensor whose channels cannot be told (converted across them) is left out.
    """
    stored_parts = []
    swapped = any(kind == "Transpose" for kind, _ in binding.operations)
    for kind, dim in binding.operations:
        if kind not in ROWWISE and not (kind in ALONG and dim is not None and dim % len(shape) != axis):
            return []
    for group in binding.groups:
        for i, name in enumerate(group):
            tensor = stored[name]
            one = stacked and len(tensor) == len(shape) - 1 and len(group) == shape[0]
            if not one and len(tensor) != len(shape):
                continue
            place = axis - one
            if swapped:  # the last two axes
                place = {len(tensor) - 1: len(tensor) - 2, len(tensor) - 2: len(tensor) - 1}.get(place, place)
            if tensor[place] == shape[axis]:
                stored_parts.append(Part(name, i if one else None, place))
    return stored_parts
