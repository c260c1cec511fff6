"""Values in mergekit's YAML: model names, and parameters as numbers, gradients over layers, or filters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from common.errors import UsageError
from common.files.json_values import JsonValue
from common.terminal_text import quoted
from merging.recipe.mergekit.keys import (
    inside,
    is_label,
    parameter_names,
    places_of_general,
    spelling_hint,
)
from merging.recipe.method_registry import MergeMethod, Parameter, as_bool
from merging.recipe.schedules import ParameterValue, Rule

Scope = Mapping[str, tuple[Rule, ...]]
"""Parameters of one level of the recipe, by this project's names."""


def as_mapping(value: object, where: str) -> Mapping[str, JsonValue]:
    """Return a mapping, empty for null. Raises UsageError for other values."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} should hold keys and values, found {quoted(value)}.")
    return value


def as_list(value: object, where: str) -> list[JsonValue]:
    """Return a non-empty list. Raises UsageError for other values."""
    if not isinstance(value, list) or not value:
        raise UsageError(f"{where} should be a list with at least one entry, found {quoted(value)}.")
    return value


def model_name(value: object, where: str) -> str:
    """Return a model as `base@revision+adapter`, from mergekit's string or mapping. Raises UsageError."""
    if isinstance(value, str) and value.strip():
        return value.strip()
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} should be the name of a model, found {quoted(value)}.")
    if value.get("override_architecture") is not None:
        raise UsageError(f"{where}.override_architecture is not supported: tensors are matched by their own names.")
    if "path" in value and "model" not in value:
        return _path(value, where)
    _only(value, ("model", "lora", "override_architecture"), where)
    name = _path(value.get("model"), f"{where}.model")
    return name if value.get("lora") is None else f"{name}+{_path(value['lora'], f'{where}.lora')}"


def _path(value: object, where: str) -> str:
    if isinstance(value, str) and value.strip():
        return value.strip()
    if not isinstance(value, Mapping) or not value.get("path"):
        raise UsageError(f"{where} should be a name, or a path and a revision, found {quoted(value)}.")
    _only(value, ("path", "revision"), where)
    return str(value["path"]) + (f"@{value['revision']}" if value.get("revision") is not None else "")


def _only(content: Mapping[str, JsonValue], valid: Sequence[str], where: str) -> None:
    """Raise UsageError for other keys, which would change the meaning of a model's name or a filter."""
    for key in content:
        if key not in valid:
            hint = spelling_hint(str(key), valid) or f" Keys there: {', '.join(valid)}."
            raise UsageError(f"{inside(where, key)} is no key of a recipe.{hint}")


def with_revision(name: str, revision: object, where: str, notes: list[str]) -> str:
    """Return `name@revision` for a `revision` key next to a model, which mergekit 0.1.5 ignores.

    Raises:
        UsageError: The name has another revision.
    """
    if revision is None:
        return name
    model, plus, adapter = name.partition("+")
    if Path(model).expanduser().is_dir():
        notes.append(f"{where} has no effect: {model} is a local folder.")
        return name
    path, _, present = model.partition("@")
    if present and present != str(revision):
        raise UsageError(f"{where} is {revision}, and the model's name has the revision {present}; leave one out.")
    notes.append(
        f"{where}: {path}@{revision} is merged; mergekit 0.1.5 ignores a revision beside the name and takes the "
        "default branch."
    )
    return f"{path}@{revision}{plus}{adapter}"


def layer_range(value: object, where: str) -> tuple[int, int]:
    """Return the layer range [from, to) of a slice. Raises UsageError for other values."""
    if not isinstance(value, list) or len(value) != 2 or not all(type(end) is int for end in value):
        raise UsageError(f"{where} should be two whole numbers, [from, to), found {quoted(value)}.")
    if not 0 <= value[0] < value[1]:
        raise UsageError(f"{where} should be [from, to) with 0 <= from < to, found {value}.")
    return value[0], value[1]


def written_name(parameter: Parameter) -> str:
    """Return the key of a parameter in mergekit's YAML: mergekit's name, or this project's where it has none."""
    return parameter.mergekit.name or parameter.name


def read_scope(method: MergeMethod, value: object, where: str, notes: list[str], of_model: bool = False) -> Scope:
    """Read a `parameters` key.

    Args:
        method: The recipe's method.
        value: Content of the key.
        where: Path of the key.
        notes: Receives a note for each parameter without effect.
        of_model: The key belongs to one model.

    Returns:
        The method's parameters that are set, by this project's names.

    Raises:
        UsageError: A value has the wrong type, a parameter is misspelled, or a key belongs to another level.
    """
    by_key = {written_name(parameter): parameter for parameter in method.parameters.values()}
    idle = method.mergekit_idle
    scope: dict[str, tuple[Rule, ...]] = {}
    for key, setting in as_mapping(value, where).items():
        at = inside(where, key)
        if key in idle:
            notes.append(f"{at} has no effect on {method.name}.")
        elif key in by_key:
            parameter = by_key[key]
            if of_model and not (parameter.per_model or parameter.mergekit.per_model):
                notes.append(
                    f"{at} has no effect: {key} is one value for all models, read from the recipe's or a slice's "
                    "`parameters`."
                )
            else:
                scope[parameter.name] = tuple(_rules(parameter, setting, at))
        elif key in method.parameters:
            mergekit_name = written_name(method.parameters[key])
            raise UsageError(
                f"{at}: {method.name} has no parameter {quoted(key)}; mergekit calls it {quoted(mergekit_name)}."
            )
        elif key in places_of_general():
            raise UsageError(f"{at}: mergekit does not read {key} there; write it {places_of_general()[key]}.")
        elif key in parameter_names():
            notes.append(f"{at} has no effect: {method.name} has no parameter {quoted(key)}.")
        elif not is_label(key) and (hint := spelling_hint(str(key), [*by_key, *idle])):
            raise UsageError(f"{at}: {method.name} has no parameter {quoted(key)}.{hint}")
        else:
            notes.append(f"{at} has no effect: {method.name} has no parameter {quoted(key)}, nor has any other method.")
    return scope


def _rules(parameter: Parameter, value: object, where: str) -> Iterable[Rule]:
    """Yield the rules of one setting: a value, a gradient over layers, a {filter, value}, or a list of those."""
    if isinstance(value, Mapping):
        yield _conditional(parameter, value, where)
    elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        for i, entry in enumerate(value):
            if not isinstance(entry, Mapping):
                raise UsageError(
                    f"{where}[{i}] should be `filter` and `value`, as its neighbours, found {quoted(entry)}."
                )
            yield _conditional(parameter, entry, f"{where}[{i}]")
    else:
        yield None, _values(parameter, value, where)


def _conditional(parameter: Parameter, entry: Mapping[str, JsonValue], where: str) -> Rule:
    _only(entry, ("filter", "value"), where)
    part = entry.get("filter")
    if part is not None and not isinstance(part, str):
        raise UsageError(f"{where}.filter should be a part of tensors' names, found {quoted(part)}.")
    return (None if part in (None, "", "*") else part), _values(parameter, entry.get("value"), f"{where}.value")


def _values(parameter: Parameter, value: object, where: str) -> tuple[ParameterValue, ...]:
    values = as_list(value, where) if isinstance(value, list) else [value]
    if parameter.type == "int" and len(values) > 1:
        raise UsageError(f"{where} is a whole number, which cannot change gradually over the layers; give one value.")
    named = replace(parameter, name=where)
    return tuple(named.parse(_from_mergekit_value(parameter, one)) for one in values)


def _from_mergekit_value(parameter: Parameter, value: object) -> object:
    """Return mergekit's value as this project's; booleans of mergekit become words where the parameter has words."""
    if not parameter.mergekit.values or value in parameter.choices:
        return value
    truth = as_bool(value)
    return parameter.mergekit.values.get(str(value).lower() if truth is None else plain(truth), value)


def plain(value: object) -> str:
    """Return a value in YAML's spelling."""
    return str(value).lower() if isinstance(value, bool) else str(value)
