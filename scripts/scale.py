"""Print what merges of Llamas of 7B to 405B take on the machines of a file of bandwidths, in time, memory and disk.

The estimates are those of `merge.py --dry_run --bandwidths FILE:MACHINE`, of the same numbers of bytes; here they come
from the shapes alone. docs/scale.md holds the tables.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from console.cli import Parser, add_output_flags, run
from console.files import read_json, user_path
from console.tables import markdown
from merging.bandwidths import Bandwidths, read_bandwidths
from merging.describe import blocks_memory, size_of
from merging.estimate import LANES, Amounts, duration, estimate
from scripts.bench_memory import tensors_of

LLAMAS = {
    "7B": {"hidden": 4096, "intermediate": 11008, "layers": 32, "vocab": 32000, "kv": 4096},
    "13B": {"hidden": 5120, "intermediate": 13824, "layers": 40, "vocab": 32000, "kv": 5120},
    "70B": {"hidden": 8192, "intermediate": 28672, "layers": 80, "vocab": 32000, "kv": 1024},
    "405B": {"hidden": 16384, "intermediate": 53248, "layers": 126, "vocab": 128256, "kv": 1024},
}
"""Llama 2 7B, 13B and 70B, Llama 3.1 405B; kv: columns of keys, 128 for each key-value head."""
METHODS = ("task_arithmetic", "ties", "dare_ties")
MODELS = 3
BF16 = 2


def parameters(shape: dict[str, int]) -> int:
    """Return how many numbers a Llama of that shape has, its head not tied."""
    return sum(math.prod(size) for _, size in tensors_of(shape))


def amounts(shape: dict[str, int], models: int, method: str, cached: bool = False) -> Amounts:
    """Return what a merge of so many models and a base of that shape moves, all in bf16."""
    size = BF16 * parameters(shape)
    return Amounts((models + 1) * size, size, method, cached)


def as_text(file: Path) -> str:
    """Return the tables for the machines of a file. Raises as `read_bandwidths` does."""
    told = read_json(file, f"{file} does not exist; scripts/bandwidth.py measures one.").get("machines", {})
    machines = [read_bandwidths(file, name) for name in told]
    return "\n\n".join([_machines(told, machines), _sizes(), _times(machines)])


def _machines(told: Mapping[str, Mapping[str, Any]], machines: Sequence[Bandwidths]) -> str:
    heads = ["machine", "figures", "machines", "cores", "processes", "reads GB/s", "writes GB/s", "peak memory"]
    rows = []
    for one in machines:
        measured = told[one.name].get("measured")
        origin = f"measured, {measured['processor']}, {measured['date']}" if measured else told[one.name]["title"]
        memory = blocks_memory(MODELS) * one.processes
        counts = [str(one.machines), str(one.cores), str(one.processes)]
        rows.append([one.name, origin, *counts, f"{one.read / 1e9:.3g}", f"{one.write / 1e9:.3g}", size_of(memory)])
    return markdown(heads, rows, left=2)


def _sizes() -> str:
    heads = ["model", "parameters", "reads", "writes", "disk for inputs and result"]
    rows = []
    for name, shape in LLAMAS.items():
        moved = amounts(shape, MODELS, METHODS[0])
        sizes = [size_of(count) for count in (moved.read, moved.written, moved.read + moved.written)]
        rows.append([name, f"{parameters(shape) / 1e9:.2f} billion", *sizes])
    return markdown(heads, rows)


def _times(machines: Sequence[Bandwidths]) -> str:
    rows = []
    for name, shape in LLAMAS.items():
        for method in METHODS:
            found = [estimate(amounts(shape, MODELS, method), machine) for machine in machines]
            rows.append([name, method, *(f"{duration(one.total)}, {LANES[one.binding]}" for one in found)])
    return markdown(["model", "method", *(machine.name for machine in machines)], rows, left=2)


def main(argv: Sequence[str]) -> int:
    """Print the tables."""
    parser = Parser(prog="scripts/scale.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bandwidths", type=user_path, default=Path("configs/bandwidths.json"), metavar="FILE",
                        help="what scripts/bandwidth.py wrote")  # fmt: skip
    add_output_flags(parser)
    print(as_text(parser.parse_args(argv).bandwidths))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
