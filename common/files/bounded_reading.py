"""The one way to read foreign files: regular files of bounded size, JSON and YAML of bounded depth and length.

Every reader of merging, aim, eval and scripts goes through here, so that no input can hang the program, fill the
memory, or mean two things at once (duplicate keys).
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files.json_values import JsonObject, JsonValue
from common.terminal_text import foreign, quoted

if TYPE_CHECKING:
    import yaml

MIB = 1 << 20
MAX_CONFIG = 16 * MIB
"""Bytes of a config, lock, record or adapter config; the largest real ones have a few."""
MAX_INDEX = 64 * MIB
MAX_TOKENIZER = 256 * MIB
MAX_TEXT = 16 * MIB
MAX_YAML = MIB
MAX_LINE = 16 * MIB
"""Bytes of a line of JSON lines, which holds one text or the answers to one question."""
MAX_RESULTS = 256 * MIB
"""Bytes of a results file; one with a verdict on every item of all benchmarks has a few million."""
MAX_WIDE = 32 * MIB
"""Bytes of JSON with characters beyond ASCII, which take up to four times their size in memory."""
MAX_VALUES = 2_000_000
"""Values in a JSON file: 64 bytes or more each in memory."""
MAX_TOKENIZER_VALUES = 8_000_000
MAX_DEPTH = 64
MAX_DIGITS = 40
"""Digits of a whole number; a longer one cannot become a floating-point number or be printed."""
MAX_YAML_NODES = 50_000
"""Nodes of a YAML file, aliases counted as what they stand for."""

_NUMBER = re.compile(r"[-+]?(0x[0-9a-fA-F_]+|[0-9_:]+)")
_KINDS = {
    stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}  # fmt: skip


class UnreadableError(ValueError):
    """A foreign file that is not read: one sentence that names it."""


class LimitError(UnreadableError):
    """A foreign file that exceeds a limit of size, depth or number of values."""


def check_regular(file: Path) -> os.stat_result:
    """Return the status of a regular file (links followed), without opening it.

    Raises UnreadableError for a FIFO, device, socket or folder, OSError where there is none.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no file")
        raise UnreadableError(f"{file} is {kind}, and a regular file was expected.")
    return status


def open_regular(file: Path) -> BufferedReader:
    """Open a regular file to read it, never waiting for one that is none.

    Raises UnreadableError for a FIFO, device, socket or folder, OSError where it cannot be opened.
    """
    check_regular(file)
    stream = os.fdopen(os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)), "rb")
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):  # it was replaced in between
        stream.close()
        raise UnreadableError(f"{file} is not a regular file.")
    return stream


def read_bytes(file: Path, limit: int, cut: bool = False) -> bytes:
    """Return the content of a regular file of at most `limit` bytes; with `cut` the first `limit` of a longer one.

    Raises UnreadableError for other kinds of files, LimitError for a longer one, OSError where it cannot be read.
    """
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit and not cut:
            raise LimitError(f"{file} has {size} bytes, and at most {limit} are read of such a file.")
        content = stream.read(limit if cut else limit + 1)
    if len(content) > limit:
        raise LimitError(f"{file} has more than {limit} bytes, the most that are read of such a file.")
    return content


def read_text(file: Path, limit: int = MAX_TEXT, cut: bool = False) -> str:
    """Return the text of a regular file in UTF-8, as `read_bytes`. Raises UnreadableError for other encodings."""
    content = read_bytes(file, limit, cut)
    try:
        return content.decode("utf-8", "ignore" if cut else "strict").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"{file} is not text in UTF-8 (byte {error.start}).") from error


def read_json(file: Path, limit: int = MAX_CONFIG, max_values: int = MAX_VALUES) -> JsonValue:
    """Read a JSON file. Raises UnreadableError naming it, OSError where it cannot be opened."""
    return parse_json(read_bytes(file, limit), str(file), max_values)


def read_lines(file: Path, limit: int = MAX_LINE) -> Iterator[bytes]:
    """Yield the lines of a regular file, of at most `limit` bytes each, with their ends.

    Raises UnreadableError for other kinds of files, LimitError for a longer line, OSError where it cannot be read.
    """
    with open_regular(file) as stream:
        number = 0
        while line := stream.readline(limit + 1):
            number += 1
            if len(line) > limit:
                raise LimitError(f"{file}, line {number} has more than {limit} bytes, the most that are read.")
            yield line


def parse_json(
    content: bytes | str,
    source: str,
    max_values: int = MAX_VALUES,
    whole_numbers: bool = False,
    allow_surrogates: bool = False,
) -> JsonValue:
    """Parse JSON that is foreign.

    Args:
        content: bytes or text of it.
        source: the file, for messages.
        max_values: values that are read.
        whole_numbers: all its numbers are counts, from 0 on.
        allow_surrogates: strings may hold half of a surrogate pair, as answers of a model and broken prompts do.

    Raises LimitError for more than `max_values` values or MAX_DEPTH levels, UnreadableError for what is no JSON in
    UTF-8, and for an object that has one key twice.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    if len(content) > MAX_WIDE and not content.isascii():
        raise LimitError(f"{source} has {len(content)} bytes of text beyond ASCII, and at most {MAX_WIDE} are read.")
    openings = content.count(b"[") + content.count(b"{")
    if content.count(b",") + openings > max_values:
        raise LimitError(f"{source} holds more than {max_values} values, the most that are read of such a file.")
    counts: dict[str, Any] = {"parse_int": _count, "parse_float": _no_count, "parse_constant": _no_count}
    numbers = counts if whole_numbers else {"parse_int": _whole_number}
    on_surrogates = "surrogatepass" if allow_surrogates else "strict"
    try:
        value = json.loads(content.decode("utf-8", on_surrogates), object_pairs_hook=_unique, **numbers)
    except RecursionError:
        raise LimitError(f"{source} is nested more than {MAX_DEPTH} levels deep.") from None
    except ValueError as error:  # also of UTF-8, and of numbers with thousands of digits
        raise UnreadableError(f"{source} is not valid JSON ({foreign(str(error))}).") from error
    if openings > MAX_DEPTH:
        _check_depth(value, source)
    if not allow_surrogates and (b"\\ud" in content or b"\\uD" in content):
        _check_surrogates(value, source)
    return value


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _count(digits: str) -> int:
    return _no_count(digits) if digits.startswith("-") else _whole_number(digits)


def _no_count(number: str) -> int:
    raise ValueError(f"the number {foreign(number, 40)}, where whole numbers from 0 were expected")


def _unique(pairs: list[tuple[str, JsonValue]]) -> JsonObject:
    """An object's pairs as a dict. Raises ValueError for a key that stands twice."""
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        keys: set[str] = set()
        twice = next(key for key, _ in pairs if key in keys or keys.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {quoted(twice, 60)} is in it twice")
    return mapping


def _check_depth(value: JsonValue, source: str) -> None:
    """Raise LimitError where JSON is nested deeper than MAX_DEPTH."""
    level, depth = [value] if isinstance(value, dict | list) else [], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise LimitError(f"{source} is nested more than {MAX_DEPTH} levels deep.")
        inside: list[JsonValue] = []
        for holder in level:
            entries: Iterable[JsonValue] = holder.values() if type(holder) is dict else holder
            inside.extend([entry for entry in entries if type(entry) is dict or type(entry) is list])
        level = inside


def _check_surrogates(value: object, source: str) -> None:
    """Raise UnreadableError where a string holds half of a surrogate pair, which no file in UTF-8 can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise UnreadableError(f"{source} is not valid JSON (a string holds half of a surrogate pair).") from None


def read_yaml(file: Path, limit: int = MAX_YAML) -> list[JsonValue]:
    """Return the documents of a YAML file. Raises UnreadableError naming it, OSError where it cannot be opened."""
    return parse_yaml(read_text(file, limit), str(file))


def parse_yaml(text: str, source: str) -> list[JsonValue]:
    """Return the documents of YAML that is foreign; `source` names it in messages.

    Anchors, aliases and merge keys are read as long as all that they stand for stays within MAX_YAML_NODES. Raises
    LimitError beyond that and beyond MAX_DEPTH levels, UnreadableError for what is no YAML, for an anchor inside
    itself, and for a mapping that has one key twice.
    """
    import yaml

    try:
        _check_yaml(text, source)
        return list(yaml.load_all(text, Loader=_yaml_loader()))
    except UnreadableError:
        raise
    except RecursionError:
        raise LimitError(f"{source} is nested too deeply.") from None
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, OverflowError, IndexError) as error:
        # the constructors raise whatever a scalar with a tag makes them stumble over
        what = f"key or value {error}" if isinstance(error, KeyError) else str(error)
        raise UnreadableError(f"{source} is not valid YAML ({foreign(what, 240)}).") from error


def _yaml_loader() -> type[yaml.SafeLoader | yaml.CSafeLoader]:
    import yaml

    loader: type[yaml.SafeLoader | yaml.CSafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return loader


def _check_yaml(text: str, source: str) -> None:
    """Count what the documents hold before anything of it is built."""
    import yaml

    sizes: dict[str | None, int] = {}
    open_nodes: list[_Open] = []
    total = 0
    for event in yaml.parse(text, Loader=_yaml_loader()):
        if isinstance(event, yaml.DocumentStartEvent):
            sizes, open_nodes = {}, []
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            closed = open_nodes.pop()
            size = closed.size
            if closed.anchor:
                sizes[closed.anchor] = size
            if open_nodes:
                open_nodes[-1].size += size
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        size = 1
        if isinstance(event, yaml.AliasEvent):
            if any(node.anchor == event.anchor for node in open_nodes):
                raise UnreadableError(f"{source} uses the anchor {quoted(event.anchor, 60)} inside itself.")
            size = sizes.get(event.anchor, 1)
        total += size
        if total > MAX_YAML_NODES:
            where = f" (at line {_line(event)})"
            raise LimitError(f"{source} stands for more than {MAX_YAML_NODES} values{where}.")
        if open_nodes:
            open_nodes[-1].add(event, source)
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            if len(open_nodes) > MAX_DEPTH:
                raise LimitError(f"{source} is nested more than {MAX_DEPTH} levels deep.")
        else:
            if isinstance(event, yaml.ScalarEvent):
                sizes |= {event.anchor: 1} if event.anchor else {}
                if len(event.value) > MAX_DIGITS and _NUMBER.fullmatch(event.value) and (event.tag or not event.style):
                    digits = f"{len(event.value)} digits at line {_line(event)}"
                    raise UnreadableError(f"{source} has a number of {digits}, and at most {MAX_DIGITS} are read.")
            if open_nodes:
                open_nodes[-1].size += size


def _line(event: yaml.Event) -> int:
    assert event.start_mark is not None
    return int(event.start_mark.line) + 1


class _Open:
    """A mapping or list of YAML whose end is yet to come: its anchor, its number of nodes, the keys so far."""

    def __init__(self, anchor: str | None, is_mapping: bool) -> None:
        self.anchor, self.is_mapping, self.size = anchor, is_mapping, 1
        self._keys: set[str] = set()
        self._entries = 0

    def add(self, event: yaml.Event, source: str) -> None:
        """Count an entry. Raises UnreadableError for a key of a mapping that stands twice."""
        import yaml

        self._entries += 1
        if not self.is_mapping or self._entries % 2 == 0 or not isinstance(event, yaml.ScalarEvent):
            return
        if event.value in self._keys:
            line = _line(event)
            raise UnreadableError(f"{source} has the key {quoted(event.value, 60)} twice (again at line {line}).")
        self._keys.add(event.value)
