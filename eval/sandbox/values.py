"""Values between the test process and the program: literals and standard containers as JSON, everything else by number.

Neither pickle nor code crosses. A number stands for an object that stays on the other side; what may be done with it
there is a fixed list of operations, and comparison with a value is not among them: an object that is no literal equals
no literal, whatever its class says. Instances of subclasses cross as their base type's value.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping
from typing import Any

NUMPY_KINDS = frozenset("biufc")
MUTABLE = (list, dict, set, bytearray)
PLAIN_TYPES: dict[str, Any] = {
    t.__name__: t for t in (int, float, bool, str, bytes, complex, list, tuple, dict, set, frozenset, object, type)
}
DECIMAL_BITS = 4000  # Python reads integers of at most 4300 decimal digits
MAX_DEPTH = 400


class CannotCrossError(TypeError):
    """A value that has no form on the other side."""


def builtin_error(kind: type[BaseException]) -> str:
    """Return the name of the nearest built-in exception class that `kind` is or extends."""
    return next(c.__name__ for c in kind.__mro__ if c.__module__ == "builtins")


def error_class(name: Any) -> type[BaseException]:
    """Return the built-in exception class of this name; Exception where there is none."""
    builtin = getattr(builtins, name, None) if isinstance(name, str) else None
    return builtin if isinstance(builtin, type) and issubclass(builtin, BaseException) else Exception


class Encoder:
    """Writes values of one message; an object that occurs twice is written once.

    Args:
        shared: numbers, by id, of mutable objects that the other side already has.
        export: returns the reference to an object that stays on this side.
    """

    def __init__(self, shared: Mapping[int, int], export: Callable[[Any], list[Any]]) -> None:
        self._shared = shared
        self._export = export
        self._written: dict[int, int] = {}
        self.mutable: list[Any] = []
        """Mutable objects in the order of their numbers in this message; also keeps them alive."""

    def __call__(self, value: Any, depth: int = 0) -> Any:
        """Return the JSON form of a value. Raises CannotCrossError."""
        kind = type(value)
        if value is None or kind is bool or kind is str or kind is float:
            return value
        if kind is int:
            return value if value.bit_length() < DECIMAL_BITS else ["i", hex(value)]
        if depth > MAX_DEPTH:
            raise CannotCrossError(f"a value nested more than {MAX_DEPTH} deep cannot leave the sandbox")
        if kind.__module__ == "numpy" and hasattr(value, "dtype"):
            return self._array(value)
        simple = self._simple(value, kind)
        return simple if simple is not None else self._container(value, kind, depth + 1)

    def content(self, value: Any) -> Any:
        """Return the JSON form of a mutable object's contents."""
        if isinstance(value, bytearray):
            return bytes(value).hex()
        if isinstance(value, dict):
            return [[self(k, 1), self(v, 1)] for k, v in dict.items(value)]
        return [self(item, 1) for item in list(value)]

    def _simple(self, value: Any, kind: type) -> Any:
        if isinstance(value, type):
            return ["t", value.__name__] if value in PLAIN_TYPES.values() else self._export(value)
        if isinstance(value, int):
            return self(int.__pos__(value))
        if isinstance(value, float):
            return float.__pos__(value)
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, complex):
            return ["c", value.real, value.imag]
        if isinstance(value, bytes):
            return ["b", bytes.hex(value)]
        if value is Ellipsis or value is NotImplemented:
            return ["e", repr(value)]
        if kind is range:
            return ["range", self(value.start), self(value.stop), self(value.step)]
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name == "decimal.Decimal":
            return ["decimal", str(value)]
        if name == "fractions.Fraction":
            return ["fraction", self(value.numerator), self(value.denominator)]
        if name in ("datetime.date", "datetime.datetime", "datetime.time") and not getattr(value, "tzinfo", None):
            return [name.rpartition(".")[2], value.isoformat()]
        if name == "datetime.timedelta":
            return ["timedelta", value.days, value.seconds, value.microseconds]
        return None

    def _container(self, value: Any, kind: type, depth: int) -> Any:
        if id(value) in self._shared:
            return ["shared", self._shared[id(value)]]
        if id(value) in self._written:
            return ["again", self._written[id(value)]]
        if isinstance(value, tuple):
            items = [self(item, depth) for item in tuple.__iter__(value)]
            fields = getattr(kind, "_fields", None)
            return ["named", kind.__name__, list(fields), items] if isinstance(fields, tuple) else ["tuple", items]
        if isinstance(value, frozenset):
            return ["frozenset", [self(item, depth) for item in frozenset.__iter__(value)]]
        if kind is type({}.keys()):
            return ["keys", [self(item, depth) for item in value]]
        if kind is type({}.items()):
            return ["items", [[self(k, depth), self(v, depth)] for k, v in value]]
        name = f"{kind.__module__}.{kind.__qualname__}"
        if not isinstance(value, MUTABLE) and name != "collections.deque":
            return self._export(value)
        number = self._written[id(value)] = len(self.mutable)
        self.mutable.append(value)
        if isinstance(value, bytearray):
            return ["bytearray", number, bytes(value).hex()]
        if isinstance(value, dict):
            extra = []
            if name == "collections.defaultdict":
                extra = [getattr(getattr(value, "default_factory", None), "__name__", "")]
            tag = {
                "collections.Counter": "counter",
                "collections.OrderedDict": "ordered",
                "collections.defaultdict": "default",
            }.get(name, "dict")
            return [tag, number, [[self(k, depth), self(v, depth)] for k, v in dict.items(value)], *extra]
        if name == "collections.deque":
            return ["deque", number, [self(item, depth) for item in value], value.maxlen]
        base = set if isinstance(value, set) else list
        return [base.__name__, number, [self(item, depth) for item in base.__iter__(value)]]

    def _array(self, value: Any) -> Any:
        dtype = value.dtype
        if dtype.kind in NUMPY_KINDS:
            return ["numpy", dtype.str, list(value.shape), value.tobytes().hex(), hasattr(value, "__setitem__")]
        return self(str(value)) if dtype.kind == "U" and not hasattr(value, "__setitem__") else self._export(value)


class Decoder:
    """Reads the values of one message from the other process, which may be hostile.

    Args:
        shared: mutable objects of this side that the other side has, by number.
        reference: returns the object for a reference `[tag, ...]` that is no value.
    """

    def __init__(self, shared: Mapping[int, Any], reference: Callable[[list[Any]], Any]) -> None:
        self._shared = shared
        self._reference = reference
        self._built: dict[int, Any] = {}
        self.mutable: list[Any] = []

    def __call__(self, form: Any) -> Any:
        """Return the value of a JSON form. Raises ValueError, TypeError or another error for a malformed one."""
        if form is None or isinstance(form, (bool, int, float, str)):
            return form
        if not isinstance(form, list) or not form or not isinstance(form[0], str):
            raise ValueError("malformed value")
        read = self._readers.get(form[0])
        return read(self, *form[1:]) if read else self._reference(form)

    def _items(self, forms: Any) -> list[Any]:
        if not isinstance(forms, list):
            raise ValueError("malformed items")
        return [self(form) for form in forms]

    def _pairs(self, forms: Any) -> list[tuple[Any, Any]]:
        return [(self(key), self(value)) for key, value in forms]

    def _new(self, number: Any, value: Any) -> Any:
        if number != len(self.mutable):
            raise ValueError("malformed number")
        self._built[number] = value
        self.mutable.append(value)
        return value

    def _shared_object(self, number: int) -> Any:
        return self._shared[number]

    def _again(self, number: int) -> Any:
        return self._built[number]

    def _list(self, number: int, forms: Any) -> Any:
        value = self._new(number, [])
        value.extend(self._items(forms))
        return value

    def _set(self, number: int, forms: Any) -> Any:
        value = self._new(number, set())
        value.update(self._items(forms))
        return value

    def _dict(self, number: int, forms: Any) -> Any:
        value = self._new(number, {})
        value.update(self._pairs(forms))
        return value

    def _counter(self, number: int, forms: Any) -> Any:
        from collections import Counter

        value = self._new(number, Counter())
        dict.update(value, self._pairs(forms))
        return value

    def _ordered(self, number: int, forms: Any) -> Any:
        from collections import OrderedDict

        value = self._new(number, OrderedDict())
        value.update(self._pairs(forms))
        return value

    def _default(self, number: int, forms: Any, factory: str) -> Any:
        from collections import defaultdict

        value = self._new(number, defaultdict(PLAIN_TYPES.get(factory)))
        value.update(self._pairs(forms))
        return value

    def _deque(self, number: int, forms: Any, length: int | None) -> Any:
        from collections import deque

        value = self._new(number, deque(maxlen=length))
        value.extend(self._items(forms))
        return value

    def _bytearray(self, number: int, text: str) -> Any:
        return self._new(number, bytearray.fromhex(text))

    def _named(self, name: str, fields: list[str], forms: Any) -> Any:
        from collections import namedtuple

        kind: Any = namedtuple(name, fields)  # type: ignore[misc]
        return kind._make(self._items(forms))

    def _numpy(self, dtype: str, shape: list[int], text: str, is_array: bool) -> Any:
        import numpy

        kind = numpy.dtype(dtype)
        if kind.kind not in NUMPY_KINDS or len(dtype) > 5:
            raise ValueError("malformed dtype")
        array = numpy.frombuffer(bytearray.fromhex(text), kind).reshape([int(n) for n in shape])
        return array if is_array else array[()]

    def _moment(self, name: str, text: str) -> Any:
        import datetime

        return getattr(datetime, name).fromisoformat(text)

    def _duration(self, days: int, seconds: int, microseconds: int) -> Any:
        import datetime

        return datetime.timedelta(days, seconds, microseconds)

    def _decimal(self, text: str) -> Any:
        from decimal import Decimal

        return Decimal(text)

    def _fraction(self, numerator: Any, denominator: Any) -> Any:
        from fractions import Fraction

        return Fraction(self(numerator), self(denominator))

    _readers: Mapping[str, Callable[..., Any]] = {
        "i": lambda self, text: int(text, 16),
        "c": lambda self, real, imag: complex(real, imag),
        "b": lambda self, text: bytes.fromhex(text),
        "e": lambda self, name: Ellipsis if name == "Ellipsis" else NotImplemented,
        "t": lambda self, name: PLAIN_TYPES[name],
        "range": lambda self, *ends: range(*map(self, ends)),
        "tuple": lambda self, forms: tuple(self._items(forms)),
        "frozenset": lambda self, forms: frozenset(self._items(forms)),
        "keys": lambda self, forms: dict.fromkeys(self._items(forms)).keys(),
        "items": lambda self, forms: dict(self._pairs(forms)).items(),
        "named": _named,
        "list": _list,
        "set": _set,
        "dict": _dict,
        "counter": _counter,
        "ordered": _ordered,
        "default": _default,
        "deque": _deque,
        "bytearray": _bytearray,
        "numpy": _numpy,
        "date": lambda self, text: self._moment("date", text),
        "datetime": lambda self, text: self._moment("datetime", text),
        "time": lambda self, text: self._moment("time", text),
        "timedelta": _duration,
        "decimal": _decimal,
        "fraction": _fraction,
        "shared": _shared_object,
        "again": _again,
    }


def replace_content(target: Any, content: Any, decode: Decoder) -> None:
    """Give a mutable object of this side the contents that the other side left in its copy."""
    if isinstance(target, bytearray):
        target[:] = bytes.fromhex(content)
    elif isinstance(target, dict):
        pairs = [(decode(key), decode(value)) for key, value in content]
        dict.clear(target)
        dict.update(target, pairs)
    else:
        items = [decode(form) for form in content]
        target.clear()
        target.update(items) if isinstance(target, set) else target.extend(items)


def items_of(value: Any) -> list[Any]:
    """Return the items of a mutable object, to tell later whether it was changed."""
    return [*value, *value.values()] if isinstance(value, dict) else list(value)


def is_unchanged(value: Any, before: list[Any]) -> bool:
    """Return whether a mutable object holds the very items it held before."""
    after = items_of(value)
    return len(after) == len(before) and all(a is b for a, b in zip(after, before, strict=True))
