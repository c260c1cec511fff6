"""Measure merging beside its peers and beside the limit, on checkpoints that are made for it; print a table.

The limit is reading every input and writing an output of that size, by cat and cp. Ours and theirs are whole processes,
files in the page cache; `net` takes off the interpreter with torch imported. Peers: mergekit from its
package; for WIDEN the published algorithm on whole models; for relaxing two models loaded with transformers.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import Parser, add_output_flags, run
from common.errors import FailureError, UsageError
from common.files.json_values import JsonObject
from common.files.paths import user_path
from common.logging import logger
from scripts.benchmarks.bench_memory import SHAPES, make, peak
from scripts.benchmarks.bench_tables import performance

LONG = 60.0
"""Seconds from which on a peer is run once."""
Parameters = dict[str, float | str]
WORK: dict[str, tuple[str, Parameters]] = {
    "linear": ("linear", {}),
    "task_arithmetic": ("task_arithmetic", {}),
    "ties 0.2": ("ties", {"density": 0.2}),
    "ties 0.5": ("ties", {"density": 0.5}),
    "dare_linear 0.5": ("dare_linear", {"density": 0.5}),
    "dare_ties 0.5": ("dare_ties", {"density": 0.5}),
    "widen": ("widen", {}),
    "relax": ("relax", {}),
    "relax 6 omegas": ("relax", {"omega": "0,0.2,0.4,0.6,0.8,1"}),
}


@dataclass(frozen=True)
class Cost:
    """Several runs of one command: seconds on the wall (median, least, most), of the CPU (median), peak MiB."""

    wall: float
    least: float
    most: float
    cpu: float
    anonymous_mib: float
    runs: int


class Bench:
    """The checkpoints and the commands over them."""

    def __init__(self, folder: Path, shape: dict[str, int], name: str, models: int) -> None:
        self.folder, self.out = folder, folder / "out"
        self.base, *self.models = [make(folder / f"{name}-{i}", shape, i) for i in range(models + 1)]
        self.importance = folder / f"{name}.importance.safetensors"

    def weights(self, count: int) -> list[Path]:
        """The weight files of the base and `count` models."""
        return [folder / "model.safetensors" for folder in (self.base, *self.models[:count])]

    def limit(self, count: int, results: int) -> list[str]:
        """Read the base and `count` models, write files of one's size."""
        files = " ".join(f"'{file}'" for file in self.weights(count))
        copies = (f"cp --reflink=never '{self.base}/model.safetensors' '{self.out}/copy{i}'" for i in range(results))
        return ["sh", "-c", " && ".join([f"mkdir -p '{self.out}'", f"cat {files} > /dev/null", *copies])]

    def ours(self, method: str, arguments: Parameters) -> list[str]:
        """The command of this project."""
        flags = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
        python, tail = [sys.executable], [*flags, "--save_path", str(self.out), "--overwrite", "--quiet"]
        if method == "relax":
            self._make_importance()
            return [
                *python,
                "performAIM.py",
                "--merged_model",
                str(self.models[0]),
                "--pretrained_model_name",
                str(self.base),
                "--importance",
                str(self.importance),
                *tail,
            ]
        models = ",".join(map(str, self.models))
        return [
            *python,
            "merge.py",
            "--method",
            method,
            "--base_model",
            str(self.base),
            "--models_to_merge",
            models,
            *tail,
        ]

    def peer(self, method: str, arguments: Parameters) -> list[str] | None:
        """The command of whoever does the same; nobody makes several results from one read."""
        if "omega" in arguments:
            return None
        if method in ("widen", "relax"):
            inputs = [self.models[0], self.importance] if method == "relax" else self.models
            return [
                sys.executable,
                "scripts/benchmarks/bench_peers.py",
                method,
                str(self.base),
                ",".join(map(str, inputs)),
                str(self.out),
            ]
        recipe = self.folder / "mergekit.json"  # JSON is YAML
        entries = [{"model": str(m), "parameters": {"weight": 1.0, **arguments}} for m in self.models]
        base = {} if method == "linear" else {"base_model": str(self.base)}
        recipe.write_text(json.dumps({"merge_method": method, **base, "models": entries, "dtype": "bfloat16"}))
        return [
            sys.executable,
            "-m",
            "mergekit.scripts.run_yaml",
            str(recipe),
            str(self.out),
            "--no-copy-tokenizer",
            "--quiet",
        ]

    def _make_importance(self) -> None:
        """Random activations for every matrix, since their values do not change the work."""
        if self.importance.is_file():
            return
        import torch

        from aim.calibration.config import Calibration
        from aim.importance import Importance, fingerprint
        from merging.checkpoints.checkpoint import open_checkpoint

        with open_checkpoint(str(self.base)) as base:
            named = {n: i for n, i in base.tensors.items() if len(i.shape) == 2 and "embed" not in n}
            torch.manual_seed(0)
            activations = {name: torch.rand(info.shape[1]) for name, info in named.items()}
            about = {"name": base.name, "fingerprint": fingerprint(base)}
            axes = dict.fromkeys(activations, 1)
            calibration = {**Calibration().recorded(), "sources": [], "blocks": 0, "tokens": 0}
            Importance(activations, axes, {}, calibration, about).save(self.importance)


def warmed(bench: Bench) -> None:
    """Have the inputs in the page cache."""
    subprocess.run(["cat", *map(str, bench.weights(len(bench.models)))], stdout=subprocess.DEVNULL, check=True)


def measured(
    bench: Bench, command: Sequence[str], runs: int, ready: Callable[[Bench], object] = warmed, children: bool = False
) -> Cost:
    """Run a command several times (once more than LONG takes: once), each over a target that is not there.

    ready: what is done before each run; children: whether the memory of those that it starts counts. Raises
    FailureError where it fails.
    """
    walls: list[float] = []
    cpus: list[float] = []
    peaks: list[float] = []
    while len(walls) < runs and (not walls or walls[0] < LONG):
        shutil.rmtree(bench.out, ignore_errors=True)
        ready(bench)
        before, started = os.times(), time.perf_counter()
        memory, _, code = peak(command, children)
        walls.append(time.perf_counter() - started)
        after = os.times()
        if code:
            raise FailureError(f"{' '.join(command)} failed with exit code {code}.")
        cpus.append(after.children_user + after.children_system - before.children_user - before.children_system)
        peaks.append(memory)
    middle = statistics.median
    timings = [round(x, 2) for x in (middle(walls), min(walls), max(walls), middle(cpus))]
    return Cost(timings[0], timings[1], timings[2], timings[3], round(max(peaks)), len(walls))


def machine() -> dict[str, str]:
    """Return a description of the machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": str(os.cpu_count()),
        "system": platform.system(),
        "date": date.today().isoformat(),
    }


def main(argv: Sequence[str]) -> int:
    """Make the checkpoints, measure, print the table."""
    parser = Parser(prog="scripts/benchmarks/bench_merge.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="1b", help="shape of the checkpoints")
    parser.add_argument("--layers", type=int, help="number of layers of the checkpoints (default: that of the shape)")
    parser.add_argument("--models", type=int, default=3, help="number of fine-tuned models")
    parser.add_argument(
        "--runs", type=int, default=5, help="runs of each command; one run of a peer that takes over 60 s"
    )
    parser.add_argument("--work", default=",".join(WORK), help="rows to measure, separated by commas")
    parser.add_argument("--no_peers", action="store_true", help="measure only ours and the limit")
    parser.add_argument("--json", type=user_path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument(
        "--folder", type=lambda t: user_path(t).resolve(), required=True, help="folder of the checkpoints"
    )
    add_output_flags(parser)
    args = parser.parse_args(argv)
    shape = {**SHAPES[args.shape], **({"layers": args.layers} if args.layers else {})}
    works = args.work.split(",")
    if unknown := [name for name in works if name not in WORK]:
        raise UsageError(f"--work knows {', '.join(WORK)}; found {unknown[0]!r}.")
    bench = Bench(args.folder, shape, f"{args.shape}-{shape['layers']}", args.models)
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start = measured(bench, [sys.executable, "-c", "import torch"], args.runs)
    report: JsonObject = {
        "machine": machine(),
        "shape": f"{args.shape}-{shape['layers']}",
        "models": args.models,
        "start": asdict(start),
        "limits": {},
        "work": {},
    }
    for name in works:
        method, arguments = WORK[name]
        count, results = (1 if method == "relax" else args.models), len(str(arguments.get("omega", "")).split(","))
        traffic = f"{count} to {results}"
        if traffic not in report["limits"]:
            report["limits"][traffic] = asdict(measured(bench, bench.limit(count, results), args.runs))
        ours = measured(bench, bench.ours(method, arguments), args.runs)
        peer_run = None if args.no_peers else bench.peer(method, arguments)
        peer = asdict(measured(bench, peer_run, args.runs)) if peer_run else None
        report["work"][name] = {"moved": traffic, "ours": asdict(ours), "peer": peer}
        logger.info(f"{name}: {json.dumps(report['work'][name])}")
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(performance(report))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
