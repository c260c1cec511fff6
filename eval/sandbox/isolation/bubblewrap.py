"""Command line of bubblewrap for the view of a program."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from eval.sandbox.isolation.namespaces import NOBODY
from eval.sandbox.view import DEVICES, WORK, View

PACKAGE = Path(__file__).resolve().parents[1]
SEPARATE = (
    "--unshare-user",
    "--unshare-ipc",
    "--unshare-pid",
    "--unshare-net",
    "--unshare-uts",
    "--unshare-cgroup-try",
)
CAPABILITIES = ("CAP_SYS_ADMIN", "CAP_SETPCAP")
"""Held inside the user namespace until the program's process has its own PID namespace."""


def is_installed() -> bool:
    """Return whether `bwrap` is on the PATH."""
    return shutil.which("bwrap") is not None


def wrap(command: Sequence[str], view: View, writable_bytes: int, sources: Path) -> list[str]:
    """Return `command` as bubblewrap runs it: new namespaces, a read-only view, a tmpfs of fixed size at /tmp.

    Args:
        command: interpreter and arguments; the interpreter is added to the view.
        view: paths to show.
        writable_bytes: size of the tmpfs.
        sources: repository root; `eval/__init__.py` and `eval/sandbox` are shown below it.
    """
    arguments = [*SEPARATE, "--die-with-parent", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    for capability in CAPABILITIES:
        arguments += ["--cap-add", capability]
    for path in (*view.folders, command[0], str(sources / "eval" / "__init__.py"), str(PACKAGE)):
        arguments += ["--dev-bind" if path in DEVICES else "--ro-bind", path, path]
    for path in view.masks:
        arguments += ["--tmpfs", path]
    for path in view.packages:
        arguments += ["--ro-bind", path, path]
    for path in view.masks:
        arguments += ["--remount-ro", path]
    arguments += ["--size", str(writable_bytes), "--tmpfs", WORK, "--chdir", WORK, "--remount-ro", "/"]
    return ["bwrap", *arguments, "--", *command]
