"""Parameter schedules over tensor names and depths, and output slices, the layer ranges where they apply."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from common.errors import UsageError

DTYPES = ("bfloat16", "float16", "float32")
"""Dtypes of a result's floating-point tensors."""
RECIPE_KEYS = (
    "method", "base_model", "models_to_merge", "dtype", "numerics", "seed", "tokenizer", "pad_to_multiple_of",
    "chat_template", "exclude", "exclude_from", "allow_config_mismatch", "extra_tensors",
)  # fmt: skip
"""Keys of a recipe besides the method's parameters; each is a flag of the same name."""
ParameterValue: TypeAlias = bool | int | float | str
"""A value of a method's parameter, of one model where the parameter has one per model."""
ParameterSetting: TypeAlias = ParameterValue | list[ParameterValue]
"""A value of a parameter, or a list of them for a per-model parameter."""
Rule = tuple[str | None, tuple[ParameterValue, ...]]
"""A filter (a part of tensor names, None: every tensor), and one value or the anchors of a gradient over layers."""


@dataclass(frozen=True)
class ParameterSchedule:
    """A parameter's values: an ordered list of rules; the first whose filter is part of the tensor's name applies.

    Schedules made by `of` contain no unreachable rules, so that equality compares their effect.
    """

    rules: tuple[Rule, ...]

    @classmethod
    def fixed(cls, value: ParameterValue) -> ParameterSchedule:
        """Return the schedule with one value for all tensors."""
        return cls(((None, (value,)),))

    @classmethod
    def of(cls, rules: Iterable[Rule]) -> ParameterSchedule:
        """Return the schedule of rules, without unreachable and redundant ones."""
        reachable: list[Rule] = []
        for rule in rules:
            if not any(earlier is not None and rule[0] is not None and earlier in rule[0] for earlier, _ in reachable):
                reachable.append(rule)
            if rule[0] is None:
                break
        while len(reachable) > 1 and reachable[-1][0] is None and reachable[-2][1] == reachable[-1][1]:
            reachable.pop(-2)
        return cls(tuple(reachable))

    def at(self, name: str, depth: float) -> ParameterValue | None:
        """Return the value for a tensor; None where no rule matches.

        Numbers interpolate linearly between the anchors, booleans and words are selected, as in mergekit 0.1.5's
        `evaluate_setting`.

        Args:
            name: Name of the tensor.
            depth: Relative position of its layer, in [0, 1].
        """
        for part, values in self.rules:
            if part is None or part in name:
                return _interpolate(values, depth)
        return None

    @property
    def constant(self) -> ParameterValue | None:
        """The value where all tensors have the same, else None."""
        if len(self.rules) != 1:
            return None
        ((part, values),) = self.rules
        return values[0] if part is None and len(values) == 1 else None

    @property
    def values(self) -> tuple[ParameterValue, ...]:
        """All values and anchors of its rules."""
        return tuple(value for _, values in self.rules for value in values)

    @property
    def is_complete(self) -> bool:
        """True where every tensor has a value."""
        return bool(self.rules) and self.rules[-1][0] is None

    def __str__(self) -> str:
        parts = []
        for part, values in self.rules:
            text = " to ".join(map(str, values)) + (" over the layers" if len(values) > 1 else "")
            parts.append(text if part is None else f"{part}: {text}")
        return "; ".join(parts)


def _interpolate(values: tuple[ParameterValue, ...], depth: float) -> ParameterValue:
    position = depth * (len(values) - 1)
    index = int(position)
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        return values[index]
    if len(values) == 1:
        return values[0]
    after = min(len(values) - 1, index + 1)
    share = position - index
    return (1 - share) * numbers[index] + share * numbers[after]


@dataclass(frozen=True)
class OutputSlice:
    """A range of result layers with its source layers and parameters.

    Attributes:
        models: Positions of its models among the recipe's models.
        parameters: {parameter: schedule}; a tuple in the order of `models` for a per-model parameter.
        layers: Layer range [from, to) of each of its models; None for all layers.
        base_layers: Layer range of the base; None with `layers` where the base is not merged.
        module: Part of a multi-part model; None for the whole model.
    """

    models: tuple[int, ...]
    parameters: Mapping[str, ParameterSchedule | tuple[ParameterSchedule, ...]]
    layers: tuple[tuple[int, int], ...] | None = None
    base_layers: tuple[int, int] | None = None
    module: str | None = None

    @property
    def depth(self) -> int:
        """Number of result layers, 0 where it covers whole models."""
        first, stop = self.layers[0] if self.layers else self.base_layers or (0, 0)
        return stop - first

    def at(self, name: str, depth: float, inputs: Sequence[str] | None = None) -> dict[str, ParameterSetting]:
        """Return every parameter's value for one tensor, a list for a per-model parameter.

        Args:
            name: Name of the result tensor.
            depth: Relative position of its layer, in [0, 1].
            inputs: Its name in each model, where slices move layers; filters of per-model parameters match these, as
                in mergekit.

        Raises:
            UsageError: A parameter has no value for this tensor.
        """
        if not self.models:  # the base is copied
            return {}
        names = inputs or [name] * len(self.models)
        alone = (
            len(self.models) == 1 and self.base_layers is None
        )  # filters then match the model's names, as in mergekit
        values: dict[str, ParameterSetting] = {}
        for key, schedule in self.parameters.items():
            if isinstance(schedule, ParameterSchedule):
                values[key] = _require_value(key, name, schedule.at(names[0] if alone else name, depth))
            else:
                values[key] = [_require_value(key, n, s.at(n, depth)) for n, s in zip(names, schedule, strict=True)]
        return values

    def schedules(self, name: str) -> tuple[ParameterSchedule, ...]:
        """Return the schedules of one parameter: one, or one per model."""
        schedule = self.parameters[name]
        return (schedule,) if isinstance(schedule, ParameterSchedule) else schedule


def _require_value(key: str, name: str, value: ParameterValue | None) -> ParameterValue:
    if value is None:
        raise UsageError(
            f"{key} has no value for tensor {name}: none of its filters is part of that name; "
            "end its list with an entry that has no filter."
        )
    return value
