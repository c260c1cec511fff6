"""A finished checkpoint folder of the real model's run: staged, renamed when whole, known by its record. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UsageError
from common.files.paths import read_json
from merging.output.staging.stage import replacing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.files.json_values import JsonObject

RECORD = "training.json"


def read_record(folder: Path) -> JsonObject | None:
    """Return the record of a finished folder; None where there is none. Raises CheckpointError for a broken one."""
    path = folder / RECORD
    return read_json(path, "") if path.exists() else None


def base_name(base: Path) -> str:
    """Return the base's name from its own record, or its folder."""
    return str((read_record(base) or {}).get("base", base))


def is_finished(folder: Path, expected: JsonObject) -> bool:
    """Return whether `folder` holds this run. Raises UsageError where it holds another."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    record = read_record(folder)
    if record is None:
        raise UsageError(f"{folder} is not empty and holds no {RECORD}; pass --overwrite or another --save_path.")
    for key, value in expected.items():
        if record.get(key) != value:
            raise UsageError(
                f"{folder} holds a run with other settings ({key}: {record.get(key)!r}, asked for {value!r}); "
                f"pass --overwrite or another --save_path."
            )
    return True


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path, record: JsonObject) -> None:
    """Write model, tokenizer and record to a folder beside `target`, then rename it to `target`."""
    with replacing(target) as staged:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        (staged / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for path in staged.iterdir():
            path.chmod(0o644)
