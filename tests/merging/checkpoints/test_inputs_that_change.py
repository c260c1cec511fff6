"""Laws of inputs that change or end while they are read, of descriptors, and of repeated runs in one process."""

from __future__ import annotations

import gc
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from aim.calibration.config import Calibration
from aim.config import AimConfig
from aim.measure import Settings
from aim.pipeline import relax
from common.errors import CheckpointError
from common.files import temporary
from merging.checkpoints import storage
from merging.engine import loop
from merging.ops.kernels.build import library
from merging.ops.kernels.bus_errors import report_bus_errors
from merging.pipeline import merge
from tests.helpers.tiny import fine_tune, make_llama
from tests.merging.output.test_staging import in_a_child, output, recipe_of


@pytest.fixture
def copies(family, tmp_path: Path) -> dict[str, Path]:
    """Copies of the base and two models that a test may change."""
    return {name: shutil.copytree(family[name], tmp_path / "in" / name) for name in ("base", "a", "b")}


def rewrite(file: Path) -> None:
    file.write_bytes(file.read_bytes())


def replace_by_a_copy(file: Path) -> None:
    """Put another file of the same content and time under the name."""
    info = file.stat()
    copy = file.with_name("copy")
    shutil.copyfile(file, copy)
    os.utime(copy, ns=(info.st_atime_ns, info.st_mtime_ns))
    copy.rename(file)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "written again": (rewrite, "it was written again"),
    "replaced": (replace_by_a_copy, "another file took its name"),
    "longer": (lambda file: file.write_bytes(file.read_bytes() + b" "), "and has"),
    "gone": (lambda file: file.unlink(), "it is gone"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_input_is_noticed(copies, tmp_path: Path, monkeypatch, change: str, name: str) -> None:
    """An input that is changed after it was read is named with what changed, before anything is published."""
    from merging import pipeline

    act, sentence = CHANGES[change]
    real = pipeline.finalize

    def finished(*arguments):  # type: ignore[no-untyped-def]
        sentences = real(*arguments)
        act(copies["a"] / name)
        return sentences

    monkeypatch.setattr(pipeline, "finalize", finished)
    with pytest.raises(CheckpointError, match=f"{name} was changed during the run .*{sentence}"):
        merge(recipe_of(copies), output(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


def test_an_input_that_is_cut_short_is_a_sentence(copies, tmp_path: Path) -> None:
    """A file that loses its end before a tensor is read is named; the process is not ended by a signal."""

    def run() -> None:
        real = loop.group_of

        def cut(tensor, job):  # type: ignore[no-untyped-def]
            if tensor.name == "lm_head.weight":  # the first
                os.truncate(copies["b"] / "model.safetensors", 100)
            return real(tensor, job)

        loop.group_of = cut
        with pytest.raises(CheckpointError, match=r"b/model\.safetensors was changed during the run"):
            merge(recipe_of(copies), output(tmp_path / "out"))

    assert in_a_child(run) == 0
    assert not (tmp_path / "out").exists()


def test_a_mapped_file_that_is_cut_short_is_a_sentence(tmp_path: Path) -> None:
    """A read from a file that was cut after it was mapped ends the process with one sentence that names the file, and
    exit code 1; a bus error elsewhere stays one."""
    if library() is None:
        pytest.skip("no compiled kernels on this machine")
    file, said = tmp_path / "model.safetensors", tmp_path / "stderr"
    file.write_bytes(bytes(1 << 16))

    def run() -> None:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        report_bus_errors("Go on with --resume.")
        mapped = storage.map_file(file)
        os.truncate(file, 10)
        mapped[1 << 15]

    assert in_a_child(run) == 1
    assert said.read_text() == (
        f"error: {file} cannot be read any more: it was cut short during the run, or its disk fails. "
        "Go on with --resume.\n"
    )

    def elsewhere() -> None:
        report_bus_errors("")
        os.kill(os.getpid(), signal.SIGBUS)
        os.kill(os.getpid(), signal.SIGBUS)

    assert in_a_child(elsewhere) == -signal.SIGBUS


def test_descriptors_are_bounded(family, tmp_path: Path) -> None:
    """Inputs of more files than the process may have open are merged: maps, and their descriptors, are bounded."""
    base = make_llama(tmp_path / "base", layers=6, max_shard_size="10KB")
    models = [fine_tune(base, tmp_path / name, seed) for seed, name in enumerate("ab", 1)]
    for model in models:  # the same tensors in as many files
        from transformers import LlamaForCausalLM

        LlamaForCausalLM.from_pretrained(model, dtype="auto").save_pretrained(model, max_shard_size="10KB")
        (model / "model.safetensors").unlink()
    count = len(list(tmp_path.rglob("*.safetensors")))

    def run() -> None:
        opened = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 40, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        storage.most_maps.cache_clear()
        merge(recipe_of({"base": base, "a": models[0], "b": models[1]}), output(tmp_path / "out"))

    assert count > 80
    assert in_a_child(run) == 0
    assert (tmp_path / "out" / "config.json").is_file()


def footprint() -> tuple[int, int, int]:
    """Return descriptors, memory maps and resident KiB of this process."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0])
    return len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines()), resident


def temporary_files() -> set[str]:
    """Return the names in this process's temporary folder."""
    root = temporary._root
    return set() if root is None else {path.name for path in root[1].iterdir()}


@pytest.mark.parametrize(("kind", "times"), [("merge", 50), ("relaxation", 25), ("layerwise", 25)])
def test_runs_leave_nothing_in_the_process(family, tmp_path: Path, kind: str, times: int) -> None:
    """Repeated runs in one process: no descriptor, no memory map and no temporary file more, and no growing memory."""
    importance = tmp_path / "importance"

    def run() -> None:
        out = output(tmp_path / "out", overwrite=True)
        if kind == "merge":
            merge(recipe_of(family), out)
            return
        importance.unlink(missing_ok=True) if kind == "layerwise" else None
        calibration = Calibration(str(family["text"]), n_samples=20, block_size=64)
        way = "layerwise" if kind == "layerwise" else "whole"
        settings = Settings(calibration, importance, calibration_mode=way, hidden_states="disk")
        relax(str(family["a"]), str(family["base"]), AimConfig((0.5,), settings), out, None)

    for _ in range(10):
        run()
    before, temporary_before = footprint(), temporary_files()
    for _ in range(times - 10):
        run()
    after = footprint()
    assert after[0] <= before[0]
    assert after[1] <= before[1] + 10
    assert after[2] <= before[2] + 200 * (times - 10), (before, after)  # KiB a run: what allocators do
    assert sorted(path.name for path in tmp_path.iterdir()) in (["out"], ["importance", "out"])
    assert temporary_files() == temporary_before


def test_temporary_folders_of_the_dead_go(tmp_path: Path, monkeypatch) -> None:
    """The temporary folder of a killed process is removed by the next; that of a live one, and a stranger's, stays."""
    monkeypatch.setattr(temporary.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(temporary, "_root", None)

    def killed() -> None:
        (temporary.new_folder("x") / "file").write_text("x")
        os._exit(0)

    assert in_a_child(killed) == 0
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "activation-informed-merging-link").symlink_to(tmp_path / "elsewhere")
    mine = temporary.new_folder("mine")
    temporary.remove_stale(tmp_path)
    assert mine.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {mine.parent.name, "activation-informed-merging-link"}
    monkeypatch.undo()
