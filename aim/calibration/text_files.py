"""Calibration texts in local files. A file is read through once, so that a broken row is named before any is used."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aim.calibration.config import FILES, KINDS, Calibration
from common.errors import CalibrationError
from common.files.bounded_reading import UnreadableError, check_regular, parse_json, read_bytes, read_lines
from common.files.json_values import JsonObject, JsonValue

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_WHOLE = 1 << 30
"""Bytes of a .json or .txt file, which is held in memory; larger data belong into .jsonl or .parquet files."""
MAX_VALUES = 8_000_000
"""Values in a .json file."""
FIELD, CHATS = Calibration.text_field, "messages"


@dataclass(frozen=True)
class Rows:
    """The rows of a source: how many, the value of each, where it stands, and what an account should say of them."""

    count: int
    value: Callable[[int], JsonValue]
    where: Callable[[int], str]
    about: JsonObject


def chosen_field(fields: Sequence[str], chosen: str, name: str) -> str:
    """Return the field of the text: `messages` where there is no `text`. Raises CalibrationError listing the fields."""
    if chosen in fields:
        return chosen
    if chosen == FIELD and CHATS in fields:
        return CHATS
    has = f"it has {', '.join(fields)}" if fields else "it has no fields"
    raise CalibrationError(f"{name} has no field {chosen!r}, {has}; name one with --text_field.")


def read(path: Path, field: str) -> Rows:
    """Read a file, or all files of the known kinds in a folder as one. Raises CalibrationError naming file and row."""
    if path.is_dir():
        return _folder(path, field)
    readers = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet, ".txt": _paragraphs}
    try:
        check_regular(path)
        rows = readers[path.suffix](path, field)
    except UnreadableError as error:
        raise CalibrationError(str(error)) from error
    if not rows.count:
        raise CalibrationError(f"{path} is empty: it holds no text.")
    return rows


def _folder(folder: Path, field: str) -> Rows:
    """The files one after the other in the order of their paths; hidden ones are no part of the data."""
    paths = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    visible = [file for file in paths if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    files = [file for file in visible if file.suffix in FILES]
    if not files:
        raise CalibrationError(f"{folder} holds no {KINDS} file.")
    parts = [read(file, field) for file in files]
    places = [(part, i) for part in parts for i in range(part.count)]
    fields = list(dict.fromkeys(part.about["field"] for part in parts))
    names = [file.relative_to(folder).as_posix() for file in files]
    return Rows(
        len(places),
        lambda i: places[i][0].value(places[i][1]),
        lambda i: places[i][0].where(places[i][1]),
        {
            "field": fields[0] if len(fields) == 1 else fields,
            "files": {name: part.count for name, part in zip(names, parts, strict=True)},
            "files_left_out": len(visible) - len(files),
        },
    )


def _json_lines(file: Path, chosen: str) -> Rows:
    """One object a line. Only the places of the lines are kept in memory."""
    offsets, numbers = array("Q"), array("Q")
    field: str | None = None
    position = 0
    for number, line in enumerate(read_lines(file), 1):
        if line.strip():
            row = _parsed(line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line, f"{file}, line {number}")
            field = _field_of(row, chosen, field, f"{file}, line {number}")
            offsets.append(position)
            numbers.append(number)
        position += len(line)

    def value(i: int) -> JsonValue:
        with file.open("rb") as stream:
            stream.seek(offsets[i])
            return json.loads(stream.readline().removeprefix(BYTE_ORDER_MARK))[field]

    return Rows(len(offsets), value, lambda i: f"{file}, line {numbers[i]}", {"field": field})


def _parsed(content: bytes, where: str) -> JsonValue:
    return parse_json(_decoded(content, where), where, MAX_VALUES, allow_surrogates=True)


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{where} is not text in UTF-8 (byte {error.start}).") from error


def _field_of(row: object, chosen: str, known_field: str | None, where: str) -> str:
    """Return the field of the text in a row; the first row chooses it for all."""
    if not isinstance(row, dict):
        raise CalibrationError(f"{where} has no field {chosen!r}: it is no object with fields.")
    return chosen_field(list(row), known_field or chosen, where)


def _json(file: Path, chosen: str) -> Rows:
    """A list of objects; or objects a line, as some call such files too."""
    content = read_bytes(file, MAX_WHOLE).removeprefix(BYTE_ORDER_MARK)
    first = next((line for line in content.splitlines() if line.strip()), b"")
    if first.lstrip().startswith(b"{") and _is_json(first):
        return _json_lines(file, chosen)
    table = _parsed(content, str(file)) if content.strip() else []
    if not isinstance(table, list):
        raise CalibrationError(f"{file} must be a list of objects, [{{...}}, ...], or one object a line.")
    field: str | None = None
    for number, row in enumerate(table):
        field = _field_of(row, chosen, field, f"{file}, entry {number}")
    return Rows(len(table), lambda i: table[i][field], lambda i: f"{file}, entry {i}", {"field": field})


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _parquet(file: Path, chosen: str) -> Rows:
    """One column of a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        field = chosen_field(parquet.read_schema(file).names, chosen, str(file))
        column = parquet.read_table(file, columns=[field]).column(field)
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"{file} is not a whole Parquet file ({error}).") from error
    return Rows(len(column), lambda i: column[i].as_py(), lambda i: f"{file}, row {i}", {"field": field})


def _paragraphs(file: Path, _: str) -> Rows:
    """Paragraphs between blank lines, each a text."""
    text = _decoded(read_bytes(file, MAX_WHOLE).removeprefix(BYTE_ORDER_MARK), str(file)).replace("\r\n", "\n")
    paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
    return Rows(len(paragraphs), paragraphs.__getitem__, lambda i: f"{file}, paragraph {i}", {"field": None})
