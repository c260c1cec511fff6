"""Stage of a result: its folder, and the journal of its finished tensors, after the last of which a run is resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from common.files.atomic import naming, write_file
from common.files.bounded_reading import UnreadableError, read_bytes
from common.files.json_values import JsonObject, JsonValue

NAMES = "journal-*.jsonl"
MAX_JOURNAL = 1 << 30
"""Bytes of a journal that are read; one of the largest models has a few million."""


def journal_name(part: int, rank: int = 0) -> str:
    """Return the file in which a rank keeps what it has finished of one of a run's results."""
    return f"journal-{part}-{rank}.jsonl"


class Stage:
    """A folder that will be a result, and the journal of its finished tensors, one JSON line each.

    The lines are in the order of the plan; the first line of the file is the run's key. Where several ranks make a
    result, each has a journal of its own part. Lines are appended; every other change replaces the file.
    """

    def __init__(self, folder: Path, file: Path, key: str, processes: int = 1) -> None:
        self.folder, self.file = folder, file
        self._first: JsonObject = {"key": key} | ({"processes": processes} if processes > 1 else {})
        self._handle: int | None = None
        lines = read_lines(file)
        self.entries: list[JsonObject] = lines[1:]
        self._replace([lines[0] if lines else self._first, *self.entries])  # drops a line that a crash cut short

    def add(self, entry: Mapping[str, JsonValue]) -> None:
        """Append a finished tensor."""
        data = (json.dumps(entry) + "\n").encode()
        with naming(self.file):
            if self._handle is None:
                self._handle = os.open(self.file, os.O_WRONLY | os.O_APPEND)
            while data:
                data = data[os.write(self._handle, data) :]
        self.entries.append(dict(entry))

    def hold(self, entries: Sequence[Mapping[str, JsonValue]]) -> None:
        """Take the entries of all ranks, which the file does not get."""
        self.entries = [dict(entry) for entry in entries]

    def keep(self, count: int) -> None:
        """Drop all but the first `count` entries."""
        if count < len(self.entries):
            self.entries = self.entries[:count]
            self._replace([self._first, *self.entries])

    def close(self) -> None:
        """Close the journal; a later entry opens it again."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _replace(self, lines: Iterable[Mapping[str, JsonValue]]) -> None:
        self.close()
        write_file(self.file, "".join(json.dumps(line) + "\n" for line in lines).encode())


def read_lines(file: Path) -> list[JsonObject]:
    """Return the lines of a journal up to the first that is none: cut by a crash, or not of this program.

    Nothing where the file is missing, cannot be read, or does not begin with a run's key.
    """
    try:
        data = read_bytes(file, MAX_JOURNAL)
    except (OSError, UnreadableError):
        return []
    lines: list[JsonObject] = []
    for text in data.split(b"\n")[:-1]:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not (_is_entry(line) if lines else _is_first(line)):
            break
        lines.append(line)
    return lines


def _is_first(line: object) -> bool:
    return isinstance(line, dict) and isinstance(line.get("key"), str) and isinstance(line.get("processes", 1), int)


def _is_entry(line: object) -> bool:
    return (
        isinstance(line, dict)
        and isinstance(line.get("name"), str)
        and isinstance(line.get("digest"), str)
        and isinstance(line.get("nonfinite", 0), int)
        and isinstance(line.get("layer_statistics", {}), dict)
    )
