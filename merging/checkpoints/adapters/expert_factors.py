"""LoRA factors of fused experts (PEFT's target_parameters), matched to the base's storage of its experts.

PEFT keeps one A (experts * r, s) and one B (s', r * experts) for a parameter (experts, s1, s2); the rows of A are
ordered by expert and then by rank, the columns of B by rank and then by expert. For parameters (experts, out, in) PEFT
exchanged the two sides until 0.19.1: A runs over axis 1 in those versions, over axis 2 in later ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.files.json_values import JsonValue
from merging.checkpoints.tensor_names import layer_of

if TYPE_CHECKING:
    from torch import Tensor

EXCHANGED_UNTIL = (0, 19, 1)
"""First version of PEFT whose A runs over the inputs of (experts, out, in)."""


@dataclass(frozen=True)
class FusedParameter:
    """A fused parameter of the model and its stored tensors.

    Attributes:
        name: Path of the parameter in the model.
        shape: (experts, s1, s2).
        stored: {stored name: (expert or None for all, first row, last row of s1)}.
    """

    name: str
    shape: tuple[int, int, int]
    stored: Mapping[str, tuple[int | None, int, int]]


def fused_parameter(
    name: str, stored: Mapping[str, tuple[int, ...]], config: Mapping[str, JsonValue]
) -> FusedParameter | None:
    """Return the stored tensors of a fused parameter; None where the base does not have it.

    A base that stores each expert separately is matched by transformers' conversion mapping, where that only stacks
    experts and concatenates gate and up.

    Args:
        name: Path of the parameter in the model.
        stored: {stored name: shape} of the base.
        config: Content of the base's config.json.
    """
    stacked = next((n for n in stored if n == name or n.endswith(f".{name}") or name.endswith(f".{n}")), None)
    if stacked is not None:
        shape = stored[stacked]
        return (
            FusedParameter(name, (shape[0], shape[1], shape[2]), {stacked: (None, 0, shape[1])})
            if len(shape) == 3
            else None
        )
    layer = layer_of(name)
    if layer is None:
        return None
    for sources in _sources(name, config):
        parts = [_experts(source, layer[1], stored) for source in sources]
        counts = {len(part) for part in parts}
        shapes = [{stored[key] for key in part.values()} for part in parts]
        if counts <= {0} or len(counts) != 1 or any(len(one) != 1 for one in shapes):
            continue
        sizes = [next(iter(one)) for one in shapes]
        if any(len(size) != 2 or size[1] != sizes[0][1] for size in sizes):
            continue
        places: dict[str, tuple[int | None, int, int]] = {}
        first = 0
        for part, size in zip(parts, sizes, strict=True):
            places |= {key: (expert, first, first + size[0]) for expert, key in part.items()}
            first += size[0]
        return FusedParameter(name, (counts.pop(), first, sizes[0][1]), places)
    return None


def runs_over_axis_1(
    parameter: FusedParameter, a: Sequence[int], b: Sequence[int], version: str | None, is_in_out: bool | None
) -> bool | None:
    """Return True where A runs over axis 1 of the parameter (and B over axis 2); None where the shapes do not fit.

    For square parameters `version` and `is_in_out` decide.

    Args:
        parameter: The fused parameter.
        a: Shape of the factor A.
        b: Shape of the factor B.
        version: PEFT version of the adapter's config.
        is_in_out: True for a parameter stored (experts, in, out); None where that is unknown.
    """
    experts, s1, s2 = parameter.shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0] or a[0] % experts:
        return None
    orientations = [
        orientation for orientation, sides in ((True, (s1, s2)), (False, (s2, s1))) if (a[1], b[0]) == sides
    ]
    if len(orientations) < 2:
        return orientations[0] if orientations else None
    if is_in_out is None:
        return None
    return is_in_out or _number(version) < EXCHANGED_UNTIL


def expert_factors(a: Tensor, b: Tensor, experts: int, over_axis_1: bool) -> tuple[Tensor, Tensor]:
    """Return the factors of each expert: delta[e] = left_factor[e] @ right_factor[e].

    Args:
        a: (experts * r, s), as PEFT stores it.
        b: (s', r * experts), as PEFT stores it.
        experts: Number of experts.
        over_axis_1: A runs over axis 1 of the parameter.

    Returns:
        left_factor (experts, s1, r), right_factor (experts, r, s2).
    """
    by_expert = a.reshape(experts, -1, a.shape[1])  # (experts, r, s)
    outputs = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)  # (experts, s', r)
    if over_axis_1:
        return by_expert.transpose(1, 2), outputs.transpose(1, 2)
    return outputs, by_expert


def _sources(name: str, config: Mapping[str, JsonValue]) -> list[list[str]]:
    """Return the lists of stored patterns that transformers stacks into a parameter of this name."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return []
    text = config.get("text_config")
    kinds = [part.get("model_type") for part in (config, text) if isinstance(part, Mapping)]
    sources = []
    for kind in kinds:
        for entry in (get_checkpoint_conversion_mapping(kind) or []) if isinstance(kind, str) else []:
            if not isinstance(entry, WeightConverter) or not name.endswith(entry.target_patterns[0].lstrip(".")):
                continue
            operations = [(type(o).__name__, getattr(o, "dim", None)) for o in entry.operations]
            if operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
                sources.append(list(entry.source_patterns))
    return sources


def _experts(pattern: str, layer: int, stored: Mapping[str, tuple[int, ...]]) -> dict[int, str]:
    """Return {expert: stored name} of a layer for a pattern such as `.experts.*.w1.weight`."""
    end = re.compile(re.escape(pattern.lstrip(".").lstrip("^")).replace(r"\*", r"(\d+)") + "$")
    names = {}
    for name in stored:
        place = layer_of(name)
        if place and place[1] == layer and (match := end.search(name)):
            names[int(match[1])] = name
    return dict(sorted(names.items())) if sorted(names) == list(range(len(names))) else {}


def _number(version: str | None) -> tuple[int, ...]:
    """Return a version as numbers; (0,), older than any, where it is absent."""
    return tuple(int(n) for n in re.findall(r"\d+", version or "0")[:3])
