"""The values in mergekit's YAML: names of models, and parameters as numbers, lists over the layers, or filters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from console.errors import UsageError, nearest
from merging.registry import MergeMethod, Parameter
from merging.settings import Rule

Scope = Mapping[str, tuple[Rule, ...]]
"""The parameters that are set in one place, by our names; one that changes nothing has no rules."""


def check_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Refuse a key that is not known, naming where it stands and the nearest known one. Raises UsageError."""
    for key in given:
        if key not in known:
            raise UsageError(f"{inside(where, key)} is no key of a recipe.{nearest(str(key), known)}")


def inside(where: str, key: object) -> str:
    """Return how messages call a key: "models[1].parameters.density"."""
    return f"{where}.{key}" if where else str(key)


def as_mapping(value: Any, where: str) -> Mapping[str, Any]:
    """Return a mapping, empty for nothing. Raises UsageError for anything else."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} should hold keys and values, found {value!r}.")
    return value


def as_list(value: Any, where: str) -> list[Any]:
    """Return a list that is not empty. Raises UsageError for anything else."""
    if not isinstance(value, list) or not value:
        raise UsageError(f"{where} should be a list with at least one entry, found {value!r}.")
    return value


def model_name(value: Any, where: str) -> str:
    """Return a model as we write it, `base@revision+adapter`, from mergekit's string or mapping. Raises UsageError."""
    if isinstance(value, str) and value.strip():
        return value.strip()
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} should be the name of a model, found {value!r}.")
    check_keys(value, ("model", "lora", "override_architecture"), where)
    if value.get("override_architecture") is not None:
        raise UsageError(f"{where}.override_architecture is not supported: tensors are matched by their own names.")
    name = _path(value.get("model"), f"{where}.model")
    return name if value.get("lora") is None else f"{name}+{_path(value['lora'], f'{where}.lora')}"


def _path(value: Any, where: str) -> str:
    if isinstance(value, str) and value.strip():
        return value.strip()
    if not isinstance(value, Mapping) or not value.get("path"):
        raise UsageError(f"{where} should be a name, or a path and a revision, found {value!r}.")
    check_keys(value, ("path", "revision"), where)
    return str(value["path"]) + (f"@{value['revision']}" if value.get("revision") is not None else "")


def layer_range(value: Any, where: str) -> tuple[int, int]:
    """Return [from, to) of a slice. Raises UsageError for what is no range of layers."""
    if not isinstance(value, list) or len(value) != 2 or not all(type(end) is int for end in value):
        raise UsageError(f"{where} should be two whole numbers, [from, to), found {value!r}.")
    if not 0 <= value[0] < value[1]:
        raise UsageError(f"{where} should be [from, to) with 0 <= from < to, found {value}.")
    return value[0], value[1]


def written_name(parameter: Parameter) -> str:
    """Return the key of a parameter in mergekit's YAML: mergekit's, or ours where it has no such parameter."""
    return parameter.mergekit.name or parameter.name


def read_scope(method: MergeMethod, value: Any, where: str, of_model: bool = False) -> Scope:
    """Read a `parameters` key; of_model: it belongs to one model. Raises UsageError for what cannot be right there."""
    known = {written_name(parameter): parameter for parameter in method.parameters.values()}
    idle = method.mergekit.idle if method.mergekit else ()
    only = method.mergekit.only if method.mergekit else {}
    scope: dict[str, tuple[Rule, ...]] = {}
    for key, setting in as_mapping(value, where).items():
        at = inside(where, key)
        if key in idle:
            scope[key] = ()
        elif key in only:
            if plain(setting) != plain(only[key]):
                raise UsageError(f"{at}: {method.name} has only {key}: {plain(only[key])}, found {plain(setting)}.")
        elif key not in known:
            ours = method.parameters.get(key)
            hint = f" mergekit calls it {written_name(ours)!r}." if ours else nearest(str(key), [*known, *idle, *only])
            raise UsageError(f"{at}: {method.name} has no parameter {key!r}.{hint}")
        else:
            parameter = known[key]
            if of_model and not (parameter.per_model or parameter.mergekit.per_model):
                raise UsageError(
                    f"{at}: {key} is one value for all models; write it under the recipe's or a slice's `parameters`."
                )
            scope[parameter.name] = tuple(_rules(parameter, setting, at))
    return scope


def _rules(parameter: Parameter, value: Any, where: str) -> Iterable[Rule]:
    """The rules of one setting: a value, a list over the layers, a {filter, value}, or a list of those."""
    if isinstance(value, Mapping):
        yield _conditional(parameter, value, where)
    elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        for i, entry in enumerate(value):
            if not isinstance(entry, Mapping):
                raise UsageError(f"{where}[{i}] should be `filter` and `value`, as its neighbours, found {entry!r}.")
            yield _conditional(parameter, entry, f"{where}[{i}]")
    else:
        yield None, _values(parameter, value, where)


def _conditional(parameter: Parameter, entry: Mapping[str, Any], where: str) -> Rule:
    check_keys(entry, ("filter", "value"), where)
    part = entry.get("filter")
    if part is not None and not isinstance(part, str):
        raise UsageError(f"{where}.filter should be a part of tensors' names, found {part!r}.")
    return (None if part in (None, "", "*") else part), _values(parameter, entry.get("value"), f"{where}.value")


def _values(parameter: Parameter, value: Any, where: str) -> tuple[Any, ...]:
    values = as_list(value, where) if isinstance(value, list) else [value]
    if parameter.type == "int" and len(values) > 1:
        raise UsageError(f"{where} is a whole number, which cannot change gradually over the layers; give one value.")
    named = replace(parameter, name=where)
    return tuple(named.parse(parameter.mergekit.values.get(str(one).lower(), one)) for one in values)


def plain(value: Any) -> str:
    """Return a value as YAML writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
