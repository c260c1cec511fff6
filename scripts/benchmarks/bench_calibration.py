"""Measure calibration: seconds and peak memory of the whole model, of one layer at a time, and of the original's way.

`python scripts/benchmarks/bench_calibration.py --shape 1b --layers 4 --folder DIR` prints a table. Checkpoints are made
as by scripts/benchmarks/bench_memory.py; the text is random ids. The original's way is one block at a time with a mean
copied to the host at each hook. Each way runs in a process of its own; the ways take turns, and medians are printed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.cli import Parser, add_output_flags, run
from common.errors import FailureError
from common.files.json_values import JsonObject
from common.files.paths import user_path
from common.hardware import product_dtype
from eval.results.result import read_json_file
from merging.recipe import DTYPES
from scripts.benchmarks.bench_memory import SHAPES, make

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

WAYS = ("whole", "layerwise", "original")
FIELDS = ("RssAnon", "RssFile")


def main(argv: Sequence[str]) -> int:
    """Make the checkpoint, run the ways in turn, print a table."""
    parser = Parser(prog="scripts/benchmarks/bench_calibration.py", description=__doc__)
    group = parser.add_argument_group("checkpoint")
    group.add_argument("--shape", choices=list(SHAPES), default="1b", help="shape of the checkpoint")
    group.add_argument("--layers", type=int, help="number of layers of the checkpoint (default: that of the shape)")
    group.add_argument(
        "--sparse", action="store_true", help="use a checkpoint of zeros, a sparse file that takes no disk"
    )
    group.add_argument(
        "--folder", type=lambda text: user_path(text).resolve(), required=True, help="folder of the checkpoints"
    )
    group = parser.add_argument_group("measurement")
    group.add_argument("--ways", default=",".join(WAYS), help="calibration modes to measure, separated by commas")
    group.add_argument("--blocks", type=int, default=8, help="number of calibration blocks")
    group.add_argument("--block_size", type=int, default=512, help="tokens per block")
    group.add_argument("--batch_size", type=int, help="blocks at a time (default: as performAIM.py chooses)")
    group.add_argument("--runs", type=int, default=3, help="runs of each mode; medians are printed")
    group.add_argument("--device", default="cpu", help="cpu or cuda")
    group.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the matrix products (default: as performAIM.py chooses)"
    )
    group.add_argument("--results", type=user_path, metavar="FILE", help="add the run to this JSON list of runs")
    group.add_argument("--worker", choices=WAYS, help="run one mode in this process and print its figures as JSON")
    add_output_flags(parser)
    args = parser.parse_args(argv)
    args.dtype = args.dtype or product_dtype(args.device)
    shape = {**SHAPES[args.shape], **({"layers": args.layers} if args.layers else {})}
    name = f"{args.shape}-{shape['layers']}{'-sparse' if args.sparse else ''}"
    base = make(args.folder / f"{name}-0", shape, None if args.sparse else 0)
    if args.worker:
        print(json.dumps(measure(base, args)))
        return 0
    runs_by_pass: dict[str, list[dict[str, float]]] = {way: [] for way in args.ways.split(",")}
    for _ in range(args.runs):
        for way, figures in runs_by_pass.items():
            figures.append(worker(way, argv))
    entry = {
        "name": name, "blocks": args.blocks, "block_size": args.block_size, "device": args.device, "dtype": args.dtype,
        "runs": args.runs,
        "weights_mib": round((base / "model.safetensors").stat().st_size / 2**20),
        "ways": {way: summary(figures) for way, figures in runs_by_pass.items()},
    }  # fmt: skip
    print(as_text(entry))
    if args.results:
        runs = read_json_file(args.results) if args.results.exists() else []
        args.results.write_text(json.dumps([*runs, entry], indent=2) + "\n", encoding="utf-8")
    return 0


def worker(way: str, argv: Sequence[str]) -> dict[str, float]:
    """Run one way in a process of its own. Raises FailureError where it fails."""
    command = [sys.executable, __file__, *argv, "--worker", way]
    calm = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # threads that spin while they wait disturb a busy machine
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=calm)
    if done.returncode:
        raise FailureError(f"{way}: {done.stderr.strip()[-500:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def summary(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians, with the least and the largest number of seconds."""
    seconds = [entry["seconds"] for entry in figures]
    medians = {key: round(statistics.median(entry[key] for entry in figures), 2) for key in figures[0]}
    return {**medians, "seconds_least": round(min(seconds), 2), "seconds_most": round(max(seconds), 2)}


def as_text(entry: JsonObject) -> str:
    """Return the table of one run of the benchmark."""
    tokens = entry["blocks"] * entry["block_size"]
    lines = [
        f"{entry['name']} on {entry['device']} in {entry['dtype']}: {entry['weights_mib']} MiB of weights, "
        f"{entry['blocks']} blocks of {entry['block_size']} tokens, medians of {entry['runs']}.\n",
        "| way | s (least to most) | tokens/s | peak anonymous MiB | mapped from files MiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for way, figures in entry["ways"].items():
        spread = f"{figures['seconds']:.1f} ({figures['seconds_least']:.1f} to {figures['seconds_most']:.1f})"
        speed = tokens / figures["seconds"]
        lines.append(f"| {way} | {spread} | {speed:.0f} | {figures['RssAnon']:.0f} | {figures['RssFile']:.0f} |")
    return "\n".join(lines)


def measure(base: Path, args: Namespace) -> dict[str, float]:
    """Run one way here; returns seconds (loading included) and how far memory rose above the interpreter's, in MiB."""
    import torch

    from aim.capture.base_model import Skeleton, load_whole
    from aim.capture.layerwise import calibrate_layerwise
    from aim.capture.whole_model import calibrate
    from merging.checkpoints.checkpoint import open_checkpoint

    checkpoint, device = open_checkpoint(str(base)), torch.device(args.device)
    ids = torch.randint(5, 1000, (args.blocks, args.block_size), generator=torch.Generator().manual_seed(0))
    before = resident()
    peak = dict.fromkeys(FIELDS, 0.0)
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            now = resident()
            peak.update({field: max(peak[field], now[field] - before[field]) for field in FIELDS})

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    if args.worker == "layerwise":
        skeleton = Skeleton(checkpoint, args.dtype, device)
        calibrate_layerwise(skeleton, ids, batch_size=args.batch_size, place="host")
    elif args.worker == "whole":
        calibrate(load_whole(checkpoint, args.dtype, device), ids, batch_size=args.batch_size)
    else:
        original(load_whole(checkpoint, args.dtype, device), ids.to(device))
    seconds = time.perf_counter() - started
    stop.set()
    watcher.join()
    return {"seconds": seconds, **peak}


def original(model: Module, ids: Tensor) -> None:
    """One block at a time, logits included, a mean taken and copied to the host at every module with a weight."""
    import torch

    means: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[[Module, tuple[Tensor, ...], object], None]:
        def record_input(_module: Module, args: tuple[Tensor, ...], _output: object) -> None:
            x = args[0]
            means.setdefault(name, []).append(x.view(-1, x.shape[-1]).abs().mean(0).cpu())

        return record_input

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if hasattr(module, "weight") and "embed" not in name
    ]
    with torch.no_grad():
        for block in ids.split(1):
            model(block)
    for handle in handles:
        handle.remove()


def resident() -> dict[str, float]:
    """The resident memory of this process by kind, in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {field: int(lines[field].split()[0]) / 1024 for field in FIELDS}


if __name__ == "__main__":
    sys.exit(run(main))
