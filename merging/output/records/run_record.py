"""The record of a run: what was made of what, with which versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from common.errors import CheckpointError
from common.files.bounded_reading import UnreadableError
from common.files.json_types import Fields, ListOf, Maybe, OneOf, check_shape
from common.files.json_values import JsonObject, JsonValue
from common.files.paths import read_json
from common.versions import MERGING, versions
from merging.checkpoints.checkpoint import Checkpoint
from merging.output.staging.output_path import RECORD
from merging.plan.merge_plan import Lineage

RELAXATION_KEYS = ("statistic", "normalization", "control")
"""Keys of a lineage that say how a relaxation differs from the paper's AIM; absent where it does not."""
LINEAGE = Fields(
    {"method": Maybe(str), "base_model": Maybe(str), "models": ListOf(str), "omega": Maybe(OneOf((float, list)))},
    dict.fromkeys(RELAXATION_KEYS, str),
)
"""Types of the lineage in a run record."""


def write_record(folder: Path, lineage: Lineage, details: Mapping[str, JsonValue]) -> None:
    """Write the run record: what was made of what, with every effective parameter."""
    record = {
        "lineage": dict(lineage),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(MERGING),
        **details,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")


def read_lineage(checkpoint: Checkpoint) -> Lineage:
    """Return the lineage in a checkpoint's run record, or that of a checkpoint that was not merged here.

    Raises CheckpointError for a run record that lacks it.
    """
    folder = checkpoint.parts[-1].folder if len(checkpoint.parts) > 1 else checkpoint.folder  # an adapter has its own
    file = folder / RECORD
    unmerged: Lineage = {"method": None, "base_model": None, "models": [], "omega": None}
    if not file.is_file():
        return unmerged
    record = read_json(file, "")
    lineage = record.get("lineage")
    if not isinstance(lineage, dict) or lineage.keys() - set(RELAXATION_KEYS) != unmerged.keys():
        raise CheckpointError(f"{file} is not a run record of merge.py or performAIM.py; remove it to go on without.")
    try:
        check_shape(lineage, LINEAGE, str(file), "lineage")
    except UnreadableError as error:
        raise CheckpointError(f"{str(error).rstrip('.')}; remove it to go on without.") from error
    checked: Lineage = record["lineage"]
    return checked


def read_merge_recipe(checkpoint: Checkpoint) -> JsonObject | None:
    """Return the recipe in a checkpoint's run record; None for a checkpoint that was not merged here."""
    folder = checkpoint.parts[-1].folder if len(checkpoint.parts) > 1 else checkpoint.folder
    file = folder / RECORD
    recipe = read_json(file, "").get("recipe") if file.is_file() else None
    return recipe if isinstance(recipe, dict) else None
