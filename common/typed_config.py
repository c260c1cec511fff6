"""Configurations as dataclasses, whose annotations are the schema that mappings and values are checked by.

Annotations are bool, int, float, str, Path, Any, Literal, unions, tuples, lists, mappings with text keys, dataclasses,
and `Annotated[TYPE, SHAPE]` with a shape of `common.files.json_types`, which then replaces that of the type.
CONTRIBUTING.md compares this with pydantic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from common.errors import UsageError
from common.files.bounded_reading import UnreadableError
from common.files.json_types import Each, Fields, ListOf, Maybe, OneOf, check_keys, check_shape, has_shape
from common.files.json_values import JsonValue
from common.files.paths import user_path

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


def read_mapping(kind: type[Config], document: object, source: str = "", where: str = "") -> Config:
    """Return the dataclass of a mapping whose keys are its fields.

    Args:
        kind: A dataclass; fields without a default are required.
        document: The mapping. Lists become tuples where the annotation says so, texts paths.
        source: The file, for messages; empty where the caller names it.
        where: Key of the mapping in the file.

    Raises:
        UsageError: For a key that is no field, naming the nearest one, and for a value that the annotation excludes.
    """
    check_value(document, kind, source, where)
    config: Config = _build(kind, document)
    return config


def check_value(value: object, annotation: object, source: str = "", where: str = "") -> None:
    """Raise UsageError for a value that an annotation excludes, naming its key, what is expected and what was found."""
    try:
        check_shape(value, shape_of(annotation), source, where)
    except UnreadableError as error:
        raise UsageError(str(error)) from None


def check_fields(config: DataclassInstance, flags: Mapping[str, str] | None = None) -> None:
    """Raise UsageError for the first field of a dataclass whose value its annotation excludes.

    Fields that are dataclasses are left to their own checks.

    Args:
        config: The dataclass.
        flags: {field: its flag} of fields that are not called as their flags are.
    """
    for name, annotation in _annotations(type(config)).items():
        if not is_dataclass(annotation):
            check_value(getattr(config, name), annotation, where=f"--{(flags or {}).get(name, name)}")


def check_known(content: Mapping[str, object], valid: Mapping[str, object] | list[str], where: str = "") -> None:
    """Raise UsageError for a key that is not valid, naming the nearest one that is."""
    try:
        check_keys(content, valid, where=where)
    except UnreadableError as error:
        raise UsageError(str(error)) from None


@cache
def _annotations(kind: type[DataclassInstance]) -> dict[str, object]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def shape_of(annotation: object) -> object:
    """Return the shape, of `common.files.json_types`, of the values that an annotation allows."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return arguments[1]
    if origin is Literal:
        return OneOf(arguments)
    if origin in (Union, UnionType):
        shapes = [shape_of(argument) for argument in arguments if argument is not NoneType]
        shape = shapes[0] if len(shapes) == 1 else OneOf(tuple(shapes))
        return Maybe(shape) if NoneType in arguments else shape
    if origin in (tuple, list):
        return ListOf(shape_of(arguments[0]))
    if origin in (dict, Mapping):
        return Each(shape_of(arguments[1]))
    if isinstance(annotation, type) and is_dataclass(annotation):
        shapes_by_key = {name: shape_of(hint) for name, hint in _annotations(annotation).items()}
        required = {f.name for f in fields(annotation) if f.default is MISSING and f.default_factory is MISSING}
        return Fields(
            {key: shape for key, shape in shapes_by_key.items() if key in required},
            {key: shape for key, shape in shapes_by_key.items() if key not in required},
            others=False,
        )
    return annotation


def _build(annotation: object, value: JsonValue) -> JsonValue:
    """Return a checked value in the type of its annotation."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if value is None or annotation is Any:
        return value
    if origin is Annotated:
        return _build(arguments[0], value)
    if origin in (Union, UnionType):
        return _build(next(one for one in arguments if has_shape(value, shape_of(one))), value)
    if origin in (tuple, list):
        return origin(_build(arguments[0], entry) for entry in value)
    if origin in (dict, Mapping):
        return {str(key): _build(arguments[1], entry) for key, entry in value.items()}
    if isinstance(annotation, type) and is_dataclass(annotation):
        hints = _annotations(annotation)
        return annotation(**{key: _build(hints[key], entry) for key, entry in value.items()})
    if annotation is Path:
        return user_path(str(value))
    return float(value) if annotation is float else value
