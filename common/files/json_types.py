"""Types of the values in foreign JSON, declared once and checked when the file is read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common.files.bounded_reading import UnreadableError
from common.files.json_values import JsonValue
from common.terminal_text import quoted

WORDS: dict[object, str] = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "an object", list: "a list",
}  # fmt: skip


@dataclass(frozen=True)
class Maybe:
    """null, or a value of a shape."""

    shape: object


@dataclass(frozen=True)
class ListOf:
    """A list of values of one shape; length: how many, where that is fixed."""

    shape: object
    length: int | None = None


@dataclass(frozen=True)
class Each:
    """An object with any keys and values of one shape."""

    shape: object


@dataclass(frozen=True)
class OneOf:
    """One of some values, or a value of one of some types."""

    choices: tuple[object, ...]


@dataclass(frozen=True)
class Between:
    """A whole number from `least` to `most`; numbers: floating-point ones, too."""

    least: float
    most: float = math.inf
    numbers: bool = False


@dataclass(frozen=True)
class Matching:
    """Text that matches a regular expression of ours; words: what is expected, for messages."""

    pattern: str
    words: str


@dataclass(frozen=True)
class Fields:
    """An object with these keys; optional ones may be absent, others are allowed with any value."""

    required: Mapping[str, object]
    optional: Mapping[str, object] = field(default_factory=dict)


def check_shape(value: JsonValue, shape: object, source: str, where: str = "") -> None:
    """Raise UnreadableError where a value is not of its shape, naming file, key, expected and found.

    Args:
        value: what was parsed.
        shape: a type (bool is no int), Any, or one of the classes of this module.
        source: the file, for messages.
        where: the key that the value is at.
    """
    if shape is Any:
        return
    if isinstance(shape, Maybe):
        if value is not None:
            check_shape(value, shape.shape, source, where)
    elif isinstance(shape, Fields):
        _expect(isinstance(value, dict), "an object", value, source, where)
        for key, inner in shape.required.items():
            if key not in value:
                raise UnreadableError(f"{source} has no {_inside(where, key)}.")
            check_shape(value[key], inner, source, _inside(where, key))
        for key, inner in shape.optional.items():
            if key in value:
                check_shape(value[key], inner, source, _inside(where, key))
    elif isinstance(shape, Each):
        _expect(isinstance(value, dict), "an object", value, source, where)
        for key, inner in value.items():
            check_shape(inner, shape.shape, source, _inside(where, key))
    elif isinstance(shape, ListOf):
        of = "a list" if shape.length is None else f"a list of {shape.length}"
        _expect(isinstance(value, list) and shape.length in (None, len(value)), of, value, source, where)
        for i, inner in enumerate(value):
            check_shape(inner, shape.shape, source, f"{where}[{i}]")
    elif isinstance(shape, OneOf):
        fits = any(
            _is(value, c) if isinstance(c, type) else type(c) is type(value) and c == value for c in shape.choices
        )
        names = " or ".join(WORDS.get(c, repr(c)) if isinstance(c, type) else repr(c) for c in shape.choices)
        _expect(fits, names, value, source, where)
    elif isinstance(shape, Matching):
        fits = isinstance(value, str) and re.fullmatch(shape.pattern, value) is not None
        _expect(fits, shape.words, value, source, where)
    elif isinstance(shape, Between):
        fits = (_is(value, int) or (shape.numbers and _is(value, float))) and shape.least <= value <= shape.most
        most = "" if shape.most == math.inf else f" to {_plain(shape.most)}"
        _expect(
            fits,
            f"{'a number' if shape.numbers else 'a whole number'} from {_plain(shape.least)}{most}",
            value,
            source,
            where,
        )
    else:
        assert isinstance(shape, type), shape
        _expect(_is(value, shape), WORDS[shape], value, source, where)


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"


def _is(value: object, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _inside(where: str, key: str) -> str:
    name = key if key.isidentifier() and len(key) <= 60 else quoted(key, 80)
    return f"{where}.{name}" if where else name


def _expect(fits: bool, expected: str, value: object, source: str, where: str) -> None:
    if not fits:
        raise UnreadableError(f"{source}: {where or 'its content'} should be {expected}, found {quoted(value)}.")
