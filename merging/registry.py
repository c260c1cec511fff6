"""Which merge methods exist, and their parameters: read from configs/methods/*.yaml, without torch.

A method's YAML is its schema: name, paper, parameters with default, bounds and source. Its function lives in
`merging/methods/`; the keyword-only arguments of the function are the YAML's parameters (a test holds them equal),
so that a default is written once, next to where it comes from, and `--help` answers without importing torch.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from console.errors import UsageError, nearest

if TYPE_CHECKING:
    from merging.tensors import Prepare

METHODS_FOLDER = Path(__file__).resolve().parent.parent / "configs" / "methods"
TYPES = {"float": float, "int": int, "bool": bool, "str": str}


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
    maximum: float = math.inf
    choices: tuple[str, ...] = ()

    def parse(self, value: Any) -> Any:
        """Return `value` (from a flag or YAML) as this parameter's type. Raises UsageError that names it."""
        if self.type == "bool":
            return self._parse_bool(value)
        try:
            parsed = TYPES[self.type](value)
        except (TypeError, ValueError):
            raise UsageError(f"{self.name} must be a {self.type}, found {value!r}.") from None
        if self.choices and parsed not in self.choices:
            raise UsageError(f"{self.name} must be one of {', '.join(self.choices)}, found {value!r}.")
        if self.type == "float" and not math.isfinite(parsed):
            raise UsageError(f"{self.name} must be a finite number, found {value}.")
        if self.type in ("float", "int") and not self.minimum <= parsed <= self.maximum:
            raise UsageError(f"{self.name} must be in [{self.minimum:g}, {self.maximum:g}], found {value}.")
        return parsed

    def _parse_bool(self, value: Any) -> bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if isinstance(value, bool):
            return value
        if str(value).lower() in words:
            return words[str(value).lower()]
        raise UsageError(f"{self.name} must be true or false, found {value!r}.")

    def for_models(self, value: Any, n_models: int) -> Any:
        """Parse a value that may be one per model; returns a list of n_models for a per-model parameter."""
        if not self.per_model:
            if isinstance(value, (list, tuple)):
                raise UsageError(f"{self.name} takes one value for all models, found {len(value)} values.")
            return self.parse(value)
        values = value.split(",") if isinstance(value, str) else value
        values = list(values) if isinstance(values, (list, tuple)) else [values]
        if len(values) == 1:
            values = values * n_models
        if len(values) != n_models:
            raise UsageError(f"{self.name} takes 1 value or one per model ({n_models}), found {len(values)}.")
        return [self.parse(v) for v in values]


@dataclass(frozen=True)
class Implementation:
    """The functions of a method: `merge` on a block, `prepare` on the whole tensor, `reference` in bf16."""

    merge: Callable[..., Any]
    prepare: Prepare | None
    reference: Callable[..., Any] | None


@dataclass(frozen=True)
class MergeMethod:
    """A method as the user sees it.

    `base` is "required", "optional" (the method works on task vectors where it is given), or "donor" (gives only
    tokenizer and config). `has_reference`: the original program had it, so --numerics reference can repeat it.
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

    def implementation(self) -> Implementation:
        """Import and return the method's functions (this is where torch is loaded)."""
        module = importlib.import_module(f"merging.methods.{self.name}")
        return module.METHOD


def merge_method(
    *, reference: Callable[..., Any] | None = None, prepare: Prepare | None = None
) -> Callable[[Callable[..., Any]], Implementation]:
    """Bind a block function to its whole-tensor preparation and to the original's arithmetic, where it has them."""
    return lambda merge: Implementation(merge, prepare, reference)


def accepted(function: Callable[..., Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of `known` that `function` takes by keyword (some parameters only `prepare` needs)."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in known.items() if name in names}


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
    raise UsageError(f"Unknown merge method {name!r}.{nearest(name, by_alias)} Known: {', '.join(methods)}.")


def _read_method(path: Path) -> MergeMethod:
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    parameters = {
        name: Parameter(
            name=name,
            type=spec["type"],
            default=spec["default"],
            help=spec["help"],
            source=spec["source"],
            per_model=spec.get("per_model", False),
            minimum=spec.get("min", -math.inf),
            maximum=spec.get("max", math.inf),
            choices=tuple(spec.get("choices", ())),
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
    )
