"""Whether a finished folder loads in transformers: on the meta device, names and shapes, without its weights."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from console.errors import CheckpointError


def check_loads(folder: Path) -> str | None:
    """Load the folder with the class that its config names, on the meta device.

    Returns None where all is well, or a sentence on why it could not be tried. Raises CheckpointError where tensors are
    missing, unexpected or of another shape.
    """
    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    try:
        import transformers
    except ImportError as error:
        return f"Loading was not tried: transformers cannot be imported ({error})."
    cls: Any = getattr(transformers, names[0], None) if names else None
    if cls is None:
        what = names[0] if names else "the architecture, which config.json does not name,"
        return f"Loading was not tried: {what} is not in transformers {transformers.__version__}."
    with _quiet(transformers):
        try:
            _, found = cls.from_pretrained(folder, device_map="meta", output_loading_info=True)
        except Exception as error:
            text = " ".join(str(error).split())
            raise CheckpointError(f"The result does not load in transformers as {names[0]}: {text[:300]}.") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        wrong = sorted(str(key) for key in found.get(kind, ()))
        if wrong:
            what = kind.removesuffix("_keys")
            raise CheckpointError(
                f"The result does not load in transformers as {names[0]}: {what}: {', '.join(wrong[:3])}."
            )
    return None


class _quiet:
    """Keeps transformers from printing bars and remarks while it is asked."""

    def __init__(self, transformers: Any) -> None:
        self._logging = transformers.utils.logging

    def __enter__(self) -> None:
        self._bars = self._logging.is_progress_bar_enabled()
        self._level = self._logging.get_verbosity()
        self._logging.disable_progress_bar()
        self._logging.set_verbosity(logging.CRITICAL)

    def __exit__(self, *exception: object) -> None:
        self._logging.set_verbosity(self._level)
        if self._bars:
            self._logging.enable_progress_bar()
