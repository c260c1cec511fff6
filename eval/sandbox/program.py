"""The process of the model-written program: runs it, then does what the tests ask of its objects."""

from __future__ import annotations

import builtins
import os
from typing import Any

from eval.sandbox.connection import PROGRAM_OPERATIONS, ConnectionLostError, Peer, write_message

MAX_DETAIL = 200


def describe_error(error: BaseException) -> str:
    """Return class and message of an error, short, whatever its own methods do."""
    try:
        text = str(error)
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text:.{MAX_DETAIL}}"


def run_program(program: str, seed: int, incoming: int, outgoing: int) -> None:
    """Execute the program in an empty namespace, report on it, and serve the tests; ends the process.

    Args:
        program: source code, compiled without future flags of this module.
        seed: seed of the `random` module, for programs that name it.
        incoming: descriptor that the tests' requests come from.
        outgoing: descriptor for replies.
    """
    namespace: dict[str, Any] = {}

    def describe_global(name: str) -> str:
        if name not in namespace:
            return "undefined"
        value = namespace[name]
        if type(value) is type(os):
            return f"module {value.__name__}"
        origin, qualified = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        return f"{origin}.{qualified}" if isinstance(origin, str) and callable(value) else "value"

    operations = {**PROGRAM_OPERATIONS, "global": namespace.__getitem__, "describe_global": describe_global}
    peer = Peer(incoming, outgoing, operations)
    try:
        if "random" in program:
            import random

            random.seed(seed)
        exec(compile(program, "<program>", "exec", dont_inherit=True), namespace)
    except BaseException as error:
        write_message(outgoing, ["failed", describe_error(error)])
        os._exit(0)
    try:
        write_message(outgoing, ["ready"])
        peer.serve()
    except ConnectionLostError:
        pass
    os._exit(0)


def add_site_builtins() -> None:
    """Define exit, quit and help, which the interpreter's start without site leaves out."""
    import _sitebuiltins

    for name in ("exit", "quit"):
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D"))
    builtins.help = _sitebuiltins._Helper()  # type: ignore[attr-defined]
