"""Labels as literal text of Markdown, CSV, LaTeX and figures, and tables in Markdown."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_BIDI = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the direction of the text around them."""
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~$&]|(?<!\w)_|_(?!\w)|^[#=+-]")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


def one_line(text: str) -> str:
    """Return a label as one line: line breaks and tabs as spaces, without control characters and lone surrogates."""
    characters = []
    for character in text:
        kind = unicodedata.category(character)
        if kind == "Cs":
            characters.append("\ufffd")
        elif character.isspace() or kind in ("Zl", "Zp"):
            characters.append(" ")
        elif kind != "Cc" and character not in _BIDI:
            characters.append(character)
    return re.sub(r" {2,}", " ", "".join(characters)).strip()


def markdown_text(text: str) -> str:
    """Return a label as literal text of a Markdown table, heading or paragraph (GitHub's flavor).

    An underscore inside a word needs no escape and gets none.
    """
    line = _MARKDOWN.sub(lambda match: _ENTITIES.get(match[0], f"\\{match[0]}"), one_line(text))
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)


def csv_text(text: str) -> str:
    """Return a label for a cell of a CSV file; one that a spreadsheet would run as a formula begins with an apostrophe.

    A lone "-" stands for no value and stays.
    """
    line = one_line(text)
    return f"'{line}" if line.startswith(_FORMULA) and line != "-" else line


def figure_text(text: str, length: int = 40) -> str:
    """Return a label for a figure: one line without mathematics, its middle left out above `length` characters."""
    line = one_line(text)
    if len(line) > length:
        tail = length // 3
        line = f"{line[: length - tail - 1]}…{line[-tail:]}"
    line = line.replace("$", r"\$")
    return f"\u200b{line}" if line.startswith("_") else line


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Return a Markdown table whose columns also line up as plain text.

    Args:
        heads: Column heads.
        rows: Cells by row.
        text_columns: Number of leading text columns, aligned left; the others are aligned right.
    """
    lines = [heads, *rows]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i < text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < text_columns else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(heads), line(rule), *map(line, rows)])
