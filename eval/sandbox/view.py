"""File system view of a program: paths that Python and its libraries need, and nothing of the user's."""

from __future__ import annotations

import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

PACKAGES = (
    *("numpy", "numpy.libs", "scipy", "scipy.libs", "pandas", "pandas.libs", "dateutil", "six.py", "pytz", "tzdata"),
    *("sympy", "mpmath", "networkx", "regex", "sortedcontainers", "typing_extensions.py"),
)
"""Installed packages that programs may import, where they are installed; no package with benchmark data."""
SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
WORK = "/tmp"
PACKAGE_FOLDERS = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class View:
    """Paths of the view.

    Attributes:
        folders: files and folders that are readable.
        masks: folders below them that appear empty.
        packages: files and folders inside the masks that are readable.
        search_path: the program's sys.path.
    """

    folders: tuple[str, ...]
    masks: tuple[str, ...]
    packages: tuple[str, ...]
    search_path: tuple[str, ...]


def view_of(prefix: str, base_prefix: str) -> View:
    """Return the view for the running version of Python.

    Args:
        prefix: `sys.prefix`, whose site-packages programs may use.
        base_prefix: `sys.base_prefix`, which has the standard library.
    """
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    platform = sysconfig.get_config_var("platlibdir") or "lib"
    libraries = list(dict.fromkeys((f"{base_prefix}/lib", f"{base_prefix}/{platform}")))
    standard = [f"{folder}/{version}" for folder in libraries if os.path.isdir(f"{folder}/{version}")]
    search_path = [path for folder in standard for path in (folder, f"{folder}/lib-dynload")]
    site = f"{prefix}/lib/{version}/site-packages"
    packages = tuple(f"{site}/{name}" for name in PACKAGES if os.path.exists(f"{site}/{name}"))
    folders = [path for path in dict.fromkeys((*libraries, *SYSTEM, *DEVICES)) if os.path.exists(path)]
    masks = [
        f"{folder}/{name}"
        for folder in (*standard, *(f"{library}/python3" for library in libraries), "/usr/lib/python3")
        for name in PACKAGE_FOLDERS
        if os.path.isdir(f"{folder}/{name}")
    ]
    return View(tuple(folders), tuple(dict.fromkeys(masks)), packages, (*search_path, site))


def is_open(view: View) -> bool:
    """Return whether every user may read the view's folders of Python, once it is shown; a umask of 077 closes them."""
    paths = [Path(path) for path in (*view.search_path, *view.packages)]
    return all(path.stat().st_mode & 0o004 for path in paths if path.exists())


def is_public(view: View) -> bool:
    """Return whether every user may reach the folders of Python and of this project; those below /root are closed."""
    paths = (*view.search_path, str(Path(__file__).parent))
    folders = {parent for path in paths for parent in (Path(path), *Path(path).parents)}
    return is_open(view) and all(folder.stat().st_mode & 0o001 for folder in folders if folder.exists())


def readable_paths(view: View) -> list[str]:
    """Return the view as paths for Landlock, which knows no exceptions: a folder with a mask becomes its entries."""
    paths: list[str] = [*view.packages]
    masks = {os.path.realpath(m) for m in view.masks}
    pending = list(view.folders)
    while pending:
        path = pending.pop()
        real = os.path.realpath(path)
        if real in masks:
            continue
        if any(m.startswith(real + os.sep) for m in masks):
            pending += [str(entry) for entry in Path(real).iterdir()]
        else:
            paths.append(path)
    return paths
