"""Results of several ranks: the bytes of one process, and one end for all ranks."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import merge
import performAIM
from common.cli import run
from common.device import resolve_device
from common.distributed import ProcessGroup
from common.errors import UsageError
from merging.output.staging.partition import balance, partition
from tests.helpers.launching import Ended, Launch, by_accelerate, together
from tests.helpers.tiny import fine_tune, make_llama, train

VARYING = ("seconds", "made", "processes")
"""What the run records of two runs of one merge differ in."""


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; of a run record all but times and the number of processes."""
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for name in [name for name in found if name.endswith("run_record.json")]:
        record = json.loads(found[name])
        lasting = {key: value for key, value in record.items() if key not in VARYING}
        found[name] = json.dumps(lasting, sort_keys=True).encode()
    return found


def recipe(family: dict[str, Path], *flags: object) -> list[object]:
    """TIES of a and b."""
    models = f"{family['a']},{family['b']}"
    return ["--method", "ties", "--base_model", family["base"], "--models_to_merge", models, "--no-load_check", *flags]


def alone(script: str, *arguments: object) -> None:
    """Run a script in one process: this one."""
    assert run({"merge": merge, "performAIM": performAIM}[script].main, list(map(str, arguments))) == 0


def test_parts_are_contiguous_and_even() -> None:
    """Ranges cover a list once and in order, in any number; each sum is within one item of its share. Files are dealt
    so that no load exceeds the mean by more than the largest."""
    draw = random.Random(0)
    for _ in range(300):
        sizes = [draw.choice([0, 1, 5, 1000, draw.randrange(10**12)]) for _ in range(draw.randrange(40))]
        count = draw.randrange(1, 9)
        parts = partition(sizes, count)
        assert [i for part in parts for i in part] == list(range(len(sizes)))
        assert len(parts) == count
        share, most = sum(sizes) / count, max(sizes, default=0)
        assert all(abs(sum(sizes[i] for i in part) - share) <= most for part in parts)
        loads = [
            sum(s for s, owner in zip(sizes, balance(sizes, count), strict=True) if owner == r) for r in range(count)
        ]
        assert sum(loads) == sum(sizes)
        assert max(loads) <= share + most


@pytest.mark.parametrize(
    ("count", "flags"),
    [
        (2, ["--layer_stats"]),  # one file that both write
        (3, ["--max_shard_size", "40KB", "--dtype", "float32"]),  # files smaller than a part, cut elsewhere
        (3, ["--trim_scope", "model", "--density", "0.3", "--max_shard_size", "120KB"]),  # what needs all tensors first
    ],
)
def test_the_bytes_of_one_process(family, tmp_path: Path, capfd, count: int, flags: list[object]) -> None:
    """Every file of N processes is that of one: weights, index, lock, card; the run record but for times and N. What is
    said is what one process says, and said once."""
    alone("merge", *recipe(family, *flags), "--save_path", tmp_path / "one" / "out")
    said = capfd.readouterr()
    ended = together(tmp_path / "log", count, "merge", *recipe(family, *flags), "--save_path", tmp_path / "all" / "out")
    assert [end.code for end in ended] == [0] * count
    assert files(tmp_path / "all" / "out") == files(tmp_path / "one" / "out")
    assert [path.name for path in (tmp_path / "all").iterdir()] == ["out"]
    assert (ended[0].out, ended[0].err) == tuple(text.replace("/one/", "/all/") for text in said)
    assert all((end.out, end.err) == ("", "") for end in ended[1:])
    assert json.loads((tmp_path / "all/out/run_record.json").read_text())["processes"] == count


def test_more_processes_than_tensors(tmp_path: Path) -> None:
    """Of 4 processes on 2 tensors, some have nothing to write; the bytes are those of one."""
    torch.manual_seed(1)
    for name in ("base", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "none"}')
        save_file({f"{t}.weight": torch.randn(8, 8) for t in "pq"}, tmp_path / name / "model.safetensors")
    flags = ["--method", "task_arithmetic", "--base_model", tmp_path / "base", "--models_to_merge", tmp_path / "a"]
    flags += ["--no-load_check"]  # no architecture has these two tensors
    alone("merge", *flags, "--save_path", tmp_path / "one" / "out")
    ended = together(tmp_path / "log", 4, "merge", *flags, "--save_path", tmp_path / "all" / "out")
    assert [end.code for end in ended] == [0] * 4, ended
    assert files(tmp_path / "all" / "out") == files(tmp_path / "one" / "out")


def test_relaxed_by_several(family, tmp_path: Path) -> None:
    """performAIM.py calibrates and relaxes with several omegas in 2 processes; every folder has the bytes of one
    process that reads the importance which they measured."""
    flags = ["--merged_model", family["a"], "--pretrained_model_name", family["base"], "--omega", "0.2,0.6",
             "--calibration", family["text"], "--n_samples", "8", "--block_size", "64", "--no-load_check",
             "--importance", tmp_path / "base.imp", "--max_shard_size", "100KB"]  # fmt: skip
    ended = together(tmp_path / "log", 2, "performAIM", *flags, "--save_path", tmp_path / "all" / "out")
    assert [end.code for end in ended] == [0, 0], ended
    assert ended[0].err.count("Relaxed ") == 1
    assert ended[1].err == ""
    alone("performAIM", *flags, "--save_path", tmp_path / "one" / "out")
    found = files(tmp_path / "all" / "out")
    assert found == files(tmp_path / "one" / "out")
    assert {Path(name).parts[0] for name in found} == {"omega-0.2", "omega-0.6", "run_record.json"}


def test_an_adapter_relaxed_by_several(family, tmp_path: Path) -> None:
    """--save_as adapter: 2 processes measure and write; the bytes are those of one that reads what they measured."""
    train(family["base"], tmp_path / "lora")
    flags = ["--merged_model", f"{family['base']}+{tmp_path / 'lora'}", "--pretrained_model_name", family["base"],
             "--calibration", family["text"], "--n_samples", "8", "--block_size", "64", "--save_as", "adapter",
             "--importance", tmp_path / "base.imp", "--no-load_check"]  # fmt: skip
    ended = together(tmp_path / "log", 2, "performAIM", *flags, "--save_path", tmp_path / "all" / "out")
    assert [end.code for end in ended] == [0, 0], ended
    assert [end.err.count("Relaxed ") for end in ended] == [1, 0]
    alone("performAIM", *flags, "--save_path", tmp_path / "one" / "out")
    assert files(tmp_path / "all" / "out") == files(tmp_path / "one" / "out")


def test_accelerate_starts_several(family, tmp_path: Path) -> None:
    """`accelerate launch` of merge.py, from its first import: 2 processes, one result, said once."""
    done = by_accelerate(2, "merge.py", *recipe(family), "--save_path", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Merged 2 models") == 1
    assert json.loads((tmp_path / "out/run_record.json").read_text())["processes"] == 2


def test_merged_and_relaxed_by_several(family, tmp_path: Path) -> None:
    """merge.py --omega with a calibration: 2 processes measure, merge and relax in one pass, to the bytes of one that
    reads what they measured; the planned result was loaded once."""
    flags = [*recipe(family)[:-1], "--omega", "0.2,0.7", "--calibration", family["text"], "--n_samples", "8",
             "--block_size", "64", "--importance", tmp_path / "base.imp"]  # fmt: skip
    ended = together(tmp_path / "log", 2, "merge", *flags, "--save_path", tmp_path / "all" / "out")
    assert [end.code for end in ended] == [0, 0], ended
    alone("merge", *flags, "--save_path", tmp_path / "one" / "out")
    assert files(tmp_path / "all" / "out") == files(tmp_path / "one" / "out")


# one end for all


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A family of many tensors, and its merge by one process."""
    folder = tmp_path_factory.mktemp("long")
    base = make_llama(folder / "base", layers=16, hidden=192)
    found = {"base": base, "a": fine_tune(base, folder / "a", seed=1), "b": fine_tune(base, folder / "b", seed=2)}
    alone("merge", *recipe(found, *CUT), "--quiet", "--save_path", folder / "one" / "out")
    return {**found, "one": folder / "one" / "out"}


CUT = ("--max_shard_size", "1MB")


def stopped(ended: Sequence[Ended], rank: int) -> str:
    """The one sentence of the processes that another has stopped."""
    assert ended[rank].code == -signal.SIGKILL
    others = [end for i, end in enumerate(ended) if i != rank]
    assert {end.code for end in others} == {1}
    (error,) = [line for end in others for line in end.err.splitlines() if line.startswith("error: ")]
    assert not any("Traceback" in end.err for end in others)
    return error


@pytest.mark.parametrize(("count", "rank"), [(3, 1), (2, 0)])
def test_one_is_killed(long, tmp_path: Path, count: int, rank: int) -> None:
    """SIGKILL for one process in the middle: the others end by themselves, soon, with one sentence and exit code 1;
    there is no target and no file that loads. Another number of processes is refused --resume, said once; the same
    number goes on, keeps what was done, and ends with the bytes of one process."""
    command = [*recipe(long, *CUT), "--save_path", tmp_path / "out"]
    stage = tmp_path / ".out.partial"
    journals = [stage / f"journal-0-{r}.jsonl" for r in range(count)]
    launch = Launch(tmp_path / "log", count, "tests.helpers.slow_merge", *command)
    launch.until(lambda: all(j.exists() and j.read_bytes().count(b"\n") > 2 for j in journals))
    os.kill(launch.processes[rank].pid or 0, signal.SIGKILL)
    killed = time.monotonic()
    error = stopped(launch.ended(), rank)
    assert time.monotonic() - killed < 20
    assert error.startswith(f"error: Rank {rank} of {count} on {socket.gethostname()} died.")
    assert "--resume" in error
    assert not (tmp_path / "out").exists()
    for file in stage.glob("*.safetensors"):
        with pytest.raises(SafetensorError), safe_open(file, "pt"):
            pass
    other = together(tmp_path / "other", 5 - count, "merge", *command, "--resume")
    assert [end.code for end in other] == [2] * (5 - count)
    assert "".join(end.err for end in other).count(f"shared by {count} processes") == 1
    before = {journal.name: journal.read_bytes() for journal in journals}
    again = together(tmp_path / "again", count, "merge", *command, "--resume", "--debug")
    assert [end.code for end in again] == [0] * count, again
    done = sum(max(0, data.count(b"\n") - 1) for data in before.values())
    assert f"Resuming the interrupted run: {done} tensors are done." in again[0].err
    assert files(tmp_path / "out") == files(long["one"])
    assert not any(path.name.startswith(".out") for path in tmp_path.iterdir())


def test_one_is_killed_while_it_calibrates(family, tmp_path: Path) -> None:
    """The other ends with the sentence and leaves no importance; both go on with --resume, to the bytes of a run of two
    that was left alone."""
    flags = ["--merged_model", family["a"], "--pretrained_model_name", family["base"], "--no-load_check",
             "--calibration", family["text"], "--block_size", "64", "--batch_size", "1"]  # fmt: skip
    flags += ["--n_samples", "60"]
    command = [*flags, "--importance", tmp_path / "killed.imp", "--save_path", tmp_path / "killed"]
    launch = Launch(tmp_path / "log", 2, "performAIM", *command)
    launch.until(lambda: "Calibration on" in launch.said("err")[0])
    os.kill(launch.processes[1].pid or 0, signal.SIGKILL)
    error = stopped(launch.ended(), 1)
    assert error.startswith(f"error: Rank 1 of 2 on {socket.gethostname()} died.")
    assert "--resume" in error
    assert not (tmp_path / "killed").exists()
    assert not (tmp_path / "killed.imp").exists()
    for name, more in (("killed", ["--resume"]), ("left", [])):
        where = ["--importance", tmp_path / f"{name}.imp", "--save_path", tmp_path / name]
        ended = together(tmp_path / "log" / name, 2, "performAIM", *flags, *where, *more)
        assert [end.code for end in ended] == [0, 0], ended
    assert (tmp_path / "killed.imp").read_bytes() == (tmp_path / "left.imp").read_bytes()
    assert (tmp_path / "killed/model.safetensors").read_bytes() == (tmp_path / "left/model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "killed.imp", "left", "left.imp", "log"]


def test_the_run_is_terminated(long, tmp_path: Path) -> None:
    """SIGTERM for all of them, as a scheduler sends it: said once, exit code 130, and what is done stays."""
    launch = Launch(
        tmp_path / "log", 2, "tests.helpers.slow_merge", *recipe(long, *CUT), "--save_path", tmp_path / "out"
    )
    journals = [tmp_path / ".out.partial" / name for name in ("journal-0-0.jsonl", "journal-0-1.jsonl")]
    launch.until(lambda: all(j.exists() and j.read_bytes().count(b"\n") > 2 for j in journals))
    for process in launch.processes:
        process.terminate()
    ended = launch.ended()
    assert [end.code for end in ended] == [130, 130]
    assert "".join(end.err for end in ended).count("error: Interrupted.") == 1
    assert all(journal.exists() for journal in journals)


def test_one_that_computes_on_is_ended(tmp_path: Path) -> None:
    """A process that does not come to look whether others have ended is ended after a while, with the sentence."""
    ended = together(tmp_path / "log", 2, "tests.helpers.sleeper")
    assert [end.code for end in ended] == [1, -signal.SIGKILL]
    assert ended[0].err.startswith(f"error: Rank 1 of 2 on {socket.gethostname()} died. ")


def test_one_fails(family, tmp_path: Path) -> None:
    """What one process finds wrong it says, once; the others end silently with its exit code, and the stage is gone."""
    broken = shutil.copytree(family["b"], tmp_path / "b")
    weights = load_file(broken / "model.safetensors")
    last = sorted(weights)[-1]
    weights[last][-1] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    flags = ["--method", "linear", "--models_to_merge", f"{family['a']},{broken}", "--no-load_check", "--quiet"]
    ended = together(tmp_path / "log", 2, "merge", *flags, "--save_path", tmp_path / "out")
    assert [end.code for end in ended] == [1, 1]
    assert sorted(end.err for end in ended)[0] == ""
    assert sorted(end.err for end in ended)[1].startswith(f"error: Tensor {last} of the result is not finite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "log"]


@pytest.mark.parametrize(
    ("more", "said"),
    [(["--densty", "0.5"], "unknown argument '--densty'"), (["--density", "7"], "density")],
)
def test_errors_before_the_first_weight(family, tmp_path: Path, more: list[str], said: str) -> None:
    """A flag or recipe that cannot be is said once, and every process exits with code 2."""
    ended = together(tmp_path / "log", 3, "merge", *recipe(family, *more), "--save_path", tmp_path / "out")
    assert [end.code for end in ended] == [2, 2, 2]
    (line,) = "".join(end.err for end in ended).splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize("flags", [["--dry_run"], ["--help"]])
def test_plans_are_printed_once(family, tmp_path: Path, flags: list[str]) -> None:
    """--dry_run and --help are printed by the first process alone."""
    ended = together(tmp_path / "log", 2, "merge", *recipe(family), *flags)
    assert [end.code for end in ended] == [0, 0]
    assert ended[0].out
    assert (ended[1].out, ended[1].err) == ("", "")


def test_each_process_takes_a_gpu() -> None:
    """Several processes of a machine take a GPU each by their local number, and a number given for all is refused."""
    third = ProcessGroup(rank=2, world_size=4, local_rank=2)
    assert resolve_device("cpu", third) == torch.device("cpu")
    with pytest.raises(UsageError, match="4 ranks take a GPU each; leave out the number"):
        resolve_device("cuda:0", third)
    if torch.cuda.device_count() < 3:
        with pytest.raises(UsageError, match=r"--device cuda:2: this machine has \d CUDA devices"):
            resolve_device("cuda", third)
