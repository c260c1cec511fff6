"""Labels as literal text of Markdown, CSV, LaTeX and figures."""

from __future__ import annotations

import re
import unicodedata

_BIDI = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the direction of the text around them."""
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~$&]|(?<!\w)_|_(?!\w)|^[#=+-]")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")


def plain(text: str) -> str:
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
    line = _MARKDOWN.sub(lambda match: _ENTITIES.get(match[0], f"\\{match[0]}"), plain(text))
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)


def csv_text(text: str) -> str:
    """Return a label for a cell of a CSV file; one that a spreadsheet would run as a formula begins with an apostrophe.

    A lone "-" stands for no value and stays.
    """
    line = plain(text)
    return f"'{line}" if line.startswith(_FORMULA) and line != "-" else line


def figure_text(text: str, length: int = 40) -> str:
    """Return a label for a figure: one line without mathematics, its middle left out above `length` characters."""
    line = plain(text)
    if len(line) > length:
        tail = length // 3
        line = f"{line[: length - tail - 1]}…{line[-tail:]}"
    line = line.replace("$", r"\$")
    return f"\u200b{line}" if line.startswith("_") else line
