"""The benchmark of growth runs whole on small checkpoints and reports its measurements."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from common.errors import FailureError, UsageError
from scripts.benchmarks import bench_growth
from scripts.benchmarks.bench_growth import Step, shortage, steps_of
from scripts.benchmarks.bench_memory import SHAPES
from scripts.benchmarks.bench_merge import Bench, machine
from scripts.benchmarks.growth_report import as_text, by_axis, fitted, read_growth


def point(axis: str, x: float, wall: float, method: str = "ties", cached: bool = True) -> dict[str, Any]:
    """A made point that read ten bytes for each unit of x."""
    cost = {"wall": wall, "least": wall, "most": wall, "cpu": wall, "anonymous_mib": 500, "runs": 1}
    size = int(10 * x)
    return {
        "axis": axis,
        "x": x,
        "method": method,
        "shape": "tiny",
        "models": 3,
        "processes": 1,
        "cached": cached,
        "amounts": {"read": size, "written": size},
        "cost": cost,
    }


def test_whole_benchmark(tmp_path: Path, run_script) -> None:
    """As a user runs it: each point is in the JSON with its bytes and its cost, the plot is there, the table is
    printed; a second run with --add keeps the points and adds its own; --discard leaves no checkpoint."""
    kept, drawn = tmp_path / "results" / "growth.json", tmp_path / "growth.svg"
    words = [
        "scripts/benchmarks/bench_growth.py",
        "--folder",
        tmp_path / "bench",
        "--sizes",
        "tiny",
        "--at",
        "tiny",
        "--runs",
        1,
        "--json",
        kept,
        "--quiet",
        "--discard",
    ]
    first = run_script(*words, "--axes", "size,cold")
    assert first.returncode == 0, first.stderr
    second = run_script(*words, "--axes", "density", "--add", "--plot", drawn)
    assert second.returncode == 0, second.stderr
    found = read_growth(kept)
    axes = by_axis(found["points"])
    assert {axis: len(points) for axis, points in axes.items()} == {"size": 2, "cold": 2, "density": 5}
    assert found["machine"] == machine()
    for one in found["points"]:
        assert one["amounts"]["read"] == 4 * one["amounts"]["written"] > 0
        assert one["cost"]["wall"] > 0
        assert one["cost"]["anonymous_mib"] > 100
        assert one["cached"] == (one["axis"] != "cold")
    for head in ("| billion parameters ", "| billion parameters, from the disk ", "| density "):
        assert head in second.stdout
    words_of = {"size": "billion parameters", "cold": "from the disk", "density": "density"}
    for axis, word in words_of.items():
        text = drawn.with_stem(f"growth_{axis}").read_text()
        assert all(part in text for part in (word, "seconds", "peak anonymous memory (MiB)", "ties"))
    assert len(list(tmp_path.glob("growth*.svg"))) == 3
    assert not list((tmp_path / "bench").rglob("*.safetensors"))


def merged(run: CompletedProcess[str], folder: Path) -> bytes:
    """The weights that a command wrote."""
    assert run.returncode == 0, run.stderr
    return (folder / "model.safetensors").read_bytes()


def test_every_way_makes_the_same_merge(tmp_path: Path, run_script) -> None:
    """Blocks of other sizes and two processes are other ways to the same bytes: what the axes compare is one merge."""
    bench = Bench(tmp_path, {**SHAPES["tiny"], "layers": 1, "vocab": 500}, "small", 2)
    plain = Step("models", 2, "ties", 2)
    found = []
    for step in (plain, Step("block", 1 << 12, "ties", 2, block=1 << 12), Step("ranks", 2, "ties", 2, processes=2)):
        _, *words = step.command(bench)
        found.append(merged(run_script(*words), bench.out))
    assert found[0] == found[1] == found[2]


def test_what_is_measured() -> None:
    """Size and cold for every size; the others at one size: 2 to 8 models, densities of TIES, blocks, 1 and 2 ranks."""
    sizes = ("0.1b", "0.3b", "1b")
    small = list(steps_of("0.1b", bench_growth.AXES, sizes, "0.3b", 2))
    assert [(step.axis, step.method) for step in small] == [
        ("size", "task_arithmetic"),
        ("cold", "task_arithmetic"),
        ("size", "ties"),
        ("cold", "ties"),
    ]
    ties = [step for step in steps_of("0.3b", bench_growth.AXES, sizes, "0.3b", 2) if step.method == "ties"]
    x = {axis: [step.x for step in ties if step.axis == axis] for axis in bench_growth.AXES}
    assert x["models"] == list(range(2, 9))
    assert x["density"] == [0.05, 0.1, 0.2, 0.5, 1.0]
    assert 1 << 20 in x["block"]
    assert x["ranks"] == [1, 2]
    assert x["size"] == x["cold"] == pytest.approx([0.32], abs=0.01)


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    """A shape whose checkpoints do not fit is left out with a sentence that has both sizes; one that fits is not."""
    said = shortage(tmp_path, "13b", 100_000)
    assert said is not None
    assert said.startswith("13b: it needs ")
    assert "GB are free" in said
    assert "Left out: 13b" in as_text({"points": [], "skipped": [said]})


def test_straight_line() -> None:
    """Points on a line give its slope, intercept and an R² of 1; those whose inputs were not cached are left out."""
    points = [point("size", x, 2 + 3 * x) for x in (1, 2, 4)]
    slope, intercept, r2 = fitted([*points, point("size", 8, 99, cached=False)]) or (0, 0, 0)
    assert (slope, intercept, r2) == pytest.approx((3, 2, 1))
    assert fitted(points[:2]) is None
    text = as_text({"points": points})
    assert "ties: 2.00 s and 3.00 s for each billion parameters, R² 1.0000." in text


def test_mistakes(tmp_path: Path) -> None:
    """A word that no flag knows, a plot of another kind, a file of something else: one sentence each."""
    folder = ["--folder", str(tmp_path)]
    for words, said in (
        (["--axes", "size,colour"], "--axes takes size, cold"),
        (["--sizes", "900b"], "found 900b"),
        (["--plot", "x.gif"], "must be a .png, .svg or .pdf file"),
        (["--add"], "--add goes with --json"),
    ):
        with pytest.raises(UsageError, match=said):
            bench_growth.main([*folder, *words])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(FailureError, match="holds no results"):
        read_growth(tmp_path / "other.json")
