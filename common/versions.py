"""The versions a result depends on."""

from __future__ import annotations

import importlib.metadata
import platform
import tomllib
from pathlib import Path

PACKAGES = {"torch": "torch", "transformers": "transformers", "lm_eval": "lm-eval", "datasets": "datasets"}


def versions() -> dict[str, str]:
    """Versions of the packages, of Python and of this project, by name; absent packages are left out."""
    found = {"python": platform.python_version(), "project": project_version()}
    for name, package in (*PACKAGES.items(), ("vllm", "vllm"), ("math_verify", "math-verify")):
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def project_version() -> str:
    """The version in pyproject.toml (the project is run from its folder, not installed)."""
    file = Path(__file__).resolve().parent.parent / "pyproject.toml"
    return str(tomllib.loads(file.read_text(encoding="utf-8"))["project"]["version"]) if file.is_file() else "unknown"
