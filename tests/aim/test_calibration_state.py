"""Laws of a calibration's state: kept until its result stands, reported where it cannot be saved."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import aim.capture.hidden_states
import aim.capture.state
import aim.capture.whole_model
import aim.importance
from aim.calibration.config import Calibration
from aim.capture.hidden_states import HiddenStates
from aim.capture.state import Progress
from aim.capture.statistics import Sums
from aim.config import AimConfig
from aim.importance import Importance
from aim.measure import Settings
from aim.pipeline import relax
from common.errors import CalibrationError, UsageError
from common.files.safetensors_file import write_safetensors
from common.logging import logger
from common.processes.standard_streams import LossyStream, protect_standard_streams
from merging.output.staging import stage
from merging.plan.merge_plan import OutputConfig
from tests.merging.output.test_staging import in_a_child


def run(family, tmp_path: Path, file: Path | None, resume: bool = False, mode: str = "whole") -> Path:  # type: ignore[no-untyped-def]
    """Calibrate in a few batches and relax."""
    calibration = Calibration(str(family["text"]), n_samples=20, block_size=64)
    settings = Settings(calibration, file, batch_size=2, calibration_mode=mode, resume=resume)
    out = OutputConfig(tmp_path / "out", resume=resume, load_check=False)
    return relax(str(family["a"]), str(family["base"]), AimConfig((0.5,), settings), out, None)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "somewhere")


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the forward passes."""
    passes: list[int] = []
    real = aim.capture.whole_model.forward_arguments
    monkeypatch.setattr(aim.capture.whole_model, "forward_arguments", lambda *a: (passes.append(1), real(*a))[1])
    return passes


@pytest.mark.parametrize("has_file", [True, False])
def test_a_failure_at_the_end_loses_no_calibration(
    family, tmp_path: Path, monkeypatch, forwards: list[int], has_file: bool
) -> None:
    """Where the importance file, or without one the result, cannot be written after the last batch, --resume takes the
    whole calibration from its state; then nothing of that is left."""
    file = tmp_path / "importance" if has_file else None
    with monkeypatch.context() as patch:
        patch.setattr(aim.importance if has_file else stage, "write_safetensors" if has_file else "_publish", full)
        with pytest.raises(OSError, match="No space left") as stopped:
            run(family, tmp_path, file)
    place = tmp_path / (".importance.calibration" if has_file else ".out.calibration")
    assert any(f"The calibration is kept in {place}: the same command with" in note for note in stopped.value.__notes__)
    assert (place / "state.safetensors").is_file()
    assert forwards
    forwards.clear()
    out = run(family, tmp_path, file, resume=True)
    assert not forwards
    assert sorted(path.name for path in tmp_path.iterdir()) == (["importance", "out"] if has_file else ["out"])
    (tmp_path / "again").mkdir()
    undisturbed = run(family, tmp_path / "again", None)
    assert (out / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


def test_a_state_that_cannot_be_saved_is_reported(family, tmp_path: Path, monkeypatch, capsys, forwards) -> None:
    """A full disk at every saving is reported once, and the calibration goes on to the same importance."""
    monkeypatch.setattr(aim.capture.state, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(aim.capture.state, "write_safetensors", full)
    run(family, tmp_path, tmp_path / "importance")
    assert len(forwards) > 2
    assert capsys.readouterr().err.count("The state of the calibration cannot be saved") == 1
    monkeypatch.undo()
    (tmp_path / "again").mkdir()
    run(family, tmp_path / "again", tmp_path / "again" / "importance")
    assert (tmp_path / "importance").read_bytes() == (tmp_path / "again" / "importance").read_bytes()


def test_hidden_states_take_their_room_first(tmp_path: Path, monkeypatch) -> None:
    """On a full disk hidden states are refused with a sentence before they are mapped; else they come back as they
    were, and nothing has a name in the folder."""
    states = torch.arange(24, dtype=torch.bfloat16).view(2, 3, 4)
    hidden = HiddenStates(2, "disk", 0, tmp_path)
    hidden.put([1, 0], states)
    assert torch.equal(hidden.get([1, 0], torch.device("cpu")), states)
    assert list(tmp_path.iterdir()) == []
    hidden.close()
    monkeypatch.setattr(aim.capture.hidden_states.os, "posix_fallocate", full)
    with pytest.raises(CalibrationError, match=f"hidden states need .* GB in {tmp_path} .No space left"):
        HiddenStates(2, "disk", 0, tmp_path).put([0, 1], states)


MOST, NAMES = {"blocks": 8}, ("w", "v")
SUMS: dict[str, torch.Tensor] = {
    "0.sum.w": torch.ones(3, dtype=torch.float64), "0.tokens.w": torch.tensor(4),
    "1.sum.w": torch.ones(3, dtype=torch.float64), "1.tokens.w": torch.tensor(4),
}  # fmt: skip
DOUBLE = torch.float64


def saved_state(folder: Path, about: object, tensors: Mapping[str, torch.Tensor]) -> Progress:
    """Return the progress of a run that finds this state and is to resume it."""
    earlier = Progress(folder, "key")
    earlier.start(MOST, NAMES)
    metadata = {"about": about if isinstance(about, str) else json.dumps(about)}
    with earlier.file.open("wb") as stream:
        write_safetensors(stream, tensors, metadata)
    earlier.stop(KeyboardInterrupt())
    return Progress(folder, "key", resume=True)


def about(**changed: object) -> dict[str, object]:
    return {"key": "key", "axes": {"w": 0}, "position": {"blocks": 4}} | changed


@pytest.mark.parametrize(
    ("description", "tensors"),
    [
        ("[" * 100_000, {}), ("[]", {}), ("null", {}), (about(key=3), {}), (about(axes=[]), {}),
        (about(axes={"w": "0"}), {}), (about(position={"blocks": -1}), {}), (about(position={"blocks": 1.5}), {}),
        (about(position={"blocks": True}), {}), (about(position={"blocks": 9}), {}), (about(position={}), {}),
        (about(position={"blocks": 10**30}), {}), (about(axes={"stranger": 0}), {}),
        (about(axes={}), {}), (about(), {"x": torch.ones(1)}), (about(), {"2.sum.w": torch.ones(3, dtype=DOUBLE)}),
        (about(), {"-1.sum.w": torch.ones(3, dtype=DOUBLE), "-1.tokens.w": torch.tensor(1)}),
        (about(), {"0.mean.w": torch.ones(3)}), (about(), {"0.sum.w": torch.ones(3)}),
        (about(), {"0.sum.w": torch.ones(2, 2, 2, dtype=DOUBLE)}), (about(), {"0.tokens.w": torch.ones(3)}),
        (about(), {"0.sum.w": torch.ones(2, 3, dtype=DOUBLE)}), (about(), {"0.sum.w": torch.ones((), dtype=DOUBLE)}),
        (about(), {"\x1b[31m": torch.ones(1)}),
    ],
)  # fmt: skip
def test_a_state_of_odd_content_is_refused(
    tmp_path: Path, description: object, tensors: dict[str, torch.Tensor]
) -> None:
    """Descriptions and sums of other types, shapes, parameters or positions are one sentence, and the state stays."""
    progress = saved_state(tmp_path / "state", description, SUMS | tensors)
    before = progress.file.read_bytes()
    with pytest.raises(UsageError, match=r"^The interrupted calibration in .* without --resume\.$") as refused:
        progress.start(MOST, NAMES)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 300 + 2 * len(str(tmp_path))
    assert progress.file.read_bytes() == before


def test_a_whole_state_is_restored(tmp_path: Path) -> None:
    """The content that the cases of odd ones change is itself accepted."""
    sums, position, hidden = saved_state(tmp_path / "state", about(), SUMS).start(MOST, NAMES)
    assert {name: tensor.tolist() for name, tensor in sums.tensors().items()} == {
        n: t.tolist() for n, t in SUMS.items()
    }
    assert (position, hidden) == ({"blocks": 4}, {})


@pytest.mark.parametrize("kind", ["FIFO", "device", "folder", "link", "cut short", "empty", "other model"])
def test_a_state_that_is_none_is_refused(tmp_path: Path, kind: str) -> None:
    """A FIFO, a device, a folder, a link to a device, a part of a state and another safetensors file in the place of a
    state are a sentence with --resume, at once; without it they are removed, and what a link leads to stays."""
    progress = saved_state(tmp_path / "state", about(), SUMS)
    whole, file, other = progress.file.read_bytes(), progress.file, tmp_path / "model.safetensors"
    with other.open("wb") as stream:
        write_safetensors(stream, {"w": torch.ones(3)}, {})
    content = other.read_bytes()
    file.unlink()
    if kind == "FIFO":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind in ("device", "link", "other model"):
        file.symlink_to({"device": Path("/dev/zero"), "link": tmp_path / "nowhere", "other model": other}[kind])
    else:
        file.write_bytes(b"" if kind == "empty" else whole[:-9])
    with pytest.raises(UsageError, match=r"cannot be (read|used) .* without --resume\.$"):
        progress.start(MOST, NAMES)
    fresh = Progress(tmp_path / "state", "key")
    assert fresh.start(MOST, NAMES)[1] == {}
    fresh.save(Sums(), {"blocks": 1}, now=True)
    assert stat.S_ISREG(file.lstat().st_mode)
    assert other.read_bytes() == content


def test_hidden_states_of_other_blocks_are_refused(tmp_path: Path) -> None:
    """The hidden states that the next layer needs must be there, one for each block; none are where none are needed."""
    for hidden, needed, fits in (
        ({}, True, False), ({}, False, True), ({"states": torch.ones(3, 2)}, True, True),
        ({"states": torch.ones(2, 2)}, True, False), ({"states": torch.ones(3)}, True, False),
    ):  # fmt: skip
        progress = Progress(tmp_path / "state", "key")
        with nullcontext() if fits else pytest.raises(UsageError, match="hidden states of 3 blocks are needed"):
            progress.check_hidden(hidden, 3, needed)


@pytest.mark.parametrize(("first", "then"), [("whole", "layerwise"), ("layerwise", "whole")])
def test_a_calibration_is_resumed_in_its_mode(family, tmp_path: Path, monkeypatch, first: str, then: str) -> None:
    """Sums of some blocks in all layers are no part of sums of all blocks in some layers: the other mode is refused,
    and the mode that it was begun in goes on to the importance of an undisturbed run."""
    import aim.capture.layerwise

    module = aim.capture.whole_model if first == "whole" else aim.capture.layerwise
    with monkeypatch.context() as patch:
        patch.setattr(module, "reduce_over_ranks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(family, tmp_path, tmp_path / "importance", mode=first)
    with pytest.raises(UsageError, match=f"had --calibration_mode {first}; give that to resume it"):
        run(family, tmp_path, tmp_path / "importance", resume=True, mode=then)
    run(family, tmp_path, tmp_path / "importance", resume=True, mode=first)


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_our_safetensors_are_safetensors(tmp_path: Path) -> None:
    """What is written here is read by the library: names, dtypes, shapes, values and metadata; equal content, equal
    bytes."""
    from safetensors import safe_open

    tensors = {
        "b": torch.randn(3, 5), "a": torch.arange(4), "c": torch.randn(2, 2).bfloat16(), "e": torch.zeros(0, 3),
        "d": torch.randn(2, 3, dtype=torch.float64).T, "f": torch.tensor(True), "é": torch.tensor(7, dtype=torch.uint8),
    }  # fmt: skip
    for order in (list(tensors), sorted(tensors, reverse=True)):
        with (tmp_path / f"file{len(list(tmp_path.iterdir()))}").open("wb") as stream:
            write_safetensors(stream, {name: tensors[name] for name in order}, {"z": "1", "a": "é"})
    assert (tmp_path / "file0").read_bytes() == (tmp_path / "file1").read_bytes()
    with safe_open(tmp_path / "file0", "pt") as opened:
        assert opened.metadata() == {"z": "1", "a": "é"}
        assert set(opened.keys()) == set(tensors)
        assert all(torch.equal(opened.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_importance_survives_its_writing(tmp_path: Path) -> None:
    """A saved importance is loaded as it was, with the permissions of the umask, and nothing beside it."""
    saved = Importance({"w": torch.arange(3.0)}, {"w": 1}, {}, {}, {"name": "x", "fingerprint": "y"}, {"w": 4})
    before = os.umask(0o037)
    try:
        saved.save(tmp_path / "importance")
    finally:
        os.umask(before)
    assert (tmp_path / "importance").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["importance"]


# streams


def test_a_full_stderr_ends_nothing(tmp_path: Path) -> None:
    """Remarks and bars that cannot be written, to a full disk or a closed pipe, are dropped."""
    from tqdm import tqdm

    def broken_pipe() -> int:
        reading, writing = os.pipe()
        os.close(reading)
        return writing

    def write(handle: Callable[[], int]) -> None:
        os.dup2(handle(), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        protect_standard_streams()
        for _ in range(3):
            logger.warning("x" * 10_000)
        for _ in tqdm(range(3), mininterval=0):
            pass

    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    assert in_a_child(lambda: write(lambda: os.open("/dev/full", os.O_WRONLY))) == 0
    assert in_a_child(lambda: write(broken_pipe)) == 0


def test_closed_streams_are_not_taken_for_files(tmp_path: Path) -> None:
    """Where stdout and stderr are closed from the start, no file that is opened gets their numbers and messages."""

    def run() -> None:
        os.close(1)
        os.close(2)
        sys.stdout = sys.stderr = None  # type: ignore[assignment]
        protect_standard_streams()
        with (tmp_path / "file").open("w") as stream:
            assert stream.fileno() > 2
            logger.warning("a message")
            os.write(2, b"from C")
        assert isinstance(sys.stderr, LossyStream)
        os._exit(0 if (tmp_path / "file").read_bytes() == b"" else 5)

    assert in_a_child(run) == 0
