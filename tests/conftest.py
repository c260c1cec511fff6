"""Fixtures shared by the tests: a family of tiny real Llamas, and how to run the scripts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a hub; a missing file is then an error at once
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each process that a test starts would compile the project again

import pytest

from tests.helpers import forked
from tests.helpers.tiny import fine_tune, make_llama, write_texts

ROOT = Path(__file__).resolve().parent.parent
sys.dont_write_bytecode = False


LONGEST = ("test_experiments.py", "test_architectures.py", "test_torture.py", "test_worked_examples.py",
           "test_presets.py", "test_inputs_that_change.py", "test_merge_processes.py", "test_fuzz.py")  # fmt: skip
"""Files that run first, so that of several pytest workers none is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bf16 base, three fine-tuned models a, b, c of its shape, and calibration text."""
    folder = tmp_path_factory.mktemp("family")
    base = make_llama(folder / "base")
    tuned = {name: fine_tune(base, folder / name, seed=i) for i, name in enumerate("abc", 1)}
    return {"base": base, **tuned, "text": write_texts(folder / "text.jsonl")}


@pytest.fixture(scope="session")
def run_script():  # type: ignore[no-untyped-def]
    """Run a script from the repository root as a user does; returns the finished process with its text."""
    forked.server()  # before a test changes the environment
    return forked.run_script


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror with a few made items of every benchmark."""
    from tests.helpers.evaluation import make_data  # loads lm-eval, which a machine that only tests its GPU may lack

    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny real Llama of 512 positions with its tokenizer."""
    from tests.helpers.evaluation import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny")
