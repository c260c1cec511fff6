"""Merge methods and their parameters: the YAML files configs/methods/NAME.yaml, read without torch.

A method's YAML is its schema: name, paper, parameters with default, bounds and source. Its functions are in
merging/methods/NAME.py and take the parameters by name (`merging.methods.contract` checks that), so that a default is
written once, next to its source, and `--help` needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from common.errors import UsageError, nearest
from common.files.json_values import JsonValue
from common.terminal_text import quoted
from merging.recipe.schedules import ParameterSetting, ParameterValue

METHODS_FOLDER = Path(__file__).resolve().parents[2] / "configs" / "methods"
TYPES = {"float": float, "int": int, "bool": bool, "str": str}
TRUE = ("true", "t", "yes", "y", "on", "1", "1.0")
FALSE = ("false", "f", "no", "n", "off", "0", "0.0")
MERGEKIT_NAMES = {"weights": "weight", "scaling": "lambda"}
"""Parameters with another name in mergekit: an entry of `weights` is a model's `weight`."""


def as_bool(value: object) -> bool | None:
    """Return the truth value that a flag or YAML means, as mergekit (pydantic) reads it; None where it means none."""
    if isinstance(value, int | float):  # bool is an int
        return bool(value) if value in (0, 1) else None
    word = str(value).strip().lower()
    return True if word in TRUE else False if word in FALSE else None


FLOAT32_MAX = 3.4028234e38
"""The largest number in which methods compute."""


@dataclass(frozen=True)
class InMergekit:
    """A parameter as mergekit 0.1.5 has it.

    name: there; None: it has none, and always does what the value `always` does here. default: mergekit's, where it
    differs from ours. values: mergekit's words for our choices. per_model: an entry of a model there, where here it
    belongs to the method.
    """

    name: str | None = None
    default: ParameterValue | None = None
    values: Mapping[str, str] = field(default_factory=dict)
    always: ParameterValue | None = None
    per_model: bool = False


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method: its type, default and where the default comes from."""

    name: str
    type: str
    default: Any
    help: str
    source: str
    per_model: bool = False
    minimum: float = -math.inf
    exclusive: bool = False
    maximum: float = math.inf
    choices: tuple[str, ...] = ()
    mergekit: InMergekit = field(default_factory=InMergekit)

    def parse(self, value: object) -> ParameterValue:
        """Return `value` (from a flag or YAML) as this parameter's type. Raises UsageError that names it."""
        if self.type == "bool":
            return self._parse_bool(value)
        try:
            parsed = _typed(self.type, value)
        except (TypeError, ValueError, OverflowError):
            article = "an" if self.type == "int" else "a"
            raise UsageError(f"{self.name} must be {article} {self.type}, found {quoted(value)}.") from None
        if self.choices and parsed not in self.choices:
            raise UsageError(f"{self.name} must be one of {', '.join(self.choices)}, found {quoted(value)}.")
        if isinstance(parsed, str):
            return parsed
        if self.type == "float" and not abs(parsed) <= FLOAT32_MAX:
            raise UsageError(f"{self.name} must be a finite number of float32, found {quoted(value)}.")
        if self.type == "int" and abs(parsed) >= 2**63:
            raise UsageError(f"{self.name} must be a whole number of 64 bits, found {quoted(value)}.")
        if not self._in_range(parsed):
            opening = "(" if self.exclusive else "["
            raise UsageError(f"{self.name} must be in {opening}{self.minimum:g}, {self.maximum:g}], found {value}.")
        return parsed

    def _in_range(self, value: float) -> bool:
        return self.minimum <= value <= self.maximum and not (self.exclusive and value == self.minimum)

    def _parse_bool(self, value: object) -> bool:
        truth = as_bool(value)
        if truth is None:
            raise UsageError(f"{self.name} must be true or false, found {quoted(value)}.")
        return truth

    def for_models(self, value: object, n_models: int) -> ParameterSetting:
        """Parse a value that may be one per model; returns a list of n_models for a per-model parameter."""
        if not self.per_model:
            if isinstance(value, (list, tuple)):
                raise UsageError(f"{self.name} takes one value for all models, found {len(value)} values.")
            return self.parse(value)
        parts = value.split(",") if isinstance(value, str) else value
        values: list[object] = list(parts) if isinstance(parts, (list, tuple)) else [parts]
        if len(values) == 1:
            values = values * n_models
        if len(values) != n_models:
            raise UsageError(f"{self.name} takes 1 value or one per model ({n_models}), found {len(values)}.")
        return [self.parse(v) for v in values]


def _typed(kind: str, value: object) -> ParameterValue:
    """A value in the type of its parameter. Raises TypeError or ValueError for a value of another type."""
    if isinstance(value, bool) and kind != "bool":
        raise TypeError
    if kind == "int" and isinstance(value, float) and not value.is_integer():
        raise ValueError
    if kind == "str" and not isinstance(value, str):
        raise TypeError
    typed: ParameterValue = TYPES[kind](value)
    return typed


@dataclass(frozen=True)
class MergeMethod:
    """A method as the user sees it.

    `base` is "required", "optional" (the method works on task vectors where it is given), or "template" (gives only
    tokenizer and config). `has_reference`: the original program had it, so --numerics reference can repeat it.
    `in_mergekit`: mergekit 0.1.5 has it, too; there its base is one of the models (`mergekit_counts_base`), it draws
    from other random numbers (`mergekit_is_random`), and some parameters have no effect (`mergekit_idle`).
    `whole_matrix`: the most memory of a method that does not work by block, in fp32 copies of a matrix (out, in) and
    in matrices (in, in).
    """

    name: str
    title: str
    paper: str
    summary: str
    base: str
    min_models: int
    max_models: float
    has_reference: bool
    aliases: tuple[str, ...]
    parameters: Mapping[str, Parameter]
    in_mergekit: bool = False
    mergekit_counts_base: bool = False
    mergekit_is_random: bool = False
    mergekit_idle: tuple[str, ...] = ()
    whole_matrix: tuple[int, int] = (0, 0)


@cache
def all_methods() -> Mapping[str, MergeMethod]:
    """Return every method by name, from the YAML files in name order."""
    return {method.name: method for method in map(_read_method, sorted(METHODS_FOLDER.glob("*.yaml")))}


def find_method(name: str) -> MergeMethod:
    """Return the method of that name or alias. Raises UsageError that suggests the nearest name."""
    methods = all_methods()
    by_alias = {alias: method for method in methods.values() for alias in (method.name, *method.aliases)}
    if name in by_alias:
        return by_alias[name]
    raise UsageError(f"Unknown merge method {quoted(name)}.{nearest(name, by_alias)} Known: {', '.join(methods)}.")


def _read_method(path: Path) -> MergeMethod:
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    mergekit = data.get("mergekit", False)
    details = mergekit if isinstance(mergekit, Mapping) else {}
    parameters = {
        name: Parameter(
            name=name,
            type=spec["type"],
            default=spec["default"],
            help=spec["help"],
            source=spec["source"],
            per_model=spec.get("per_model", False),
            minimum=spec.get("above", spec.get("min", -math.inf)),
            exclusive="above" in spec,
            maximum=spec.get("max", math.inf),
            choices=tuple(spec.get("choices", ())),
            mergekit=_in_mergekit(name, spec.get("mergekit", {})),
        )
        for name, spec in data["parameters"].items()
    }
    return MergeMethod(
        name=data["name"],
        title=data["title"],
        paper=data["paper"],
        summary=data["summary"],
        base=data["base"],
        min_models=data.get("min_models", 1),
        max_models=data.get("max_models", math.inf),
        has_reference=data.get("reference", True),
        aliases=tuple(data.get("aliases", ())),
        parameters=parameters,
        in_mergekit=bool(mergekit),
        mergekit_counts_base=details.get("base_counts", False),
        mergekit_is_random=details.get("random", False),
        mergekit_idle=tuple(details.get("idle", ())),
        whole_matrix=tuple(data.get("whole_matrix", (0, 0))),
    )


def _in_mergekit(name: str, facts: Mapping[str, JsonValue]) -> InMergekit:
    return InMergekit(
        name=None if "always" in facts else MERGEKIT_NAMES.get(name, name),
        default=facts.get("default"),
        values={str(word).lower(): choice for word, choice in facts.get("values", {}).items()},
        always=facts.get("always"),
        per_model=facts.get("per_model", False),
    )
