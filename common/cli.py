"""Command lines: parse flags, run a script's main function, print errors as one sentence, return the exit code."""

from __future__ import annotations

import argparse
import atexit
import errno
import gc
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import NoReturn

from common.errors import DISK_FULL, FailureError, ProjectError, UsageError, nearest
from common.files.bounded_reading import UnreadableError
from common.files.json_values import JsonObject, JsonValue
from common.logging import message_level
from common.processes.interrupts import Terminated, handle_stop_signals, ignore_stop_signals
from common.processes.standard_streams import protect_standard_streams
from common.terminal_text import foreign, message_line

WRITING = (*DISK_FULL, errno.EFBIG, errno.EROFS)
"""Errors of writing alone."""


class Formatter(argparse.HelpFormatter):
    """Help with a short usage line, and for each flag with a value its default or "(required)"."""

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[argparse._MutuallyExclusiveGroup],
        prefix: str | None = None,
    ) -> None:
        """Print only required arguments; the groups list the others."""
        if usage is None:
            required = [action for action in actions if action.required or not action.option_strings]
            words = " ".join(self._format_usage(None, required, [], "").split())
            usage = f"{words} [flags]".replace("%", "%%")
        super().add_usage(usage, actions, groups, prefix)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        takes_value = bool(action.option_strings) and action.nargs != 0
        if re.search(r"\((default|no default|required)", text) or not takes_value:
            return text
        if action.required:
            return f"{text} (required)"
        if action.default is None or action.default == [] or action.default == "":
            return f"{text} (default: none)"
        return f"{text} (default: %(default)s)"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Fill paragraphs of a program's description; keep each line of a group's (a list) on its own."""
        if "\n" not in text:
            return super()._fill_text(text, width, indent)
        if not indent:
            return "\n\n".join(textwrap.fill(paragraph, width) for paragraph in text.split("\n\n"))
        return "\n".join(
            textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent + " " * 18)
            for line in text.splitlines()
        )


class Parser(argparse.ArgumentParser):
    """argparse with one-sentence errors, the nearest known flag, and `--a-b` read as `--a_b`."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", Formatter)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def format_help(self) -> str:
        """Return the help; in one with groups, the flags of no group come last, as "general"."""
        plain = self._optionals
        named = [group for group in self._action_groups if group not in (self._positionals, plain)]
        if not any(group._group_actions for group in named):
            return super().format_help()
        order, title = self._action_groups, plain.title
        self._action_groups = [self._positionals, *named, plain]
        plain.title = "general"
        try:
            return super().format_help()
        finally:
            self._action_groups, plain.title = order, title

    def error(self, message: str) -> NoReturn:
        """Raise a UsageError that says how to list the flags."""
        raise UsageError(f"{message.rstrip('.')} (`python {self.prog} --help` lists the flags).")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse flags spelled with dashes or underscores, and values that begin with a minus sign."""
        flags = [flag for action in self._actions for flag in action.option_strings]
        argv = with_negative_values([underscored(a, flags) for a in (sys.argv[1:] if args is None else args)])
        parsed, rest = self.parse_known_args(argv, namespace)
        if rest:
            unknown = next((word for word in rest if word.startswith("-")), rest[0])
            self.error(f"unknown argument {unknown!r}.{nearest(unknown, flags)}")
        return parsed


def value_flags(parser: argparse.ArgumentParser) -> set[str]:
    """Return the long flags of a parser that take a value."""
    return {flag for action in parser._actions if action.nargs != 0 for flag in action.option_strings}


def config_values(
    parser: argparse.ArgumentParser, config: Mapping[str, JsonValue], left_out: Collection[str]
) -> JsonObject:
    """Return a YAML's keys as the values of a parser's flags of the same names.

    Args:
        parser: its flags, without their dashes, are the keys.
        config: the YAML's content.
        left_out: flags that a file cannot give.

    Raises:
        UsageError: for a key that is no flag, or a value of another type than its flag takes.
    """
    flags = {action.dest: action for action in parser._actions if action.dest not in left_out}
    for key, value in config.items():
        if key not in flags:
            raise UsageError(f"--config: {key!r} is no flag of {parser.prog}.{nearest(key, flags)}")
        action = flags[key]
        expected = None
        if action.nargs == 0:
            expected = None if isinstance(value, bool) else "true or false"
        elif action.type is int:
            expected = None if type(value) is int else "a whole number"
        elif action.choices is not None:
            expected = None if value in action.choices else f"one of {', '.join(map(str, action.choices))}"
        elif isinstance(value, Mapping):
            expected = "a value, not keys and values"
        if expected and value is not None:
            raise UsageError(f"--config: {key} must be {expected}, found {value!r}.")
    return {key: value for key, value in config.items() if value is not None}


def underscored(argument: str, flags: Collection[str] = ()) -> str:
    """Spell a long flag with underscores, as the original scripts do: `--save-path=x` -> `--save_path=x`.

    `--no-X` negates the flag --X, unless --no_X is itself among `flags`.
    """
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    if flag.startswith("--no-") and "--" + flag[2:].replace("-", "_") not in flags:
        return flag[:5] + flag[5:].replace("-", "_") + equals + value
    return "--" + flag[2:].replace("-", "_") + equals + value


def with_negative_values(argv: Sequence[str]) -> list[str]:
    """Join `--weights -0.5,1` into `--weights=-0.5,1`, which argparse would take for two flags."""
    joined: list[str] = []
    for argument in argv:
        if re.match(r"-[\d.]", argument) and joined and re.fullmatch(r"--\w+", joined[-1]):
            joined[-1] += "=" + argument
        else:
            joined.append(argument)
    return joined


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """The flags every script has."""
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no remarks; errors still print")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run `main(argv)`; turn errors into one sentence on stderr and an exit code (2 usage, 1 failure)."""
    if (reason := unsupported_platform(sys.platform)) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    if argv is None:
        protect_standard_streams()
        handle_stop_signals()
        tune_gc()
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        _check_current_folder()
        with message_level("--quiet" in arguments):
            code = main(arguments) or 0
        _flush_stdout()
        return code
    except BrokenPipeError:
        _drop_stdout()
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        sentence, code = explain(error)
        notes = getattr(error, "__notes__", [])
        if sentence or notes:  # empty where another rank has printed the error
            parts = [f"error: {sentence}" if sentence else "", *notes]
            print(" ".join(message_line(part) for part in parts if part), file=sys.stderr)
        return code
    finally:
        if argv is None:
            ignore_stop_signals()
            try:
                sys.stdout.flush()
            except (OSError, ValueError):
                _drop_stdout()


def _check_current_folder() -> None:
    """Raise UsageError where the current folder no longer exists, which breaks relative paths and child processes."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageError("The current folder was removed; change to a folder that exists and start again.") from None


def _flush_stdout() -> None:
    """Write what stdout has buffered. Raises FailureError where that fails, BrokenPipeError where the reader ended."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise FailureError(
            f"Standard output cannot be written ({error.strerror}); what was printed is lost."
        ) from error


def _drop_stdout() -> None:
    """Lead stdout to /dev/null: the rest of its buffer must not raise again at the interpreter's exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def unsupported_platform(platform: str) -> str | None:
    """Return why the programs do not run on a platform (`sys.platform`), None where they do."""
    if platform in ("win32", "cygwin"):
        return (
            "Windows is not supported: file locks, atomic replacement of folders and limits of child processes are "
            "those of Linux and macOS; run this under WSL 2."
        )
    return None


def tune_gc() -> None:
    """Collect garbage less often and not at exit, since importing torch creates about a million permanent objects."""
    gc.set_threshold(100_000, 20, 100)
    atexit.register(gc.freeze)


def _path(error: OSError) -> str:
    """Return the file of an error, whose name may be a stranger's text.

    Of two files, as of a copy on a full disk, the second is the one that is written.
    """
    name = error.filename if error.filename2 is None or error.errno not in WRITING else error.filename2
    return foreign(os.fsdecode(name) if isinstance(name, bytes) else str(name), 300)


def explain(error: BaseException) -> tuple[str, int]:
    """Return one sentence for an error, and its exit code."""
    if isinstance(error, ProjectError):
        return str(error), error.exit_code
    if isinstance(error, UnreadableError):
        return str(error), 1
    if isinstance(error, Terminated):
        return f"Stopped by {error.name}.", 128 + error.number
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted.", 130
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        where = f" while writing {_path(error)}" if error.filename else ""
        return f"No space left on the device{where}.", 1
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {_path(error)}' if error.filename else ''}.", 1
    text = " ".join(str(error).split())
    return f"Unexpected {type(error).__name__}: {text}. Run again with --debug for the traceback.", 1
