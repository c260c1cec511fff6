"""Decides whether tests can run in another process than the program they test."""

from __future__ import annotations

import ast
import builtins
import warnings
from collections.abc import Iterator

REFLECTION = frozenset(("exec", "eval", "compile", "globals", "locals", "vars", "__import__"))
FRAMEWORKS = frozenset(("unittest", "doctest", "pytest", "__main__"))


def obstacle(tests: str) -> str | None:
    """Return why tests must share the program's process, in a few words; None where they need not.

    They must where they use the program's classes as classes (bases, `isinstance`, `except`), its functions as
    decorators, context managers or coroutines, or where they read namespaces or source code.
    """
    tree = _parse(tests)
    if tree is None:
        return "they are no Python code on their own"
    defined = set(_definitions(tree))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if any(name.partition(".")[0] in FRAMEWORKS for name in modules):
                return f"they import {modules[0]}"
        if isinstance(node, (ast.Await, ast.AsyncFor, ast.AsyncWith, ast.AsyncFunctionDef)):
            return "they are asynchronous"
        if isinstance(node, ast.Name) and node.id in REFLECTION and node.id not in defined:
            return f"they use {node.id}"
        for part in _class_uses(node):
            for name in ast.walk(part):
                if isinstance(name, ast.Name) and name.id not in defined and not hasattr(builtins, name.id):
                    return f"they use {name.id} of the program as a class, decorator or context manager"
    return None


def _class_uses(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the expressions of a node that must be objects of the same process."""
    if isinstance(node, ast.ClassDef):
        yield from (*node.bases, *node.decorator_list)
    elif isinstance(node, ast.FunctionDef):
        yield from node.decorator_list
    elif isinstance(node, ast.ExceptHandler) and node.type is not None:
        yield node.type
    elif isinstance(node, ast.With):
        yield from (item.context_expr for item in node.items)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id in ("isinstance", "issubclass") and len(node.args) == 2:
            yield node.args[1]
        if node.func.id == "type" and len(node.args) == 3:
            yield node.args[1]


def _definitions(tree: ast.AST) -> Iterator[str]:
    """Yield the names that the code defines anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0]


def defined_names(code: str) -> tuple[str, ...] | None:
    """Return the functions and classes that code defines at its top level; None where it is no Python code."""
    tree = _parse(code)
    if tree is None:
        return None
    return tuple(n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)))


def _parse(code: str) -> ast.Module | None:
    """Return the syntax tree; None where the text is no Python code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escape sequences in a benchmark's code
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
