"""Measure wall time and memory of whole merges against size, number of models, density, block size and processes.

Inputs are in the page cache where it can hold them; the axis `cold` drops them from it first. The JSON is written after
every point. `--sizes 0.1b,0.3b` and `--axes size,models` do a part, `--add` puts it beside what the JSON has already.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import Parser, add_output_flags, run
from common.errors import UsageError
from common.figures import check_figure_file, write_figure
from common.files.json_values import JsonObject
from common.files.paths import user_path, write_whole
from common.hardware import usable_cores
from common.logging import logger
from scripts.benchmarks.bench_memory import SHAPES, parameters
from scripts.benchmarks.bench_merge import Bench, machine, measured, warmed
from scripts.benchmarks.growth_report import AXES, METHODS, as_text, plots, read_growth

BF16 = 2
MODELS = 3
MOST_MODELS = 8
DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)
BLOCKS = tuple(1 << power for power in (16, 18, 20, 22, 24))
IN_BLOCKS = (
    "import runpy, sys, merging.ops.tensor_blocks as t; t.BLOCK_ELEMENTS = int(sys.argv[1]); "
    "sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)
"""Runs a script with blocks of another size, which no flag asks for since no result depends on it."""
LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
          "--dynamo_backend", "no", "--main_process_port", "0", "--num_processes")  # fmt: skip
SPARE = 2 << 30
"""Bytes of the disk that are left free."""


@dataclass(frozen=True)
class Step:
    """One point that is to be measured: along `axis` at `x`."""

    axis: str
    x: float
    method: str
    models: int = MODELS
    flags: Mapping[str, float | str] = field(default_factory=dict)
    block: int | None = None
    processes: int = 1

    def command(self, bench: Bench) -> list[str]:
        """The merge as a command."""
        python, *rest = bench.ours(self.method, dict(self.flags))
        rest.append("--no-load_check")  # which takes 3 s the first time that a shape is seen, and none afterwards
        if self.block is not None:
            return [python, "-c", IN_BLOCKS, str(self.block), *rest]
        return [python, *LAUNCH, str(self.processes), *rest] if self.processes > 1 else [python, *rest]


def steps_of(shape: str, axes: Sequence[str], sizes: Sequence[str], at: str, cores: int) -> Iterator[Step]:
    """Yield what is to be measured with one shape's checkpoints; the axes other than the size's use the shape `at`."""
    billions = parameters(SHAPES[shape]) / 1e9
    for method in METHODS:
        if shape in sizes:
            yield from (Step(axis, billions, method) for axis in ("size", "cold") if axis in axes)
        if shape != at:
            continue
        if "models" in axes:
            yield from (Step("models", count, method, count) for count in range(2, MOST_MODELS + 1))
        if "density" in axes and method == "ties":
            yield from (Step("density", density, method, flags={"density": density}) for density in DENSITIES)
        if "block" in axes:
            yield from (Step("block", block, method, block=block) for block in BLOCKS)
        if "ranks" in axes:
            yield from (Step("ranks", ranks, method, processes=ranks) for ranks in range(1, max(2, cores) + 1)
                        if ranks in (1, 2, 4, 8))  # fmt: skip


def shortage(folder: Path, shape: str, models: int) -> str | None:
    """Return why a shape cannot be measured, in a sentence, or None: inputs, a result and one in the making."""
    size = BF16 * parameters(SHAPES[shape])
    missing = sum(not (folder / f"{shape}-{i}" / "model.safetensors").is_file() for i in range(models + 1))
    needed_bytes, free = (missing + 2) * size + SPARE, shutil.disk_usage(folder).free
    if needed_bytes <= free:
        return None
    return f"{shape}: it needs {needed_bytes / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are free."


def measure(step: Step, bench: Bench, shape: str, runs: int, cores: int) -> JsonObject:
    """Return a point: what was run, on how many bytes, and its cost."""
    written = BF16 * parameters(SHAPES[shape])
    read = (step.models + 1) * written
    cached = step.axis != "cold" and read < 0.8 * _memory()
    ready: Callable[[Bench], object] = warmed if cached else _dropped
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // step.processes))
    cost = measured(bench, step.command(bench), runs, ready, step.processes > 1)
    shutil.rmtree(bench.out, ignore_errors=True)
    amounts = {"read": read, "written": written}
    return {
        "axis": step.axis, "x": step.x, "method": step.method, "shape": shape, "models": step.models,
        "processes": step.processes, "cached": cached, "amounts": amounts, "cost": asdict(cost),
    }  # fmt: skip


def _dropped(bench: Bench) -> None:
    """Take the weights out of the page cache, once they are on the disk."""
    if not hasattr(os, "posix_fadvise"):
        raise UsageError("This system cannot drop files from its cache; take `cold` out of --axes.")
    for file in bench.weights(len(bench.models)):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _memory() -> int:
    """Bytes that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def main(argv: Sequence[str]) -> int:
    """Make checkpoints, measure, print the tables, plot."""
    parser = Parser(prog="scripts/benchmarks/bench_growth.py", description=__doc__)
    parser.add_argument(
        "--folder", type=lambda t: user_path(t).resolve(), required=True, help="folder of the checkpoints"
    )
    parser.add_argument("--axes", default=",".join(AXES), help="axes to measure, separated by commas")
    parser.add_argument(
        "--sizes", default="0.1b,0.3b,1b,3b", help="sizes of the checkpoints, for the axes size and cold"
    )
    parser.add_argument("--at", default="0.3b", help="size of the checkpoints for the other axes")
    parser.add_argument(
        "--runs", type=int, default=3, help="runs of each command; one run where it takes over a minute"
    )
    parser.add_argument("--json", type=user_path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--add", action="store_true", help="add the points to those that --json already has")
    parser.add_argument("--discard", action="store_true", help="remove the checkpoints of a size after use")
    parser.add_argument(
        "--plot", type=user_path, metavar="FILE", help="draw a figure for each axis (.png, .svg or .pdf)"
    )
    add_output_flags(parser)
    args = parser.parse_args(argv)
    axes, sizes = _checked_names("--axes", args.axes, AXES), _checked_names("--sizes", args.sizes, SHAPES)
    (at,) = _checked_names("--at", args.at, SHAPES)
    check_figure_file(args.plot, "--plot")
    if args.add and args.json is None:
        raise UsageError("--add goes with --json.")
    report: JsonObject = {"machine": machine(), "points": [], "skipped": []}
    if args.add and args.json.is_file():
        report |= {"points": read_growth(args.json)["points"]}
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    args.folder.mkdir(parents=True, exist_ok=True)
    for point in measure_all(args.folder, axes, sizes, at, args.runs, args.discard, report["skipped"]):
        same = ("axis", "x", "method")
        other_points = [old for old in report["points"] if any(old[key] != point[key] for key in same)]
        report["points"] = [*other_points, point]
        _keep(report, args.json)
    _keep(report, args.json)  # what was left out at the end too
    print(as_text(report))
    if args.plot is not None and report["points"]:
        for axis, figure in plots(report).items():
            file = args.plot.with_stem(f"{args.plot.stem}_{axis}")
            write_figure(figure, file)
            logger.info(f"Plot written to {file}.")
    return 0


def _keep(report: JsonObject, file: Path | None) -> None:
    if file is not None:
        write_whole(file, (json.dumps(report, indent=1) + "\n").encode())


def measure_all(
    folder: Path, axes: Sequence[str], sizes: Sequence[str], at: str, runs: int, discard: bool, skipped: list[str],
) -> Iterator[JsonObject]:  # fmt: skip
    """Yield every point, shape after shape; `skipped` gets a sentence for each shape that the disk has no room for."""
    cores = usable_cores()
    for shape in dict.fromkeys([*sizes, at]):
        steps = list(steps_of(shape, axes, sizes, at, cores))
        if not steps:
            continue
        most = max(step.models for step in steps)
        if lacking := shortage(folder, shape, most):
            skipped.append(lacking)
            logger.info(f"Left out: {lacking}")
            continue
        for step in steps:
            bench = Bench(folder, SHAPES[shape], shape, step.models)
            point = measure(step, bench, shape, runs, cores)
            logger.info(f"{step.axis} {step.x:g} {step.method}: {json.dumps(point['cost'])}")
            yield point
        if discard:
            for i in range(most + 1):
                shutil.rmtree(folder / f"{shape}-{i}", ignore_errors=True)


def _checked_names(flag: str, text: str, allowed: Mapping[str, object]) -> list[str]:
    """The words of a flag. Raises UsageError for one that is none of those known."""
    words = [word for word in text.split(",") if word]
    wrong = [word for word in words if word not in allowed]
    if wrong or not words:
        raise UsageError(f"{flag} takes {', '.join(allowed)}, found {', '.join(wrong) or 'nothing'}.")
    return words


if __name__ == "__main__":
    sys.exit(run(main))
