"""Reading small files and taking paths as users write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from console.errors import CheckpointError


def user_path(text: str) -> Path:
    """Return the path that a flag or YAML key gives, with ~ expanded."""
    return Path(text).expanduser()


def read_json(file: Path, missing: str) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError with the sentence `missing`, or naming a broken file."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(missing) from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}).") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} should hold a JSON object.")
    return data
