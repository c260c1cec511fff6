"""The flags about calibration text, for every script that measures importance, and what they ask for together."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from aim.calibration import Calibration

KEYS = ("calibration", "text_field", "n_samples", "block_size", "seed")


def add_calibration_flags(parser: argparse.ArgumentParser, seed: str = "seed") -> None:
    """Add the flags, None where they are not given. seed: what the flag of the shuffling is called."""
    group = parser.add_argument_group("calibration text")
    group.add_argument("--calibration", help="pile (mit-han-lab/pile-val-backup) or a local .jsonl or .txt file")
    group.add_argument("--text_field", help="of a .jsonl file's lines")
    group.add_argument("--n_samples", type=int, help="texts to keep")
    group.add_argument("--block_size", type=int, help="tokens per block; longer texts are dropped")
    group.add_argument(f"--{seed}", type=int, help="of the shuffling of the texts")


def calibration_of(given: Mapping[str, Any], seed: str = "seed") -> Calibration:
    """Return what parsed flags or a YAML's keys ask for, defaults where they are None or missing."""
    names = {"calibration": "source", seed: "seed"}
    asked = {names.get(k, k): given[k] for k in (*KEYS[:-1], seed) if given.get(k) is not None}
    calibration = Calibration(**asked)
    calibration.check()
    return calibration
