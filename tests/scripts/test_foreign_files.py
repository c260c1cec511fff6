"""Files that users name to scripts: each reader refuses a broken one in a sentence, and waits for none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import ProjectError, UsageError
from common.files.bounded_reading import UnreadableError
from eval.data.dataset_revisions import MANIFEST, check_manifest, pinned
from eval.results.result import read_json_file
from eval.stats.hypervolume import read_rule
from scripts import verify
from scripts.plot_sweep import read_sweep, table
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


def write_sweep(folder: Path, record: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "run_record.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    "record",
    [
        [], {}, {"lineage": 3}, {"lineage": {}, "inputs": {}}, {"lineage": {"omega": [1]}, "inputs": {}},
        {"lineage": {"omega": 0.4}, "inputs": {}, "layer_statistics": [3]},
        {"lineage": {"omega": 0.4}, "inputs": {}, "layer_statistics": [{"layer": 3, "norms": [], "merged": 1.0}]},
        {"lineage": {"omega": 0.4}, "inputs": {}, "layer_statistics": [{"layer": "a", "norms": ["x"], "merged": 1}]},
    ],
)  # fmt: skip
def test_a_run_record_of_odd_types_is_no_sweep(record: object, tmp_path: Path) -> None:
    """Records of a sweep are refused by file and key before a figure is made of them."""
    with pytest.raises((ProjectError, UnreadableError), match=r"run_record\.json|no layer statistics"):
        read_sweep([write_sweep(tmp_path / "out", record)])


def test_a_sweep_is_of_one_model(tmp_path: Path) -> None:
    """Two omegas of other layers are no sweep; of the same ones they are."""
    row = {"layer": "model.layers.0", "norms": [2.0], "merged": 1.0}
    lineage, one = {"method": "ties"}, tmp_path / "one"
    write_sweep(one, {"lineage": lineage | {"omega": 0.4}, "inputs": {}, "layer_statistics": [row]})
    other = {"lineage": lineage | {"omega": 0.6}, "inputs": {}, "layer_statistics": [row]}
    assert table(read_sweep([one, write_sweep(tmp_path / "two", other)])).count("50.0 %") == 2
    other["layer_statistics"] = [row, row | {"layer": "model.layers.1"}]
    with pytest.raises(UsageError, match="has other layers than"):
        read_sweep([one, write_sweep(tmp_path / "two", other)])


def test_names_in_a_checkpoint_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What verify.py prints of an index has no control characters."""
    index = {"weight_map": {"a": "\x1b[31m\u202e" + "x" * 3000}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert verify.bad(verify.missing_files(tmp_path)[0], "parts")
    printed = capsys.readouterr().out
    assert "\\x1b[31m\\u202e" in printed
    assert printed.replace("\n", "").isprintable()
    assert len(printed) < 1000
