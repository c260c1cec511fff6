"""A parameter's value as a function of a tensor's name and depth, and the run of layers where it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import UsageError

DTYPES = ("bfloat16", "float16", "float32")
"""What the floating-point tensors of a result may be."""
SETTINGS = (
    "method", "base_model", "models_to_merge", "dtype", "numerics", "seed", "tokenizer", "pad_to_multiple_of",
    "chat_template", "exclude", "exclude_from", "allow_config_mismatch", "extra_tensors",
)  # fmt: skip
"""Keys of a recipe besides the method's own parameters; each is a flag of the same name."""
Rule = tuple[str | None, tuple[Any, ...]]
"""A filter (None: every tensor) and the value there: one, or several to go through over the layers."""


@dataclass(frozen=True)
class ParameterSchedule:
    """A parameter's value: rules tried in order, the first whose filter is part of the tensor's name holds.

    Two settings that `of` makes are equal only where they are written alike: it drops what no tensor can reach.
    """

    rules: tuple[Rule, ...]

    @classmethod
    def fixed(cls, value: Any) -> ParameterSchedule:
        """Return the setting that has one value everywhere."""
        return cls(((None, (value,)),))

    @classmethod
    def of(cls, rules: Iterable[Rule]) -> ParameterSchedule:
        """Return the setting of these rules, without those that come too late or change nothing."""
        kept: list[Rule] = []
        for rule in rules:
            if not any(earlier is not None and rule[0] is not None and earlier in rule[0] for earlier, _ in kept):
                kept.append(rule)
            if rule[0] is None:
                break
        while len(kept) > 1 and kept[-1][0] is None and kept[-2][1] == kept[-1][1]:
            kept.pop(-2)
        return cls(tuple(kept))

    def at(self, name: str, depth: float) -> Any:
        """Return the value for the tensor `name` at `depth` in [0, 1]; None where no rule matches.

        Numbers interpolate linearly between the values listed, true/false and words are selected (mergekit 0.1.5,
        `evaluate_setting`, in the same arithmetic).
        """
        for part, values in self.rules:
            if part is None or part in name:
                return _along(values, depth)
        return None

    @property
    def constant(self) -> Any | None:
        """The value where it is the same for every tensor, else None."""
        if len(self.rules) != 1:
            return None
        ((part, values),) = self.rules
        return values[0] if part is None and len(values) == 1 else None

    @property
    def values(self) -> tuple[Any, ...]:
        """Every value that is written in it; what it takes lies between them."""
        return tuple(value for _, values in self.rules for value in values)

    @property
    def is_complete(self) -> bool:
        """Whether every tensor has a value."""
        return bool(self.rules) and self.rules[-1][0] is None

    def __str__(self) -> str:
        parts = []
        for part, values in self.rules:
            text = " to ".join(map(str, values)) + (" over the layers" if len(values) > 1 else "")
            parts.append(text if part is None else f"{part}: {text}")
        return "; ".join(parts)


def _along(values: tuple[Any, ...], depth: float) -> Any:
    position = depth * (len(values) - 1)
    index = int(position)
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return values[index]
    if len(values) == 1:
        return values[0]
    after = min(len(values) - 1, index + 1)
    share = position - index
    return (1 - share) * values[index] + share * values[after]


@dataclass(frozen=True)
class OutputSlice:
    """A run of output layers: which layers of which models they come from, and the parameters there.

    models: positions in the recipe's models. parameters: a tuple in the order of `models` for a per-model parameter.
    layers: the range [from, to) of each of those models, None for all of them; base_layers: likewise of the base (None
    beside `layers`: the base takes no part). module: a part of a model of several parts, None for the whole of it.
    """

    models: tuple[int, ...]
    parameters: Mapping[str, ParameterSchedule | tuple[ParameterSchedule, ...]]
    layers: tuple[tuple[int, int], ...] | None = None
    base_layers: tuple[int, int] | None = None
    module: str | None = None

    @property
    def depth(self) -> int:
        """Number of layers of the result that it makes, where it names layers."""
        first, stop = self.layers[0] if self.layers else self.base_layers or (0, 0)
        return stop - first

    def at(self, name: str, depth: float, inputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Return every parameter's value for one tensor, a list for a per-model one.

        name: of the output tensor. inputs: its name in each of the models, where layers are taken from other places;
        as in mergekit, the filters of a model's parameters look there. Raises UsageError for a parameter without a
        value for this tensor.
        """
        if not self.models:  # the base is copied
            return {}
        names = inputs or [name] * len(self.models)
        alone = len(self.models) == 1 and self.base_layers is None  # then every parameter is that model's
        values: dict[str, Any] = {}
        for key, schedule in self.parameters.items():
            if isinstance(schedule, ParameterSchedule):
                values[key] = _found(key, name, schedule.at(names[0] if alone else name, depth))
            else:
                values[key] = [_found(key, n, s.at(n, depth)) for n, s in zip(names, schedule, strict=True)]
        return values

    def schedules(self, name: str) -> tuple[ParameterSchedule, ...]:
        """Return the schedules of one parameter: one, or one per model."""
        schedule = self.parameters[name]
        return (schedule,) if isinstance(schedule, ParameterSchedule) else schedule


def _found(key: str, name: str, value: Any) -> Any:
    if value is None:
        raise UsageError(
            f"{key} has no value for tensor {name}: none of its filters is part of that name; "
            "end its list with an entry that has no filter."
        )
    return value
