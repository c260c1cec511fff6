"""Limits of `Any` in the signatures of functions."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("common", "merging", "aim", "eval", "scripts")
MOST = 100
"""Functions with `Any` in a parameter or the result, nested functions and methods included."""


def has_any(annotation: ast.expr | None) -> bool:
    """`Any`, `typing.Any`, or either inside another type or a type in quotation marks."""
    return annotation is not None and "Any" in ast.unparse(annotation)


def annotations(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.expr | None]:
    a = function.args
    parameters = [*a.posonlyargs, *a.args, *a.kwonlyargs, *(p for p in (a.vararg, a.kwarg) if p)]
    return [function.returns, *(p.annotation for p in parameters)]


def count_signatures(source: str) -> int:
    """Number of the functions in a source text that have `Any` in their signature."""
    functions = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return sum(any(map(has_any, annotations(f))) for f in functions)


def test_counts_functions_not_mentions() -> None:
    """A function counts once, wherever its `Any` stands; variables and fields do not count."""
    source = """
import typing
from typing import Any
value: Any = 1
class Holder:
    field: Any
    def method(self, a: dict[str, Any], *args: Any) -> Any: ...
def nested() -> None:
    async def inner(**kwargs: "Any") -> None: ...
def positional(a: typing.Any, /, *, b: int) -> None: ...
def typed(a: list[int]) -> object: ...
"""
    assert count_signatures(source) == 3


def test_few_signatures_have_any() -> None:
    """A signature says what a function takes and returns; `Any` says nothing, and mypy checks nothing there."""
    counts = Counter[str]()
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            counts[str(file.relative_to(ROOT))] += count_signatures(file.read_text())
    assert counts.total() <= MOST, counts.most_common(10)
