"""Files that users name to scripts: each reader refuses a broken one in a sentence, and waits for none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import ProjectError
from eval.data.dataset_revisions import MANIFEST, check_manifest, pinned
from eval.results.result import read_json_file
from eval.stats.hypervolume import read_rule
from scripts.smollm.checkpoint_folder import RECORD, read_record
from scripts.smollm.training_data import read_user_examples

READERS: dict[str, Callable[[Path], object]] = {
    "examples.jsonl": read_user_examples,
    RECORD: lambda file: read_record(file.parent),
    MANIFEST: lambda file: check_manifest(file.parent, file.parent / "hub", []),
    "pins.yaml": pinned,
    "population.yaml": lambda file: read_rule(str(file)),
    "figures.json": read_json_file,
}
BROKEN = {
    "cut short": b'{"a": ',
    "a key twice": b'{"a": 1, "a": 2}',
    "nested without end": b"[" * 100_000,
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", [*BROKEN, "a FIFO"])
def test_a_broken_file_is_one_sentence(name: str, kind: str, tmp_path: Path) -> None:
    """Whatever a file holds, and a pipe that nobody writes to, gives an error of one line that names the file."""
    file = tmp_path / name
    if kind in BROKEN:
        file.write_bytes(BROKEN[kind])
    else:
        os.mkfifo(file)
    with pytest.raises(ProjectError) as caught:
        READERS[name](file)
    message = str(caught.value)
    assert name in message
    assert "\n" not in message
