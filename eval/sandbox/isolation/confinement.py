"""Layers that bind one process for good: identity, capabilities, no_new_privs, Landlock, seccomp, resource limits."""

from __future__ import annotations

import os
import signal
import sys

from eval.sandbox.isolation import landlock, seccomp
from eval.sandbox.isolation.limits import Limits, set_limits
from eval.sandbox.isolation.namespaces import become_nobody
from eval.sandbox.isolation.syscalls import (
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    drop_bounding_set,
    drop_capabilities,
    prctl,
)
from eval.sandbox.view import WORK, View, is_open, is_public, readable_paths

LINUX = sys.platform == "linux"


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; nothing outside Linux."""
    if LINUX:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def confine(view: View, limits: Limits, has_own_root: bool, weak: bool) -> list[str]:
    """Give up every privilege of this process and return the layers that hold now.

    Args:
        view: paths that stay readable where the process sees the machine's root.
        limits: resource limits.
        has_own_root: the root is the sandbox's own, with a writable tmpfs; nothing is writable elsewhere.
        weak: leave out layers that the machine refuses, Landlock and seccomp among them.

    Raises:
        OSError: the machine refuses a layer that file access, processes or the network depend on.
    """
    layers: list[str] = []
    if LINUX:
        layers += _give_up_privileges(view, has_own_root, weak)
    set_limits(limits, writes=has_own_root)
    return [*layers, "resource limits"]


def _give_up_privileges(view: View, has_own_root: bool, weak: bool) -> list[str]:
    layers = ["no_new_privs", "no capabilities"]
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    drop_bounding_set()
    if is_open(view) if has_own_root else is_public(view):
        become_nobody()
    drop_capabilities()
    prctl(PR_SET_DUMPABLE, 0)
    die_with_parent()  # a change of identity clears it
    try:
        if has_own_root:
            landlock.restrict(("/",), (WORK, os.devnull))
        else:
            landlock.restrict(readable_paths(view), (os.devnull,), view.search_path)
        layers.append(f"Landlock {landlock.version()}")
    except OSError:
        if not has_own_root and not weak:
            raise
    try:
        seccomp.install(os.getpid(), has_own_root)
        layers.append("seccomp")
    except OSError:
        if not has_own_root and not weak:
            raise
    return layers
