"""Calls between the test process and the program: length-prefixed JSON messages over two pipes.

Either side asks the other to do one of a fixed list of operations on an object that it was given a number for. The test
process treats all it reads as hostile: bounded messages, no code, no names of its own but the functions that the tests
passed as arguments.
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from eval.sandbox.values import (
    CannotCrossError,
    Decoder,
    Encoder,
    builtin_error,
    error_class,
    is_unchanged,
    items_of,
    replace_content,
)

MAX_MESSAGE = 16 << 20
MAX_TEXT = 2000
CAPABILITIES = ("__call__", "__iter__", "__next__", "__len__", "__getitem__", "__setitem__")


class ConnectionLostError(BaseException):
    """The other process ended or broke the protocol; no Exception, so that `except Exception` in tests lets it pass."""


def read_exactly(descriptor: int, count: int) -> bytes:
    """Read `count` bytes. Raises ConnectionLostError at the end of the stream."""
    parts = []
    while count:
        part = os.read(descriptor, min(count, 1 << 20))
        if not part:
            raise ConnectionLostError("left before its end")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def read_message(descriptor: int, limit: int = MAX_MESSAGE) -> object:
    """Read one message of at most `limit` bytes. Raises ConnectionLostError."""
    size = int.from_bytes(read_exactly(descriptor, 4), "big")
    if size > limit:
        raise ConnectionLostError(f"a value of {size} bytes is more than the {limit} that may leave the sandbox")
    try:
        return json.loads(read_exactly(descriptor, size))
    except (ValueError, RecursionError, MemoryError) as error:
        raise ConnectionLostError("sent a malformed message") from error


def pack_message(message: object) -> bytes:
    """Return a message as bytes with its length before it."""
    data = json.dumps(message, separators=(",", ":")).encode("ascii")
    return len(data).to_bytes(4, "big") + data


def write_message(descriptor: int, message: object) -> None:
    """Write one message. Raises ConnectionLostError where nobody reads."""
    data = memoryview(pack_message(message))
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError as error:
        raise ConnectionLostError("left before its end") from error


class Remote:
    """An object of the other process; what it may do depends on its capabilities."""

    _peer: Peer
    _number: int

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name not in ("__name__", "__doc__"):
            raise AttributeError(name)
        return self._peer.ask("getattr", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        self._peer.ask("setattr", self, name, value)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Remote) and other._peer is self._peer:
            return other is self or bool(self._peer.ask("eq", self, other))
        return NotImplemented

    def __lt__(self, other: object) -> object:
        return self._both("lt", other)

    def __le__(self, other: object) -> object:
        return self._both("le", other)

    def __gt__(self, other: object) -> object:
        return self._both("gt", other)

    def __ge__(self, other: object) -> object:
        return self._both("ge", other)

    def __add__(self, other: object) -> object:
        return self._both("add", other)

    def __sub__(self, other: object) -> object:
        return self._both("sub", other)

    def __mul__(self, other: object) -> object:
        return self._both("mul", other)

    def _both(self, operation: str, other: object) -> object:
        """Ask for an operation on two objects of the other process; it never learns a value of this one."""
        if isinstance(other, Remote) and other._peer is self._peer:
            return self._peer.ask(operation, self, other)
        return NotImplemented

    def __hash__(self) -> int:
        return hash(self._number)

    def __bool__(self) -> bool:
        return bool(self._peer.ask("bool", self))

    def __str__(self) -> str:
        return str(self._peer.ask("str", self))

    def __repr__(self) -> str:
        return str(self._peer.ask("repr", self))


def _remote_method(operation: str) -> Callable[..., object]:
    def method(self: Remote, *arguments: object, **keywords: object) -> object:
        return self._peer.ask(operation, self, *arguments, **keywords)

    return method


_METHODS = {name: _remote_method(name.strip("_")) for name in CAPABILITIES} | {"__iter__": lambda self: _Items(self)}


class _Items:
    """Iterator over the items of a remote object."""

    def __init__(self, remote: Remote) -> None:
        iterator = remote._peer.ask("iter", remote)
        if not isinstance(iterator, Remote):
            raise TypeError("iter() returned an object of the other process that is no iterator")
        self._iterator = iterator

    def __iter__(self) -> _Items:
        return self

    def __next__(self) -> object:
        return self._iterator._peer.ask("next", self._iterator)


OPERATIONS: dict[str, Callable[..., object]] = {
    "call": lambda function, *arguments, **keywords: function(*arguments, **keywords),
    "iter": iter,
    "next": lambda iterator: next(iterator),
    "len": len,
    "getitem": lambda value, key: value[key],
    "bool": bool,
    "str": str,
    "repr": repr,
}
"""Operations that both processes offer."""


def _set_item(value: MutableMapping[object, object], key: object, item: object) -> None:
    value[key] = item


PROGRAM_OPERATIONS: dict[str, Callable[..., object]] = {
    **OPERATIONS,
    "getattr": getattr,
    "setattr": setattr,
    "setitem": _set_item,
    "eq": lambda one, other: bool(one == other),
    **{name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "add", "sub", "mul")},
}
"""Operations that the program's process offers to the tests."""


class Peer:
    """One end of the connection.

    Args:
        incoming: descriptor to read from.
        outgoing: descriptor to write to.
        operations: functions by the name under which the other side may ask for them.
    """

    def __init__(self, incoming: int, outgoing: int, operations: dict[str, Callable[..., object]]) -> None:
        self._incoming, self._outgoing = incoming, outgoing
        self._operations = operations
        self._exported: list[object] = []
        self._numbers: dict[int, int] = {}
        self._remotes: dict[int, Remote] = {}
        self._classes: dict[tuple[str, ...], type[Remote]] = {}
        self.lost = ""
        """Reason for the end of the connection, also where the tests' code caught the error."""

    def ask(self, operation: str, *arguments: object, **keywords: object) -> object:
        """Have the other side do an operation and return its result.

        Mutable arguments are afterwards as the operation left them.

        Raises:
            ConnectionLostError: the other side ended or broke the protocol.
            BaseException: the built-in exception nearest to the one the operation ended with.
        """
        try:
            return self._ask(operation, arguments, keywords)
        except ConnectionLostError as error:
            self.lost = self.lost or str(error)
            raise

    def _ask(self, operation: str, arguments: Sequence[object], keywords: Mapping[str, object]) -> object:
        encode = Encoder({}, self._export)
        forms = [encode(a) for a in arguments]
        named = {name: encode(value) for name, value in keywords.items()}
        write_message(self._outgoing, ["ask", operation, forms, named])
        while True:
            message = read_message(self._incoming)
            parts: list[Any] = message if isinstance(message, list) else []
            kind = parts[0] if parts else None
            if kind == "ask":
                self.answer(message)
                continue
            try:
                if kind == "value":
                    decode = Decoder(dict(enumerate(encode.mutable)), self._resolve)
                    _, form, changed = parts
                    result = decode(form)
                    for number, content in changed:
                        replace_content(encode.mutable[number], content, decode)
                    return result
                if kind == "error":
                    error: BaseException = error_class(parts[1])(str(parts[2])[:MAX_TEXT])
                else:
                    raise ConnectionLostError("sent a malformed message")
            except Exception as problem:
                raise ConnectionLostError("sent a malformed message") from problem
            raise error

    def serve(self) -> None:
        """Answer the other side until it ends."""
        while True:
            try:
                message = read_message(self._incoming)
            except ConnectionLostError:
                return
            self.answer(message)

    def answer(self, message: object) -> None:
        """Do the operation of one message and send its result or error."""
        decode = Decoder({}, self._resolve)
        try:
            if not isinstance(message, list):
                raise ValueError("no list")
            _, operation, forms, named = message
            function = self._operations[operation]
            arguments = [decode(form) for form in forms]
            keywords = {str(name): decode(form) for name, form in named.items()}
        except Exception as error:
            raise ConnectionLostError("sent a malformed message") from error
        before = [items_of(value) for value in decode.mutable]
        try:
            result = function(*arguments, **keywords)
            encode = Encoder({id(value): n for n, value in enumerate(decode.mutable)}, self._export)
            form = encode(result)
            pairs = enumerate(zip(decode.mutable, before, strict=True))
            changed = [[n, encode.content(value)] for n, (value, old) in pairs if not is_unchanged(value, old)]
            reply = ["value", form, changed]
        except ConnectionLostError:
            raise
        except BaseException as error:
            text = str(error) if isinstance(error, CannotCrossError) else f"{type(error).__name__}: {_text(error)}"
            reply = ["error", builtin_error(type(error)), text[:MAX_TEXT]]
        write_message(self._outgoing, reply)

    def _export(self, value: object) -> list[object]:
        if isinstance(value, Remote):
            return ["here", value._number]
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self._exported)
            self._exported.append(value)
        return ["there", number, [name for name in CAPABILITIES if hasattr(type(value), name)]]

    def _resolve(self, form: list[object]) -> object:
        tag, number, *rest = form
        if type(number) is not int or number < 0:
            raise ValueError("malformed number")
        if tag == "here":
            return self._exported[number]
        if tag != "there":
            raise ValueError("malformed value")
        if number not in self._remotes:
            capabilities = rest[0]
            if not isinstance(capabilities, list):
                raise ValueError("malformed value")
            names = tuple(name for name in CAPABILITIES if name in capabilities)
            if names not in self._classes:
                self._classes[names] = type("Remote", (Remote,), {name: _METHODS[name] for name in names})
            self._remotes[number] = self._classes[names](self, number)
        return self._remotes[number]


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:
        return ""
