"""Command lines of the cells: of the scripts as a user types them, and the parsers that check their flags."""

from __future__ import annotations

import os
import runpy
import shlex
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aim.omegas import omega_text
from common.cli import Parser

if TYPE_CHECKING:
    from scripts.experiments.schema import Flags

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "merge": "merge.py",
    "aim": "performAIM.py",
    "calibration": "scripts/importance.py",
    "evaluate": "evaluate_model.py",
    "family": "scripts/quickstart/family.py",
}
"""Section of the YAML: the script that its flags are of."""


@cache
def parser_of(section: str) -> Parser:
    """Return the parser of the script of a section."""
    if section == "merge":
        from merging.recipe.flags import make_parser

        return make_parser()
    if section == "aim":
        from aim.commands.relax_command import relax_parser

        return relax_parser()
    if section == "evaluate":
        from eval.commands.evaluate_flags import parser

        return parser()
    script_parser: Parser = script_functions(section)["parser" if section == "family" else "make_parser"]()
    return script_parser


@cache
def script_functions(section: str) -> Mapping[str, Callable[..., Any]]:
    """Return the names that the script of a section defines, from one execution of its file."""
    return runpy.run_path(str(ROOT / SCRIPTS[section]), run_name="cell")


def script_path(section: str) -> str:
    """Return the script as it is named from the current folder."""
    path = ROOT / SCRIPTS[section]
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def flag_words(flags: Flags) -> list[str]:
    """Return flags as words of a command line: True stands alone, False and None are left out, lists get commas."""
    words: list[str] = []
    for key, value in flags.items():
        if value is True:
            words.append(f"--{key}")
        elif value is not False and value is not None:
            text = ",".join(map(_text, value)) if isinstance(value, list | tuple) else _text(value)
            words += [f"--{key}={text}"] if text.startswith("-") else [f"--{key}", text]
    return words


def _text(value: object) -> str:
    return omega_text(value) if isinstance(value, float) else str(value)


def check_words(section: str, words: list[str]) -> None:
    """Raise UsageError where the script's own parser refuses the flags' values."""
    parser_of(section).parse_args(words)


def command_line(section: str, words: list[str]) -> str:
    """Return the command line of a cell, which can be copied into a shell."""
    return " ".join(map(shlex.quote, ["python", script_path(section), *words]))
