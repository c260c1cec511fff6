"""Text from checkpoints and other foreign files, made safe to print on a terminal."""

from __future__ import annotations

import re

MAX_QUOTED = 100
"""Characters of a foreign value that a message quotes."""
MAX_WORD = 300
"""Characters of a message without a space between them; a longer run is shortened in its middle."""
MAX_MESSAGE = 1200
"""Characters of a message of one line."""

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
"""C0 and C1 controls but for tab and newline, bidirectional overrides, invisible characters, halves of surrogates."""
_LONG_WORD = re.compile(rf"\S{{{MAX_WORD + 1},}}")


def escape_controls(text: str) -> str:
    """Return text with every control, bidirectional and invisible character written as its escape; newlines stay."""
    return _UNSAFE.sub(lambda match: _escape(ord(match[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shorten(text: str, limit: int) -> str:
    """Return text of at most `limit` characters: a longer one loses its middle."""
    if len(text) <= limit:
        return text
    head = (limit - 3) * 2 // 3
    return f"{text[:head]}...{text[len(text) - (limit - 3 - head) :]}"


def message_line(text: str) -> str:
    """Return a message as one line for the terminal: without controls, long words and the whole shortened."""
    flat = escape_controls(" ".join(line.strip() for line in text.splitlines() if line.strip()))
    return shorten(_LONG_WORD.sub(lambda match: shorten(match[0], MAX_WORD), flat), MAX_MESSAGE)


def terminal_lines(text: str) -> str:
    """Return text of several lines for the terminal: without controls, long words of each line shortened."""
    return _LONG_WORD.sub(lambda match: shorten(match[0], MAX_WORD), escape_controls(text))


def quoted(value: object, limit: int = MAX_QUOTED) -> str:
    """Return a foreign value as a message quotes it: its repr, without controls, at most `limit` characters."""
    if isinstance(value, str) and len(value) > 4 * limit:
        value = shorten(value, 4 * limit)  # repr of a long text would be built first
    elif isinstance(value, dict | list | tuple | set) and len(value) > limit:
        return f"a {type(value).__name__} of {len(value)} entries"
    return shorten(escape_controls(repr(value)), limit)


def foreign(text: str, limit: int = MAX_QUOTED) -> str:
    """Return a foreign text as a message names it, without quotes: without controls, at most `limit` characters."""
    return shorten(escape_controls(" ".join(text[: 4 * limit + 1].split())), limit)
