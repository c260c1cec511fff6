"""The worked examples of docs/: their files are written into a copy of the repository and their commands are run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.evaluation import make_checkpoint
from tests.helpers.tiny import fine_tune, make_llama, write_texts

ROOT = Path(__file__).resolve().parent.parent
FILE = re.compile(r"^`([\w/.]+)`:\n\n```\S+\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of the files that git knows or would add."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    target = tmp_path / "copy"
    for name in names:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def execute(page: str, copy: Path) -> list[str]:
    """Write the files that a page names and run its commands in order; returns what each printed."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    files = FILE.findall(text)
    assert files
    for name, content in files:
        assert not (copy / name).exists(), name
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(content, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    printed = []
    for line in dict.fromkeys(line for block in SHELL.findall(text) for line in block.splitlines()):
        program, *arguments = shlex.split(line)
        assert program == "python", line
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-2000:])
        printed.append(done.stdout)
    return printed


def test_add_a_method(copy: Path) -> None:
    """The method of the page merges, passes the laws of every method, and enters the tables of the documents."""
    base = make_llama(copy / "BASE")
    for seed, name in enumerate("AB", start=1):
        fine_tune(base, copy / name, seed, std=0.02)
    printed = execute("add_a_method.md", copy)
    assert "lambda, multiplies the median" in " ".join(printed[0].split())
    assert (copy / "OUT" / "model.safetensors").is_file()
    assert printed[3].startswith(".....")
    assert "| `median` |" in (copy / "README.md").read_text(encoding="utf-8")
    assert ", median," in (copy / "docs" / "flags.md").read_text(encoding="utf-8").replace("| median |", ", median,")


def test_add_a_statistic(copy: Path) -> None:
    """The statistic of the page relaxes a model, and the lock names it."""
    fine_tune(make_llama(copy / "BASE"), copy / "MERGED", 1, std=0.02)
    write_texts(copy / "texts.jsonl")
    execute("add_a_statistic.md", copy)
    assert "mean_sqrt" in (copy / "OUT" / "merge.lock.json").read_text(encoding="utf-8")


def test_add_a_benchmark(copy: Path) -> None:
    """The benchmark of the page is a column of the tables; the entry for a stock task names a task of lm-eval."""
    make_checkpoint(copy / "MODEL")
    tables = execute("add_a_benchmark.md", copy)[1]
    assert "capitals" in tables
    from eval import benchmarks
    from eval.data.task_index import folders_for

    page = (ROOT / "docs" / "add_a_benchmark.md").read_text(encoding="utf-8")
    (entry,) = re.findall(r"^```python\n(Benchmark\(.*?)^```", page, re.DOTALL | re.MULTILINE)
    benchmark = eval(entry, {"Benchmark": benchmarks.Benchmark})
    (folder,) = folders_for([benchmark])
    assert any(f"task: {benchmark.task}\n" in file.read_text() for file in folder.glob("*.yaml"))
