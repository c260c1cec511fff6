"""Values between the test process and the program: literals and standard containers as JSON, everything else by number.

Neither pickle nor code crosses. A number stands for an object that stays on the other side; what may be done with it
there is a fixed list of operations, and comparison with a value is not among them: an object that is no literal equals
no literal, whatever its class says. Instances of subclasses cross as their base type's value.
"""

from __future__ import annotations

import builtins
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from numpy import generic
    from numpy.typing import NDArray

Mutable = list[Any] | dict[Any, Any] | set[Any] | bytearray | deque[Any]
"""Objects whose contents cross again after an operation that may have changed them."""
M = TypeVar("M", bound=Mutable)
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


def error_class(name: object) -> type[BaseException]:
    """Return the built-in exception class of this name; Exception where there is none."""
    builtin = getattr(builtins, name, None) if isinstance(name, str) else None
    return builtin if isinstance(builtin, type) and issubclass(builtin, BaseException) else Exception


class Encoder:
    """Writes values of one message; an object that occurs twice is written once.

    Args:
        shared: numbers, by id, of mutable objects that the other side already has.
        export: returns the reference to an object that stays on this side.
    """

    def __init__(self, shared: Mapping[int, int], export: Callable[[object], list[object]]) -> None:
        self._shared = shared
        self._export = export
        self._written: dict[int, int] = {}
        self.mutable: list[Mutable] = []
        """Mutable objects in the order of their numbers in this message; also keeps them alive."""

    def __call__(self, value: object, depth: int = 0) -> object:
        """Return the JSON form of a value. Raises CannotCrossError."""
        kind = type(value)
        if value is None or kind is bool or kind is str or kind is float:
            return value
        if type(value) is int:
            return value if value.bit_length() < DECIMAL_BITS else ["i", hex(value)]
        if depth > MAX_DEPTH:
            raise CannotCrossError(f"a value nested more than {MAX_DEPTH} deep cannot leave the sandbox")
        if kind.__module__ == "numpy" and hasattr(value, "dtype"):
            return self._array(cast("NDArray[generic] | generic", value))
        simple = self._simple(value, kind)
        return simple if simple is not None else self._container(value, kind, depth + 1)

    def content(self, value: Mutable) -> object:
        """Return the JSON form of a mutable object's contents."""
        if isinstance(value, bytearray):
            return bytes(value).hex()
        if isinstance(value, dict):
            return [[self(k, 1), self(v, 1)] for k, v in dict.items(value)]
        return [self(item, 1) for item in list(value)]

    def _simple(self, value: object, kind: type) -> object:
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
        if type(value) is range:
            return ["range", self(value.start), self(value.stop), self(value.step)]
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name == "decimal.Decimal":
            return ["decimal", str(value)]
        if name == "fractions.Fraction" and hasattr(value, "numerator") and hasattr(value, "denominator"):
            return ["fraction", self(value.numerator), self(value.denominator)]
        is_moment = name in ("datetime.date", "datetime.datetime", "datetime.time")
        if is_moment and hasattr(value, "isoformat") and not getattr(value, "tzinfo", None):
            return [name.rpartition(".")[2], value.isoformat()]
        if name == "datetime.timedelta":
            return ["timedelta", *(getattr(value, part) for part in ("days", "seconds", "microseconds"))]
        return None

    def _container(self, value: object, kind: type, depth: int) -> object:
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
        if type(value) is type({}.keys()):
            return ["keys", [self(item, depth) for item in list[object](value)]]
        if type(value) is type({}.items()):
            return ["items", [[self(k, depth), self(v, depth)] for k, v in list[tuple[object, object]](value)]]
        if not isinstance(value, MUTABLE) and type(value) is not deque:
            return self._export(value)
        number = self._written[id(value)] = len(self.mutable)
        self.mutable.append(value)
        if isinstance(value, bytearray):
            return ["bytearray", number, bytes(value).hex()]
        if isinstance(value, dict):
            extra = []
            name = f"{kind.__module__}.{kind.__qualname__}"
            if name == "collections.defaultdict":
                extra = [getattr(getattr(value, "default_factory", None), "__name__", "")]
            tag = {
                "collections.Counter": "counter",
                "collections.OrderedDict": "ordered",
                "collections.defaultdict": "default",
            }.get(name, "dict")
            return [tag, number, [[self(k, depth), self(v, depth)] for k, v in dict.items(value)], *extra]
        if isinstance(value, set):
            return ["set", number, [self(item, depth) for item in set.__iter__(value)]]
        if isinstance(value, list):
            return ["list", number, [self(item, depth) for item in list.__iter__(value)]]
        return ["deque", number, [self(item, depth) for item in value], value.maxlen]

    def _array(self, value: NDArray[generic] | generic) -> object:
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

    def __init__(self, shared: Mapping[int, object], reference: Callable[[list[object]], object]) -> None:
        self._shared = shared
        self._reference = reference
        self._built: dict[int, object] = {}
        self.mutable: list[Mutable] = []

    def __call__(self, form: object) -> object:
        """Return the value of a JSON form. Raises ValueError, TypeError or another error for a malformed one."""
        if form is None or isinstance(form, (bool, int, float, str)):
            return form
        if not isinstance(form, list) or not form or not isinstance(form[0], str):
            raise ValueError("malformed value")
        read = self._readers.get(form[0])
        return read(self, *form[1:]) if read else self._reference(form)

    def _items(self, forms: object) -> list[object]:
        return [self(form) for form in _checked_list(forms)]

    def _pairs(self, forms: object) -> list[tuple[object, object]]:
        return [(self(key), self(value)) for key, value in map(_checked_list, _checked_list(forms))]

    def _new(self, number: int, value: M) -> M:
        if number != len(self.mutable):
            raise ValueError("malformed number")
        self._built[number] = value
        self.mutable.append(value)
        return value

    def _shared_object(self, number: int) -> object:
        return self._shared[number]

    def _again(self, number: int) -> object:
        return self._built[number]

    def _list(self, number: int, forms: object) -> object:
        value = self._new(number, [])
        value.extend(self._items(forms))
        return value

    def _set(self, number: int, forms: object) -> object:
        value = self._new(number, set())
        value.update(self._items(forms))
        return value

    def _dict(self, number: int, forms: object) -> object:
        value: dict[object, object] = self._new(number, {})
        value.update(self._pairs(forms))
        return value

    def _counter(self, number: int, forms: object) -> object:
        from collections import Counter

        value: Counter[object] = self._new(number, Counter())
        dict.update(cast("dict[object, object]", value), self._pairs(forms))  # counts may be of any type
        return value

    def _ordered(self, number: int, forms: object) -> object:
        from collections import OrderedDict

        value: OrderedDict[object, object] = self._new(number, OrderedDict())
        value.update(self._pairs(forms))
        return value

    def _default(self, number: int, forms: object, factory: str) -> object:
        from collections import defaultdict

        value: defaultdict[object, object] = self._new(number, defaultdict(PLAIN_TYPES.get(factory)))
        value.update(self._pairs(forms))
        return value

    def _deque(self, number: int, forms: object, length: int | None) -> object:
        value = self._new(number, deque[object](maxlen=length))
        value.extend(self._items(forms))
        return value

    def _bytearray(self, number: int, text: str) -> object:
        return self._new(number, bytearray.fromhex(text))

    def _named(self, name: str, fields: list[str], forms: object) -> object:
        from collections import namedtuple

        kind: Any = namedtuple(name, fields)  # type: ignore[misc]
        return kind._make(self._items(forms))

    def _numpy(self, dtype: str, shape: list[int], text: str, is_array: bool) -> object:
        import numpy

        kind = numpy.dtype(dtype)
        if kind.kind not in NUMPY_KINDS or len(dtype) > 5:
            raise ValueError("malformed dtype")
        array = numpy.frombuffer(bytearray.fromhex(text), kind).reshape([int(n) for n in shape])
        return array if is_array else array[()]

    def _moment(self, name: str, text: str) -> object:
        import datetime

        return getattr(datetime, name).fromisoformat(text)

    def _duration(self, days: int, seconds: int, microseconds: int) -> object:
        import datetime

        return datetime.timedelta(days, seconds, microseconds)

    def _decimal(self, text: str) -> object:
        from decimal import Decimal

        return Decimal(text)

    def _fraction(self, numerator: object, denominator: object) -> object:
        from fractions import Fraction

        above, below = self(numerator), self(denominator)
        if not isinstance(above, int) or not isinstance(below, int):
            raise ValueError("malformed fraction")
        return Fraction(above, below)

    _readers: Mapping[str, Callable[..., object]] = {
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


def _checked_list(forms: object) -> list[object]:
    if not isinstance(forms, list):
        raise ValueError("malformed items")
    return forms


def replace_content(target: Mutable, content: object, decode: Decoder) -> None:
    """Give a mutable object of this side the contents that the other side left in its copy."""
    if isinstance(target, bytearray):
        if not isinstance(content, str):
            raise ValueError("malformed bytes")
        target[:] = bytes.fromhex(content)
    elif isinstance(target, dict):
        pairs = [(decode(key), decode(value)) for key, value in map(_checked_list, _checked_list(content))]
        dict.clear(target)
        dict.update(target, pairs)
    else:
        items = [decode(form) for form in _checked_list(content)]
        target.clear()
        target.update(items) if isinstance(target, set) else target.extend(items)


def items_of(value: Mutable) -> list[object]:
    """Return the items of a mutable object, to tell later whether it was changed."""
    return [*value, *value.values()] if isinstance(value, dict) else list(value)


def is_unchanged(value: Mutable, before: list[object]) -> bool:
    """Return whether a mutable object holds the very items it held before."""
    after = items_of(value)
    return len(after) == len(before) and all(a is b for a, b in zip(after, before, strict=True))
