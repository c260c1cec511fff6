"""Version of this project, its git commit, and the versions of packages that a result depends on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

VERSION = "0.2.0"
"""Version of the project."""
ROOT = Path(__file__).resolve().parent.parent
MERGING = ("torch", "transformers", "safetensors", "numpy")
"""Packages that a merge, a relaxation or an importance file depends on."""
EVALUATION = ("torch", "transformers", "lm-eval", "datasets", "vllm", "math-verify")
"""Packages that an evaluation depends on."""
UNKNOWN = "unknown"


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """Return {name: version} of the project, Python and the installed ones of `packages`, dashes as underscores."""
    installed = {package.replace("-", "_"): _version_of(package) for package in packages}
    return {
        "project": VERSION, "python": platform.python_version(),
        **{name: version for name, version in installed.items() if version is not None},
    }  # fmt: skip


@cache
def _version_of(package: str) -> str | None:
    """Return the version of a package, None where it is not installed; the metadata of all packages is searched."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return `package_versions` with the project's commit, where it runs from a checkout."""
    commit = commit_of(ROOT)
    return {**package_versions(packages), **({"commit": commit} if commit else {})}


def project_line() -> str:
    """Return the project's name, version and commit for a model card."""
    commit = commit_of(ROOT)
    return f"activation-informed-merging {VERSION}{f', commit {commit}' if commit else ''}"


@cache
def commit_of(folder: Path) -> str | None:
    """Return the commit of a checkout, ending in "-dirty" where tracked files differ from it.

    None for a folder that is no checkout; "unknown" where git is missing or does not answer.
    """
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    # variables such as GIT_DIR, which git hooks set, name another repository
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            command, env={**env, "GIT_OPTIONAL_LOCKS": "0"}, capture_output=True, text=True, timeout=10,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else UNKNOWN
