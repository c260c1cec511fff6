"""Temporary folders of downloads."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.files.temporary import download_folder
from tests.conftest import ROOT


@pytest.mark.parametrize("prefix", [".fetch-", ".download-"])
def test_the_next_run_removes_the_folder_of_a_killed_one(prefix: str, tmp_path: Path) -> None:
    """A folder that SIGKILL left is removed with its content; that of a running process stays."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom common.files.temporary import download_folder\n"
        "with download_folder(Path(sys.argv[1]), sys.argv[2]) as folder:\n"
        "    (folder / 'half').write_text('x')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), prefix], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    (stale,) = tmp_path.iterdir()
    with download_folder(tmp_path, prefix) as first:
        assert not stale.exists()
        with download_folder(tmp_path, prefix) as second:
            assert first.is_dir()
            assert second.is_dir()
    assert list(tmp_path.iterdir()) == []
