"""Shapes of JSON and YAML documents, declared once and checked when a file is read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import nearest
from common.files.bounded_reading import UnreadableError
from common.files.json_values import JsonValue
from common.terminal_text import quoted

WORDS: dict[object, str] = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object", list: "a list",
    Path: "a path",
}  # fmt: skip


@dataclass(frozen=True)
class Maybe:
    """null, or a value of a shape."""

    shape: object


@dataclass(frozen=True)
class ListOf:
    """A list of values of one shape; length: how many, where that is fixed; least: the least number."""

    shape: object
    length: int | None = None
    least: int = 0


@dataclass(frozen=True)
class Each:
    """An object with any keys and values of one shape; least: the least number of them."""

    shape: object
    least: int = 0


@dataclass(frozen=True)
class OneOf:
    """One of some values, or a value of one of some shapes."""

    choices: tuple[object, ...]


@dataclass(frozen=True)
class Between:
    """A whole number from `least` to `most`; numbers: floating-point ones, too; above: `least` itself is excluded."""

    least: float
    most: float = math.inf
    numbers: bool = False
    above: bool = False


@dataclass(frozen=True)
class Matching:
    """Text that matches a regular expression of ours; words: what is expected, for messages."""

    pattern: str
    words: str


@dataclass(frozen=True)
class Fields:
    """An object with these keys; optional ones may be absent; others: other keys are allowed, with any value."""

    required: Mapping[str, object]
    optional: Mapping[str, object] = field(default_factory=dict)
    others: bool = True


def check_shape(value: JsonValue, shape: object, source: str, where: str = "") -> None:
    """Raise UnreadableError where a value is not of its shape, naming file, key, expected and found.

    Args:
        value: what was parsed.
        shape: a type (bool is no int), Any, or one of the classes of this module.
        source: the file, for messages; empty where the caller names it.
        where: the key that the value is at.
    """
    fits = True
    if isinstance(shape, Maybe):
        if value is not None:
            check_shape(value, shape.shape, source, where)
        return
    if isinstance(shape, Fields):
        fits = isinstance(value, Mapping)
    elif isinstance(shape, Each):
        fits = isinstance(value, Mapping) and len(value) >= shape.least
    elif isinstance(shape, ListOf):
        fits = isinstance(value, list | tuple) and shape.length in (None, len(value)) and len(value) >= shape.least
    elif isinstance(shape, OneOf):
        fits = any(_is_choice(value, choice) for choice in shape.choices)
    elif isinstance(shape, Matching):
        fits = isinstance(value, str) and re.fullmatch(shape.pattern, value) is not None
    elif isinstance(shape, Between):
        fits = _is_between(value, shape)
    elif shape is not Any:
        assert isinstance(shape, type), shape
        fits = _is(value, shape)
    if not fits:
        words = [choice for choice in shape.choices if isinstance(choice, str)] if isinstance(shape, OneOf) else []
        raise UnreadableError(
            f"{_prefix(source)}{where or 'its content'} must be {_expected(shape)}, found {quoted(value)}."
            f"{nearest(value, words) if isinstance(value, str) else ''}"
        )
    _check_entries(value, shape, source, where)


def _check_entries(value: JsonValue, shape: object, source: str, where: str) -> None:
    """Check what an object or a list holds."""
    if isinstance(shape, Fields):
        if not shape.others:
            check_keys(value, [*shape.required, *shape.optional], source, where)
        for key, inner in {**shape.required, **shape.optional}.items():
            if key in value:
                check_shape(value[key], inner, source, _inside(where, key))
            elif key in shape.required:
                raise UnreadableError(f"{_prefix(source)}{_inside(where, key)} is missing.")
    elif isinstance(shape, Each):
        for key, inner in value.items():
            check_shape(inner, shape.shape, source, _inside(where, str(key)))
    elif isinstance(shape, ListOf):
        for i, inner in enumerate(value):
            check_shape(inner, shape.shape, source, f"{where}[{i}]")


def check_keys(content: Iterable[object], valid: Iterable[str], source: str = "", where: str = "") -> None:
    """Raise UnreadableError for a key that is not valid, naming the nearest one that is."""
    names = list(valid)
    for key in content:
        if key not in names:
            path = quoted(_inside(where, str(key)))
            raise UnreadableError(f"{_prefix(source)}there is no key {path}.{nearest(str(key), names)}")


def _is_between(value: object, shape: Between) -> bool:
    if not (_is(value, int) or (shape.numbers and _is(value, float))):
        return False
    assert isinstance(value, int | float)
    return shape.least <= value <= shape.most and not (shape.above and value == shape.least)


def has_shape(value: object, shape: object) -> bool:
    """Return True for a value of a shape."""
    try:
        check_shape(value, shape, "")
    except UnreadableError:
        return False
    return True


def _is_choice(value: object, choice: object) -> bool:
    return has_shape(value, choice) if isinstance(choice, _SHAPES) else type(choice) is type(value) and choice == value


def _expected(shape: object) -> str:
    """Return a shape in words."""
    if isinstance(shape, Maybe):
        return f"{_expected(shape.shape)} or null"
    if isinstance(shape, ListOf | Each):
        kind = "a list" if isinstance(shape, ListOf) else "an object"
        length = shape.length if isinstance(shape, ListOf) else None
        number = f" of {length}" if length is not None else f" with at least {shape.least} entry" if shape.least else ""
        return kind + number
    if isinstance(shape, OneOf):
        if len(shape.choices) > 1 and all(isinstance(choice, str) for choice in shape.choices):
            return f"one of {', '.join(map(str, shape.choices))}"
        return " or ".join(_expected(c) if isinstance(c, _SHAPES) else _plain_word(c) for c in shape.choices)
    if isinstance(shape, Matching):
        return shape.words
    if isinstance(shape, Between):
        start, end = ("above", " and at most") if shape.above else ("from", " to")
        most = "" if shape.most == math.inf else f"{end} {_plain(shape.most)}"
        return f"a {'' if shape.numbers else 'whole '}number {start} {_plain(shape.least)}{most}"
    return "an object" if isinstance(shape, Fields) else WORDS[shape]


_SHAPES = (type, Maybe, ListOf, Each, OneOf, Between, Matching, Fields)


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"


def _plain_word(value: object) -> str:
    """Return a value in YAML's spelling."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is(value: object, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is Path:
        return isinstance(value, str | Path)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _prefix(source: str) -> str:
    return f"{source}: " if source else ""


def _inside(where: str, key: str) -> str:
    name = key if key.isidentifier() and len(key) <= 60 else quoted(key, 80)
    return f"{where}.{name}" if where else name
