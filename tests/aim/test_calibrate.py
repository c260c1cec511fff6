"""Laws of calibration as a run: interrupted, out of memory, by several processes, in little memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from aim.calibration.config import Calibration
from aim.capture.base_model import Skeleton, load_whole
from aim.capture.layerwise import calibrate_layerwise
from aim.capture.state import Progress
from aim.capture.whole_model import BatchSize, calibrate
from aim.config import AimConfig
from aim.importance import Importance
from aim.measure import Settings
from aim.pipeline import relax
from common.distributed import ProcessGroup
from common.errors import CalibrationError, FailureError, UsageError
from merging.checkpoints.checkpoint import open_checkpoint
from merging.plan.merge_plan import OutputConfig
from tests.conftest import ROOT
from tests.helpers.launching import together
from tests.helpers.memory import STATUS
from tests.helpers.tiny import VOCABULARY, make_llama

CPU = torch.device("cpu")
WAYS = ("whole", "layerwise")


def blocks_of(n: int = 10) -> torch.Tensor:
    """Random blocks of 32 ids."""
    return torch.randint(3, VOCABULARY, (n, 32), generator=torch.Generator().manual_seed(1))


def run(base: Path, way: str, progress: Progress | None = None, batch_size: int = 2):  # type: ignore[no-untyped-def]
    """Calibrate in fp32 in one of the two ways."""
    checkpoint = open_checkpoint(str(base))
    more = {"batch_size": batch_size, "progress": progress}
    if way == "whole":
        return calibrate(load_whole(checkpoint, "float32", CPU), blocks_of(), **more)
    return calibrate_layerwise(Skeleton(checkpoint, "float32", CPU), blocks_of(), **more)


def same(one, other) -> bool:  # type: ignore[no-untyped-def]
    """Whether two calibrations have the same numbers, bit for bit."""
    equal = all(torch.equal(mean, other.means[name]) for name, mean in one.means.items())
    return equal and (one.tokens, one.stability) == (other.tokens, other.stability)


@pytest.mark.parametrize("way", WAYS)
def test_interrupted_calibration_goes_on(family, tmp_path: Path, monkeypatch, way: str, capsys) -> None:
    """Stopped after its third batch (in a layer, where it goes by layers), a calibration is saved; with resume it goes
    on from there and gives the numbers of an uninterrupted one bit for bit, and its state is gone at the end."""
    whole = run(family["base"], way)
    file = tmp_path / "state"
    forward = torch.nn.functional.scaled_dot_product_attention
    calls = 0

    def stopping(*args, **kwargs):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls == 7:  # 2 layers: the fourth batch of the whole model; the second of layer 1 by layers
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    first = Progress(file, "key")
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", stopping)
        with pytest.raises(KeyboardInterrupt) as stopped:
            run(family["base"], way, first)
    assert calls == 7
    first.stop(stopped.value)
    assert f"kept in {file}: the same command with --resume" in stopped.value.__notes__[0]
    resumed = run(family["base"], way, Progress(file, "key", resume=True))
    assert "Resuming the interrupted calibration" in capsys.readouterr().err
    assert same(resumed, whole)


def test_state_of_another_run_is_refused(family, tmp_path: Path) -> None:
    """A saved state of another base, text or dtype is refused with --resume, discarded without, and a state that is cut
    short is a sentence."""
    file = tmp_path / "state"
    progress = Progress(file, "one")
    run(family["base"], "whole", progress)
    sums, _, _ = progress.start({"blocks": 2}, ())
    progress.save(sums, {"blocks": 2}, now=True)
    with pytest.raises(FailureError, match="is writing the state of a calibration"):
        Progress(file, "one", resume=True).start({"blocks": 2}, ())
    progress.stop(KeyboardInterrupt())
    with pytest.raises(UsageError, match="had another base, text or settings"):
        Progress(file, "other", resume=True).start({"blocks": 2}, ())
    data = progress.file.read_bytes()
    progress.file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UsageError, match="cannot be read"):
        Progress(file, "one", resume=True).start({"blocks": 2}, ())
    again = Progress(file, "one")
    assert again.start({"blocks": 2}, ())[1] == {}
    again.clear()
    assert not file.exists()


@pytest.mark.parametrize("way", WAYS)
def test_killed_calibration_goes_on(family, tmp_path: Path, way: str) -> None:
    """Killed outright while it calibrates, performAIM.py leaves no output and no importance file; the same command with
    --resume ends with the importance and the weights of an undisturbed run, byte for byte, and clears what a saving
    that was killed half-way left."""
    base = make_llama(tmp_path / "base", hidden=96, layers=4)
    merged = make_llama(tmp_path / "merged", seed=1, hidden=96, layers=4)
    command = [
        "performAIM.py", "--merged_model", merged, "--pretrained_model_name", base, "--calibration", family["text"],
        "--n_samples", "60", "--block_size", "40", "--batch_size", "1", "--calibration_mode", way, "--no-load_check",
    ]  # fmt: skip
    slow = "import time, aim.capture.state, torch\naim.capture.state.EVERY_SECONDS = 0.0\n"
    slow += "import aim.capture.whole_model as c\nreal = c.forward_arguments\n"
    slow += "def slowly(*a):\n    time.sleep(0.1)\n    return real(*a)\nc.forward_arguments = slowly\n"
    slow += "import aim.capture.layerwise as l\nl.forward_arguments = slowly\n"
    start = f"import sys, runpy\nsys.path.insert(0, {str(ROOT)!r})\n{slow}sys.argv = sys.argv[1:]\n"
    start += "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    first = [sys.executable, "-c", start, *map(str, command), "--importance", tmp_path / "one", "--save_path",
             tmp_path / "out"]  # fmt: skip
    process = subprocess.Popen(list(map(str, first)), cwd=ROOT, stderr=subprocess.DEVNULL)
    state = tmp_path / ".one.calibration"
    deadline = time.monotonic() + 120
    while not (state / "state.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.exists()
    assert not (tmp_path / "one").exists()
    assert not (tmp_path / "out").exists()
    (state / ".state.safetensors.aim-partial").write_bytes(b"half")
    done = subprocess.run(
        [sys.executable, *map(str, command), "--importance", tmp_path / "one", "--save_path", tmp_path / "out",
         "--resume"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Resuming the interrupted calibration" in done.stderr
    calibration = Calibration(str(family["text"]), n_samples=60, block_size=40)
    aim = AimConfig((0.4,), Settings(calibration, tmp_path / "two", batch_size=1, calibration_mode=way))
    relax(str(merged), str(base), aim, OutputConfig(tmp_path / "again", load_check=False), None)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    assert not [file for file in tmp_path.iterdir() if "calibration" in file.name]


@pytest.mark.parametrize("way", WAYS)
def test_out_of_memory_takes_fewer_blocks(family, monkeypatch, capsys, way: str) -> None:
    """A batch that does not fit is taken again in halves, no block twice or never: token counts are exact, the numbers
    those of the smaller batches."""
    small = run(family["base"], way, batch_size=2)
    forward = torch.nn.functional.scaled_dot_product_attention

    def tight(query, *args, **kwargs):  # type: ignore[no-untyped-def]
        if len(query) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return forward(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", tight)
    found = run(family["base"], way, batch_size=5)
    assert found.tokens == small.tokens
    for name, mean in small.means.items():
        assert torch.allclose(found.means[name], mean, rtol=1e-6, atol=0), name


def test_one_block_that_does_not_fit(family, tmp_path: Path, monkeypatch) -> None:
    """Where even one block does not fit, a sentence says what to do, and nothing is written."""

    def never(*args, **kwargs):  # type: ignore[no-untyped-def]
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", never)
    aim = AimConfig((0.4,), Settings(Calibration(str(family["text"]), n_samples=40, block_size=64)))
    with pytest.raises(CalibrationError, match=r"one calibration block; .* --calibration_mode layer"):
        relax(str(family["a"]), str(family["base"]), aim, OutputConfig(tmp_path / "out"), None)
    assert not list(tmp_path.iterdir())


def test_other_errors_are_not_memory() -> None:
    """Only running out of memory makes a batch smaller; another error comes through as it is."""

    def broken(take: list[int]) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        BatchSize(4).run([1, 2, 3, 4], broken)


def test_real_memory_is_recognised() -> None:
    """What torch raises where the CPU's memory does not suffice is taken for that."""
    from common.hardware import ran_out

    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert ran_out(caught.value)
    assert not ran_out(RuntimeError("something else"))


def test_processes_do_not_matter(family, tmp_path: Path) -> None:
    """Two processes measure what one does: counts equal, activations to 1e-6, and one output; whole and by layers."""
    text = ["--calibration", family["text"], "--n_samples", "40", "--block_size", "64", "--batch_size", "3"]
    calibration = Calibration(str(family["text"]), n_samples=40, block_size=64)
    settings = Settings(calibration, tmp_path / "one.imp", calibration_dtype="float32", batch_size=3)
    output = OutputConfig(tmp_path / "one", load_check=False)
    relax(str(family["a"]), str(family["base"]), AimConfig((0.4,), settings), output, None)
    found = {"one": Importance.load(tmp_path / "one.imp")}
    for name, way in (("two", "whole"), ("layers", "layerwise")):
        command = ["--merged_model", family["a"], "--pretrained_model_name", family["base"], *text, "--importance",
                   tmp_path / f"{name}.imp", "--save_path", tmp_path / name, "--calibration_dtype", "float32",
                   "--calibration_mode", way, "--no-load_check"]  # fmt: skip
        ended = together(tmp_path / "log" / name, 2, "performAIM", *command)
        assert [end.code for end in ended] == [0, 0], ended
        assert [end.err.count("Relaxed ") for end in ended] == [1, 0]
        found[name] = Importance.load(tmp_path / f"{name}.imp")
    for name in ("two", "layers"):
        assert found[name].tokens == found["one"].tokens
        assert found[name].calibration["digest"] == found["one"].calibration["digest"]
        for key, a in found["one"].activations.items():
            tolerance = 1e-6 if name == "two" else 1e-5
            assert torch.allclose(found[name].activations[key], a, rtol=tolerance, atol=0), (name, key)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["log", *found, *(f"{name}.imp" for name in found)])


@pytest.mark.skipif(not STATUS.exists(), reason="memory is read from Linux's /proc")
def test_layerwise_memory_is_a_layer(tmp_path: Path) -> None:
    """The anonymous memory of a layerwise calibration does not grow with the number of layers: from 3 to 12 layers of
    6.7 MiB in fp32 (stored in bf16, so that they are widened), it moves by less than two of them."""
    found = []
    for layers in (3, 12):
        base = make_llama(tmp_path / f"{layers}", hidden=384, layers=layers)
        code = (
            "import sys, torch\nsys.path.insert(0, '.')\nfrom aim.capture.base_model import Skeleton\n"
            "from aim.capture.layerwise import calibrate_layerwise\n"
            "from merging.checkpoints.checkpoint import open_checkpoint\n"
            "from tests.helpers.memory import peak_of\n"
            f"base = open_checkpoint({str(base)!r})\n"
            "blocks = torch.randint(3, 320, (4, 64))\n"
            "skeleton = Skeleton(base, 'float32', torch.device('cpu'))\n"
            "print(peak_of(lambda: calibrate_layerwise(skeleton, blocks, batch_size=1, place='host')))\n"
        )
        # glibc would keep freed pieces of this size for later; those of real layers go back to the system
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        found.append(float(done.stdout))
    assert found[1] - found[0] < 2 * 6.7, found


def test_the_way_is_chosen_by_memory(family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to the program, the whole base is run where it fits with room to spare, else one layer at a time; what is
    asked for is done."""
    from aim import measure

    base = open_checkpoint(str(family["base"]))
    weights = sum(file.stat().st_size for file in base.files)
    chosen = {}
    for factor in (0.5, 1.1, 4.0):
        monkeypatch.setattr("common.hardware.available", lambda device, factor=factor: int(factor * weights))
        for way in ("auto", "whole", "layerwise"):
            settings = Settings(Calibration(), calibration_mode=way)
            chosen[factor, way] = measure.choose_calibration_mode(base, settings, CPU, "bfloat16", ProcessGroup())[0]
    assert [chosen[factor, "auto"] for factor in (0.5, 1.1, 4.0)] == ["layerwise", "layerwise", "whole"]
    assert {chosen[factor, "whole"] for factor in (0.5, 4.0)} == {"whole"}
    assert {chosen[factor, "layerwise"] for factor in (0.5, 4.0)} == {"layerwise"}
