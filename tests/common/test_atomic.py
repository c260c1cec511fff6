"""Files that appear whole: writing beside a process that removes what killed ones left."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from common.errors import FailureError
from common.files import atomic
from common.files.atomic import PARTIAL, remove_leftovers, write_file
from common.files.locks import Lock

FILES = 400


def test_removal_of_leftovers_does_not_stop_a_writer(tmp_path: Path) -> None:
    """Ranks that remove leftovers lock the half-written files of the others for a moment; all files are written."""
    has_ended = threading.Event()

    def remove() -> None:
        while not has_ended.is_set():
            remove_leftovers(tmp_path)

    threads = [threading.Thread(target=remove) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(FILES):
            write_file(tmp_path / f"{number % 5}.json", str(number).encode())
    finally:
        has_ended.set()
        for thread in threads:
            thread.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{number}.json" for number in range(5)]
    assert (tmp_path / "4.json").read_bytes() == str(FILES - 1).encode()


def test_a_file_that_another_process_writes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that holds a file for longer than the wait keeps it, and the sentence names the file."""
    monkeypatch.setattr(atomic, "MOMENT", 0.05)
    lock = Lock.acquire(tmp_path / f".out.json{PARTIAL}")
    with pytest.raises(FailureError, match=r"out\.json is being written by .*; wait for it"):
        write_file(tmp_path / "out.json", b"{}")
    lock.release(remove=True)
    write_file(tmp_path / "out.json", b"{}")
