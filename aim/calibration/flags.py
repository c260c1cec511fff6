"""The flags about calibration text, for every script that measures importance, and what they ask for together."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from aim.calibration.config import KINDS, Calibration
from common.errors import UsageError
from common.files.json_values import JsonValue
from common.terminal_text import quoted

KEYS = ("calibration", "calibration_weights", "calibration_split", "text_field", "n_samples", "block_size", "seed")
"""Keys that flags and a YAML may give."""


def add_calibration_flags(parser: argparse.ArgumentParser, seed: str = "seed") -> None:
    """Add the flags, None where they are not given. seed: what the flag of the shuffling is called."""
    group = parser.add_argument_group("calibration text")
    group.add_argument(
        "--calibration",
        metavar="A,B",
        help=f"pile (mit-han-lab/pile-val-backup), hub data sets (org/name, org/name:config@revision), {KINDS} files, "
        f"folders of them; chats (messages) in the base's template (default: {Calibration.source})",
    )
    group.add_argument(
        "--calibration_weights", metavar="X,Y", help="share of each source in --n_samples (default: equal)"
    )
    group.add_argument(
        "--calibration_split", metavar="SPLIT", help="split of hub data sets (default: train; of pile, validation)"
    )
    group.add_argument(
        "--text_field", help=f"field with the text or chat (default: {Calibration.text_field}, else messages)"
    )
    group.add_argument("--n_samples", type=int, help=f"texts to keep (default: {Calibration.n_samples})")
    group.add_argument(
        "--block_size",
        type=int,
        help=f"tokens a block; longer texts are dropped (default: {Calibration.block_size})",
    )
    group.add_argument(f"--{seed}", type=int, help=f"seed of the shuffling of the texts (default: {Calibration.seed})")


def calibration_of(values: Mapping[str, JsonValue], seed: str = "seed") -> Calibration:
    """Return what parsed flags or a YAML's keys ask for, defaults where they are None or missing.

    Raises UsageError for values of another type, and as `Calibration.check` does.
    """
    names = {"calibration": "source", "calibration_weights": "weights", "calibration_split": "split", seed: "seed"}
    keys = [*KEYS[:-1], seed]
    arguments = {names.get(key, key): _value(key, values[key]) for key in keys if values.get(key) is not None}
    calibration = Calibration(**arguments)
    calibration.check()
    return calibration


def _value(key: str, value: JsonValue) -> Any:
    """A value in its type: numbers as they are, names as one text, weights as numbers."""
    if key == "calibration_weights":
        return _weights(value)
    listed = [value] if isinstance(value, str) else value
    if key in ("calibration", "calibration_split", "text_field"):
        if not isinstance(listed, (list, tuple)) or not all(isinstance(name, str) for name in listed):
            raise UsageError(f"{key} must be a name, or a list of names, found {quoted(value)}.")
        return tuple(listed) if key == "calibration" and len(listed) > 1 else ",".join(listed)
    return value


def _weights(value: JsonValue) -> tuple[float, ...]:
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    try:
        if any(isinstance(part, bool) for part in parts):
            raise TypeError
        return tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        raise UsageError(f"calibration_weights must be numbers, one per source, found {quoted(value)}.") from None
