"""Measure what this machine reads, hashes, merges and writes in a second, for `merge.py --dry_run --bandwidths`.

Takes a few minutes and 1.5 GB in --folder, on the disk whose figures are wanted. Other machines that stand in the file
stay as they are.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from console.cli import Parser, add_output_flags, run, say
from console.files import read_json, user_path, write_whole
from console.processor import usable_cores
from scripts.bench_memory import SHAPES, make
from scripts.bench_merge import machine

METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "widen", "breadcrumbs", "della", "sce",
           "model_stock")  # fmt: skip
MODELS = 3


def main(argv: Sequence[str]) -> int:
    """Measure, write the machine's entry into the file, print it."""
    parser = Parser(prog="scripts/bandwidth.py", description=__doc__)
    parser.add_argument("--folder", type=lambda t: user_path(t).resolve(), required=True, help="for the checkpoints")
    parser.add_argument("--out", type=user_path, required=True, metavar="FILE", help="JSON file of machines")
    parser.add_argument("--name", default="here", help="of this machine in the file")
    parser.add_argument("--runs", type=int, default=5, help="of each part; the median counts")
    parser.add_argument("--shape", choices=list(SHAPES), default="0.3b", help="of the checkpoints")
    parser.add_argument("--layers", type=int, default=8, help="of the checkpoints")
    parser.add_argument("--methods", default=",".join(METHODS), help="to measure, as A,B")
    add_output_flags(parser)
    args = parser.parse_args(argv)
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    file = {"machines": {}} if not args.out.is_file() else read_json(args.out, "")
    entry = measured(args.folder, {**SHAPES[args.shape], "layers": args.layers}, f"{args.shape}-{args.layers}",
                     args.methods.split(","), args.runs, args.quiet)  # fmt: skip
    out = args.out.name if args.out.is_absolute() else args.out  # nobody's folders are told
    told = ["python scripts/bandwidth.py", "--folder DIR", f"--out {out}"]
    told += [f"--{key} {getattr(args, key)}" for key in ("shape", "layers", "runs")]
    entry = {"measured": {**machine(), "command": " ".join(told)}, **entry}
    file["machines"] = {**file.get("machines", {}), args.name: entry}
    write_whole(args.out, (json.dumps(file, indent=1) + "\n").encode())
    print(json.dumps(entry, indent=1))
    return 0


def measured(
    folder: Path, shape: dict[str, int], name: str, methods: Sequence[str], runs: int, quiet: bool
) -> dict[str, Any]:
    """Return every figure of this machine: medians, and under `spread` the least and the most."""
    from scripts import bandwidth_parts as parts

    say("Making checkpoints ...", quiet)
    base, *models = [make(folder / f"{name}-{i}", shape, i) for i in range(MODELS + 1)]
    small = [make(folder / f"tiny-{i}", {**SHAPES["tiny"], "layers": 1}, i) for i in range(MODELS + 1)]
    files = [checkpoint / "model.safetensors" for checkpoint in (base, *models)]
    size = files[0].stat().st_size
    found: dict[str, list[float]] = {}
    for key, work in {
        "start": lambda: parts.start(small[0], small[1:], folder / "out", runs),
        "read": lambda: parts.read(files, runs),
        "cached": lambda: parts.cached(files, runs),
        "write": lambda: parts.write(folder / "written", size, runs),
        "digest": lambda: parts.digest(files, runs),
        "output": lambda: parts.output(folder / "output", size, runs),
    }.items():
        say(f"{key} ...", quiet)
        found[key] = work()
    shutil.rmtree(folder / "out", ignore_errors=True)
    by_method: dict[str, Mapping[str, list[float]]] = {}
    for method in methods:
        say(f"{method} ...", quiet)
        by_method[method] = parts.method_rates(method, base, models, runs)
    return {
        "cores": usable_cores(),
        "buffer": _rounded(parts.buffer()),
        **{key: _middle(values) for key, values in found.items()},
        "methods": {m: {key: _middle(values) for key, values in r.items()} for m, r in by_method.items()},
        "spread": {key: [_rounded(min(values)), _rounded(max(values))] for key, values in found.items()},
        "cold_reads": hasattr(os, "posix_fadvise"),
    }


def _middle(values: Sequence[float]) -> float:
    return _rounded(statistics.median(values))


def _rounded(value: float) -> float:
    """Three figures; whole where large."""
    short = float(f"{value:.3g}")
    return int(short) if short >= 1000 else short


if __name__ == "__main__":
    sys.exit(run(main))
