"""The test process: executes a benchmark's tests, with the program's functions called in the other process.

Names resolve in this order: the function under test, what tests and prelude define, Python's built-ins, standard
modules that the program imported (this process's own copies), and last the program's other objects. So a program that
redefines `abs`, `sorted` or `math` does not change what the tests compare with.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import os
from collections.abc import Iterable
from typing import Any

from eval.sandbox.connection import OPERATIONS, ConnectionLostError, Peer, read_message
from eval.sandbox.program import describe_error

STANDARD = frozenset(
    (
        *("math", "cmath", "random", "copy", "string", "re", "itertools", "functools", "collections", "operator"),
        *("heapq", "bisect", "statistics", "datetime", "decimal", "fractions", "typing", "numbers", "time", "json"),
    )
)
"""Modules that the tests may use because the program imported them."""
ALIASES = {"np": "numpy", "numpy": "numpy", "pd": "pandas", "pandas": "pandas"}


class Namespace(dict[str, Any]):
    """Globals of the tests; names that they do not define are looked up as the module's docstring says."""

    def __init__(self, peer: Peer, entry_points: Iterable[str], tests: str) -> None:
        super().__init__()
        self._peer = peer
        self._entry_points = frozenset(entry_points)
        tree = ast.parse(tests)
        self._modules = {
            node.value.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }

    def __missing__(self, name: str) -> object:
        if name not in self._entry_points and hasattr(builtins, name):
            return getattr(builtins, name)
        origin = self._peer.ask("describe_global", name)
        if not isinstance(origin, str) or origin == "undefined":
            raise KeyError(name)
        if name not in self._entry_points:
            kind, _, module = origin.partition(" ")
            if kind != "module" or name in STANDARD:
                module = name  # another module, or another object, of that name would be the program's choice
            if (module in STANDARD and (kind == "module" or name in self._modules)) or ALIASES.get(name) == module:
                self[name] = importlib.import_module(module)
                return self[name]
            module, _, attribute = origin.rpartition(".")
            if module in STANDARD and attribute == name:
                self[name] = getattr(importlib.import_module(module), name)
                return self[name]
        return self._peer.ask("global", name)


def entry_points_of(tests: str) -> list[str]:
    """Return the names under test where the caller does not know them: built-in names, if the tests use no other.

    MBPP has functions called `sum` and the like; tests that call nothing but built-ins test the program's own.
    """
    tree = ast.parse(tests)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    defined = {n.id for n in names if isinstance(n.ctx, ast.Store)} | {
        n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))
    }
    free = {n.id for n in names if isinstance(n.ctx, ast.Load)} - defined
    if any(not hasattr(builtins, name) for name in free):
        return []
    return sorted({n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)})


def run_tests(
    incoming: int, outgoing: int, tests: str, prelude: str, entry_points: list[str] | None, seed: int
) -> tuple[str, str]:
    """Wait for the program, run the tests, and return status ("passed" or "failed") and detail.

    Args:
        incoming: descriptor of the program's messages.
        outgoing: descriptor for requests to it.
        tests: source code of the tests; empty where the program ends with its own.
        prelude: trusted code whose definitions the tests use (HumanEval's prompt).
        entry_points: names that always mean the program's objects; None where unknown.
        seed: seed of the `random` module, for tests that name it.

    Raises:
        ConnectionLostError: the program's process ended early or broke the protocol.
    """
    message = read_message(incoming)
    if message != ["ready"]:
        return "failed", str(message[1]) if isinstance(message, list) and len(message) == 2 else "malformed message"
    if not tests:
        return "passed", ""
    peer = Peer(incoming, outgoing, OPERATIONS)
    if "random" in tests:
        import random

        random.seed(seed)
    try:
        names = entry_points_of(tests) if entry_points is None else entry_points
        namespace = Namespace(peer, names, tests)
        if prelude:
            exec(compile(prelude, "<prompt>", "exec", dont_inherit=True), namespace)
        for name in names:
            namespace.pop(name, None)
        exec(compile(tests, "<tests>", "exec", dont_inherit=True), namespace)
    except ConnectionLostError:
        raise
    except BaseException as error:
        return "failed", describe_error(error)
    if peer.lost:
        raise ConnectionLostError(peer.lost)
    return "passed", ""


def exit_reason(pid: int, cpu_seconds: int) -> tuple[str, str]:
    """Wait for the program's process and return status and detail of an early end."""
    _, status, usage = os.wait4(pid, 0)
    used = usage.ru_utime + usage.ru_stime
    if os.WIFSIGNALED(status):
        if used >= cpu_seconds - 0.5:
            return "timed out", f"used more than {cpu_seconds} s of CPU time"
        return "failed", f"left before its end (signal {os.WTERMSIG(status)})"
    return "failed", f"left before its end (exit code {os.WEXITSTATUS(status)})"
