"""Code in the answers of models: the block that is meant, without fences, prose, reasoning and prompts of a console."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from eval.tasks.strict import without_reasoning

_FENCE = re.compile(r"^([ \t]*(?:[-*+>]|\d{1,3}[.)])?[ \t]*)(`{3,}|~{3,})([^\n]*)(?:\n|\Z)", re.MULTILINE)
_FUNCTION = re.compile(r"^(?:async[ \t]+)?def[ \t]+(\w+)", re.MULTILINE)
_PYTHON = frozenset(("", "python", "python3", "py", "py3", "pycon", "ipython", "python-repl", "pyi"))
_CLOSINGS = 40
"""Fences that are tried as the end of a block."""
_FENCES = 400
"""Fences of an answer that are looked at."""


@dataclass(frozen=True)
class Block:
    """A fenced block: the language it names, "" for none, and its code."""

    language: str
    code: str


def answer_code(prompt: str, completion: str) -> str:
    """Return a completion without its reasoning; code that holds such marks itself is left alone."""
    return completion if is_python(prompt + completion) else without_reasoning(completion)


def unfenced(prompt: str, completion: str, names: Sequence[str] = ()) -> str:
    """Return the program that a completion means when code fences stand in it; without tests.

    A completion that goes on from the prompt as Python is code as it is, fences in its strings included. Otherwise the
    code is the first Python block that defines one of the functions asked for, with earlier blocks that only define
    others; else the first Python block, else the first block. A fence without a language behind text that is code
    closes: then that text is the code. The code follows `prompt`; where it defines the prompt's last function itself,
    only what stands before that function in the prompt (imports, helpers) is kept.

    Args:
        prompt: What the completion continues; "" where it stands alone.
        completion: The model's answer.
        names: Functions that tests call; the prompt's last function is one of them.
    """
    functions = list(_FUNCTION.finditer(prompt))
    names = [*names, *(match[1] for match in functions[-1:])]
    code = _code(prompt, completion, names)
    if functions and functions[-1][1] in defined(code):
        return f"{prompt[: functions[-1].start()]}\n{code}"
    if functions and _is_body(code) and not _is_body(prompt + textwrap.indent(code, "    ")):
        return prompt + textwrap.indent(code, "    ")
    return prompt + code


def _is_body(code: str) -> bool:
    """Return whether a text is Python but for a `return` or `yield` outside of functions."""
    if not is_python(code):
        return False
    try:
        compile(code, "<answer>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True
    return False


def _code(prompt: str, completion: str, names: Sequence[str]) -> str:
    if _FENCE.search(completion) is None or is_python(prompt + completion):
        return answer_code(prompt, completion)
    completion = without_reasoning(completion)
    before = _closed_code(prompt, completion)
    if before is not None:
        return before
    blocks = list(_blocks(prompt, completion))
    if not blocks:
        return completion
    python = [block for block in blocks if block.language in _PYTHON] or blocks
    for at, block in enumerate(python):
        if set(defined(block.code)) & set(names):
            helpers = [earlier.code for earlier in python[:at] if _only_defines(earlier.code)]
            return "\n".join([*helpers, block.code])
    ordered = [block for block in python if defined(block.code)] if not names else []
    return (ordered or [block for block in python if not block.code.lstrip().startswith(">>>")] or python)[0].code


def _closed_code(prompt: str, completion: str) -> str | None:
    """Return the code before a fence that closes it without one that opened it; None where there is none."""
    for fence in islice(_FENCE.finditer(completion), _CLOSINGS):
        before = completion[: fence.start()]
        if fence[3].strip():
            if not _unfinished_string(prompt + before):
                return None
            continue
        if before.strip() and is_python(prompt + before) and _does_something(before):
            return before
    return None


def _unfinished_string(text: str) -> bool:
    """Return whether a text ends within a triple-quoted string, as a fence in a docstring does."""
    return any(text.count(quotes) % 2 for quotes in ('"""', "'''"))


def _does_something(text: str) -> bool:
    """Return whether a text is more than names, which are Python and prose alike."""
    try:
        body = ast.parse(textwrap.dedent(text)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text[:1].isspace()
    return any(not isinstance(node, ast.Expr) or isinstance(node.value, ast.Call) for node in body)


def _blocks(prompt: str, completion: str) -> Iterator[Block]:
    """Yield the fenced blocks, each to the first fence of its kind behind which it is whole Python code.

    A fence within a docstring does not close the block it stands in. A block that is not closed reaches to the end.
    """
    fences = list(islice(_FENCE.finditer(completion), _FENCES))
    place = 0
    while place < len(fences):
        opening = fences[place]
        language = opening[3].strip().lower().partition(" ")[0].strip("{}.")
        closings = [
            at
            for at in range(place + 1, len(fences))
            if fences[at][2].startswith(opening[2]) and not fences[at][3].strip()
        ][:_CLOSINGS]
        parts = [(at, _dedented(completion[opening.end() : fences[at].start()], opening)) for at in closings]
        rest = _dedented(completion[opening.end() :], opening)
        if language in _PYTHON:
            whole = next(((at, code) for at, code in parts if is_python(code) or is_python(prompt + code)), None)
            if whole is None and is_python(rest):
                whole = len(fences), rest
        else:
            whole = None
        end, code = whole or (parts[0] if parts else (len(fences), rest))
        yield Block(language, _without_console(code))
        place = end + 1


def _dedented(code: str, opening: re.Match[str]) -> str:
    """Return the lines of a block without the indentation of its opening fence."""
    width = len(opening[1].expandtabs())
    if not width:
        return code
    lines = code.split("\n")
    return "\n".join(line[min(width, len(line) - len(line.lstrip(" \t"))) :] for line in lines)


def _without_console(code: str) -> str:
    """Return the input of a console session (`>>> `, `... `) without its output; other code as it is."""
    lines = code.split("\n")
    if not next((line for line in lines if line.strip()), "").startswith(">>>"):
        return code
    return "\n".join(line[4:] for line in lines if line.startswith((">>>", "..."))) + "\n"


def defined(code: str) -> list[str]:
    """Return the functions and classes that a program defines at its top level."""
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return [match[1] for match in _FUNCTION.finditer(code)]
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    names = [node.name for node in body if isinstance(node, kinds)]
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    return names + [target.id for target in targets if isinstance(target, ast.Name)]


def _only_defines(code: str) -> bool:
    """Return whether a program only imports and defines."""
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    return bool(body) and all(isinstance(node, kinds) for node in body)


def is_python(text: str) -> bool:
    """Return whether a text is a whole Python program."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences in a model's code
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
