"""Cleaned answers as values: the structure of lists, sets, intervals, relations, matrices, times, ratios and units."""

from __future__ import annotations

import re
from collections.abc import Iterator

from eval.maths.formulas import WORD, formula
from eval.maths.notation import split_unit
from eval.maths.values import (
    Formula,
    Items,
    Matrix,
    Numeral,
    Parts,
    Quantity,
    Relation,
    Union,
    Value,
    Words,
    expressions,
    name_of,
)

DEPTH = 6
"""Levels of brackets and lists that are read."""


def read_all(text: str) -> Iterator[Value]:
    """Read a cleaned answer; `100,200` is read as a number and as a list."""
    if re.fullmatch(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d*)?", text):
        text = text.replace(" ", "")
    number, unit = split_unit(re.sub(r"\s*%$", "", text))
    if re.fullmatch(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d*)?", number):
        yield read(text.replace(",", ""))
        parts = number.split(",") if number == text and not unit else ["0"]
        if not any(part.startswith("0") for part in parts):
            yield Items("", tuple(read(part) for part in parts))
        return
    yield read(text)


def read(text: str, depth: int = 0) -> Value:
    """Read a cleaned answer or a part of it as a value."""
    text = text.strip()
    if depth > DEPTH or not text:
        return Words(text)
    for reader in (_braced, _listed, _union, _relation, _matrix, _bracketed, _colons, _numeral, _signs):
        value = reader(text, depth)
        if value is not None:
            return value
    plain = re.sub(r"\s*%$", "", text)
    if plain != text:
        return Quantity(read(plain, depth + 1), percent=True)
    number, unit = split_unit(text)
    if unit and not (unit == ("degree",) and re.search(r"\\?(?:sin|cos|tan|cot|sec|csc)", number)):
        return Quantity(read(number, depth + 1), unit)
    return formula(text) or Words(text)


_OPENING, _CLOSING = "([{", ")]}"


def _split(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """Split at a separator outside all brackets; return the parts and the separators. One part where there is none."""
    depth, start, place = 0, 0, 0
    parts: list[str] = []
    separators: list[str] = []
    while place < len(text):
        for environment in (r"\begin", r"\langle", r"\lfloor", r"\lceil"):
            if text.startswith(environment, place):
                depth += 1
        for environment in (r"\end", r"\rangle", r"\rfloor", r"\rceil"):
            if text.startswith(environment, place):
                depth -= 1
        if depth == 0:
            match = separator.match(text, place)
            if match and match.end() > place:
                parts.append(text[start:place])
                separators.append(match[0])
                start = place = match.end()
                continue
        if text[place] == "\\" and text[place + 1 : place + 2] in ("{", "}"):
            place += 1
        depth += (text[place] in _OPENING) - (text[place] in _CLOSING)
        place += 1
    if depth != 0:
        return [text], []
    return [*parts, text[start:]], separators


_LIST = re.compile(r"\s*(?:[,;]\s*(?:and|or)\b|[,;]|(?<=[\s\d})\]])(?:and|or)\b)\s*")
_THOUSANDS = re.compile(r"(?<![\d.])(?<!\d,)\d{1,3}(?:,\d{3})+(?!\d|,\d)")


def _listed(text: str, depth: int) -> Value | None:
    """Read a list without brackets: items between commas, semicolons, `and` or `or`."""
    parts, _ = _split(_spaced_thousands(text), _LIST)
    parts = [part.strip() for part in parts]
    if len(parts) < 2:
        return None
    if not all(parts):
        return Words(text)
    items = [read(part, depth + 1) for part in parts]
    if any(isinstance(item, Words) and WORD.search(item.text) for item in items) and "," not in text:
        return Words(text)
    first = items[0]
    named = isinstance(first, Relation) and first.signs == ("=",) and name_of(first.sides[0])
    if named and not any(isinstance(item, Relation) for item in items[1:]):
        items[0] = first.sides[1]  # type: ignore[union-attr]
    units = [item.unit for item in items if isinstance(item, Quantity)]
    if units and isinstance(items[-1], Quantity):
        items = [item if isinstance(item, Quantity) else Quantity(item, units[-1], items[-1].percent) for item in items]
    return Items("", tuple(items))


def _spaced_thousands(text: str) -> str:
    """Remove the commas of thousands from a list whose own commas have spaces behind them."""
    return _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text) if re.search(r",\s|;|\band\b|\bor\b", text) else text


_CUP = re.compile(r"\s*\\cup(?![A-Za-z])\s*")
_MINUS = re.compile(r"\s*\\(?:setminus|backslash)(?![A-Za-z])\s*")


def _union(text: str, depth: int) -> Value | None:
    parts, _ = _split(text, _MINUS)
    unions, _ = _split(parts[0], _CUP)
    if len(parts) == 1 and len(unions) == 1:
        return None
    return Union(tuple(read(part, depth + 1) for part in unions), tuple(read(part, depth + 1) for part in parts[1:]))


_SIGN = re.compile(r"\s*(?:\\(?:le|ge|ne|in|equiv|approx)(?![A-Za-z])|<=|>=|!=|=|<|>)\s*")
_SIGN_NAMES = {r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\in": "in", r"\equiv": "mod", r"\approx": "~"}


def _relation(text: str, depth: int) -> Value | None:
    sides, signs = _split(text, _SIGN)
    if len(sides) == 2 and not sides[0].strip():
        return read(sides[1], depth + 1) if signs[0].strip() == "=" else None
    if len(sides) < 2 or not all(side.strip() for side in sides):
        return None
    names = tuple(_SIGN_NAMES.get(sign.strip(), sign.strip()) for sign in signs)
    if "mod" in names or "~" in names:
        return Words(text)
    values = tuple(read(side, depth + 1) for side in sides)
    return Words(text) if any(isinstance(value, Words) for value in values) else Relation(values, names)


def _matrix(text: str, depth: int) -> Value | None:
    match = re.fullmatch(r"\\begin\s*\{([pv])matrix\}(.*)\\end\s*\{\1matrix\}", text)
    if match is None or r"\begin" in match[2]:
        return None
    rows, _ = _split(match[2].strip().removesuffix(r"\\"), re.compile(r"\s*\\\\\s*"))
    cells = [[read(cell, depth + 1) for cell in _split(row, re.compile(r"\s*&\s*"))[0]] for row in rows]
    if match[1] == "p":
        return Matrix(tuple(map(tuple, cells)))
    if any(len(row) != len(cells) or not all(isinstance(cell, Formula) for cell in row) for row in cells):
        return Words(text)
    import sympy

    return Formula(sympy.Matrix([expressions(row) for row in cells]).det())


def _whole(text: str, opening: str, closing: str) -> str | None:
    """Return what stands between brackets that enclose the whole text; None where they do not."""
    if not (text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening) + len(closing)):
        return None
    inner = text[len(opening) : len(text) - len(closing)]
    depth, place = 0, 0
    while place < len(inner):
        if inner[place] == "\\" and inner[place + 1 : place + 2] in ("{", "}"):
            place += 1
        depth += (inner[place] in _OPENING) - (inner[place] in _CLOSING)
        if depth < 0:
            return None
        place += 1
    return inner.strip() if depth == 0 else None


_COMMA = re.compile(r"\s*[,;]\s*")


def _braced(text: str, depth: int) -> Value | None:
    """Read a set in braces, by its elements or by a condition."""
    if text == r"\emptyset":
        return Items("{}", ())
    group = _whole(text, "{", "}")
    if group is not None:
        return read(group, depth + 1)
    inner = _whole(text, r"\{", r"\}")
    if inner is None:
        return None
    if not inner:
        return Items("{}", ())
    parts, separators = _split(inner, re.compile(r"\s*[:|]\s*"))
    if len(separators) == 1 and name_of(formula(parts[0])):
        return read(parts[1], depth + 1)
    items, _ = _split(_spaced_thousands(inner), _COMMA)
    return Items("{}", tuple(read(item, depth + 1) for item in items))


def _bracketed(text: str, depth: int) -> Value | None:
    """Read a tuple, an interval, or one value in brackets."""
    for opening in ("(", "[", r"\langle"):
        for closing in (")", "]", r"\rangle"):
            inner = _whole(text, opening, closing)
            if inner is None:
                continue
            parts, separators = _split(_spaced_thousands(inner), _COMMA)
            if separators:
                brackets = "()" if r"\langle" in (opening, "") else opening + closing
                return Items(brackets, tuple(read(part, depth + 1) for part in parts))
            if opening + closing in ("()", "[]"):
                value = read(inner, depth + 1)
                return None if isinstance(value, Formula) and value.decimals is None else value
    return None


_HALF = re.compile(r"\s*([ap])\.?\s?m\.?$", re.IGNORECASE)


def _colons(text: str, depth: int) -> Value | None:
    """Read a time of day or a ratio."""
    half = _HALF.search(text)
    rest = re.sub(r"\s*:\s*", ":", text[: half.start()] if half else text)
    if half and re.fullmatch(r"\d{1,2}", rest):
        return Parts((read(rest), read("0")), True, half[1].lower())
    if re.fullmatch(r"\d{1,2}:[0-5]\d(?::[0-5]\d)?", rest):
        return Parts(tuple(read(part) for part in rest.split(":")), True, half[1].lower() if half else "")
    parts, separators = _split(text, re.compile(r"\s*:\s*"))
    if not separators or half:
        return None
    values = tuple(read(part, depth + 1) for part in parts)
    return Parts(values) if all(isinstance(value, Formula) for value in values) else Words(text)


_NUMBER_NAMES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def _numeral(text: str, _depth: int) -> Value | None:
    match = re.fullmatch(
        r"\(?([0-9A-Z]*\d[0-9A-Z]*(?:\.\d+)?)\)?\s*(?:_\s*\{?\s*(\d+|[a-z]+)\s*\}?| base (\d+|[a-z]+))", text
    )
    if match is None:
        return None
    base = match[2] or match[3]
    number = int(base) if base.isdecimal() else _NUMBER_NAMES.index(base) + 2 if base in _NUMBER_NAMES else 0
    return Numeral(match[1].lstrip("0") or "0", number) if number else None


def _signs(text: str, depth: int) -> Value | None:
    """Read plus-minus as the set of both values."""
    if not re.search(r"\\(?:pm|mp)(?![A-Za-z])", text):
        return None
    both = [re.sub(r"\\pm(?![A-Za-z])", one, re.sub(r"\\mp(?![A-Za-z])", other, text)) for one, other in ("+-", "-+")]
    return Items("{}", tuple(read(part, depth + 1) for part in both))
