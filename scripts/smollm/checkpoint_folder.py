"""A finished checkpoint folder of the real model's run: staged, renamed when whole, known by its record. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.errors import UsageError
from merging.output.staging.stage import replacing

RECORD = "training.json"


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a finished folder, or None where there is none."""
    path = folder / RECORD
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def base_name(base: Path) -> str:
    """Return the base's name from its own record, or its folder."""
    return str((read_record(base) or {}).get("base", base))


def is_finished(folder: Path, expected: dict[str, Any]) -> bool:
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


def save(model: Any, tokenizer: Any, target: Path, record: dict[str, Any]) -> None:
    """Write model, tokenizer and record to a folder beside `target`, then rename it to `target`."""
    with replacing(target) as staged:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        (staged / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for path in staged.iterdir():
            path.chmod(0o644)
