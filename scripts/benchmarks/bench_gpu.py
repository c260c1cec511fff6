"""Measure what a GPU does beside what it could do: its limits, calibration, merging, and agreement with the CPU.

`python scripts/benchmarks/bench_gpu.py` needs torch, transformers and accelerate, no network and no checkpoint: models
are made on the device. `--shape tiny --device cpu` runs all of it on a CPU in seconds, to try the script and not to
measure.
"""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import Parser, add_output_flags, run
from common.errors import UsageError
from common.files.json_values import JsonObject
from common.files.paths import user_path
from common.logging import logger
from common.markup import markdown
from scripts.benchmarks.bench_memory import SHAPES
from scripts.benchmarks.bench_merge import machine

if TYPE_CHECKING:
    import torch

PARTS = {"a": "limits", "b": "calibration", "c": "merging", "d": "parity"}
SIZES = {
    "tiny": {"blocks": 8, "plain": 2, "hidden": 128, "wide": 344, "layers": 1},
    "1b": {"blocks": 256, "plain": 8, "hidden": 4096, "wide": 11008, "layers": 2},
    "13b": {"blocks": 256, "plain": 8, "hidden": 4096, "wide": 11008, "layers": 2},
}
"""For each shape: calibration blocks, those of the original's way, and the layers that are merged (7B's, 3.2 GB)."""


def main(argv: Sequence[str]) -> int:
    """Measure the parts that were asked for, print their tables, keep the figures."""
    parser = Parser(prog="scripts/benchmarks/bench_gpu.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="parts to measure: a limits, b calibration, c merging, d parity"
    )
    parser.add_argument("--shape", choices=list(SIZES), default="13b", help="shape of the calibrated model")
    parser.add_argument(
        "--layers", type=int, help="number of layers of the calibrated model (default: that of the shape)"
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the script")
    parser.add_argument("--runs", type=int, default=5, help="runs of each measurement; medians are printed")
    parser.add_argument("--blocks", type=int, help="number of calibration blocks (default: by shape)")
    parser.add_argument("--block_size", type=int, default=512, help="tokens per block")
    parser.add_argument("--models", type=int, default=3, help="number of fine-tuned models")
    parser.add_argument("--json", type=user_path, metavar="FILE", help="also write the figures to this file")
    add_output_flags(parser)
    args = parser.parse_args(argv)
    parts = args.parts.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown or args.runs < 1:
        raise UsageError(
            f"--parts takes {', '.join(PARTS)}, found {unknown}." if unknown else "--runs must be positive."
        )
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    from common.device import resolve_device  # loads torch

    device = resolve_device(args.device)
    report: JsonObject = {
        "machine": about(device),
        "shape": args.shape,
        "command": ["scripts/benchmarks/bench_gpu.py", *argv],
    }
    print(f"{_machine(report)}\n")
    for part in parts:
        started = time.perf_counter()
        report[PARTS[part]] = measure(part, device, args)
        logger.info(f"{PARTS[part]}: {time.perf_counter() - started:.0f} s")
        print(f"{table(part, report)}\n", flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def about(device: torch.device) -> dict[str, str]:
    """Return a description of the machine."""
    import torch
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__, **machine()}


def measure(part: str, device: torch.device, args: Namespace) -> JsonObject:
    """Measure one part and give the device's memory back."""
    import gc

    import torch

    from scripts.benchmarks import bench_gpu_merging, bench_gpu_parts

    sizes = SIZES[args.shape]
    if part == "a":
        figures = bench_gpu_parts.limits(device, args.runs)
    elif part == "b":
        shape = {**SHAPES[args.shape], **({"layers": args.layers} if args.layers else {})}
        blocks = args.blocks or sizes["blocks"]
        figures = bench_gpu_parts.calibration(
            shape, device, args.runs, blocks, args.block_size, min(blocks, sizes["plain"])
        )
    elif part == "c":
        shapes = bench_gpu_merging.layer_shapes(sizes["hidden"], sizes["wide"], sizes["layers"])
        figures = bench_gpu_merging.merging(device, args.runs, shapes, args.models)
    else:
        figures = bench_gpu_merging.parity(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return figures


def as_text(report: JsonObject) -> str:
    """Return the machine and the tables of all parts that were measured."""
    return "\n\n".join(
        [f"{_machine(report)}:", *(table(part, report) for part, name in PARTS.items() if name in report)]
    )


def _machine(report: JsonObject) -> str:
    return ", ".join(f"{key} {value}" for key, value in report["machine"].items())


def table(part: str, figures: JsonObject) -> str:
    """Return one part's figures as Markdown, beside the limits where they were measured in the same run."""
    return {"a": _limits, "b": _calibration, "c": _merging, "d": _parity}[part](figures)


def _limits(figures: JsonObject) -> str:
    entries = figures["limits"]
    rows = [[f"bf16 product, {n} x {n}", f"{e['rate'] / 1e12:.1f} TFLOP/s", _took(e)] for n, e in
            entries["products"].items()]  # fmt: skip
    names = {"in": "host to device", "out": "device to host", "within": "within the device, read and written"}
    rows += [[f"copy {names[name]}", f"{e['rate'] / 1e9:.1f} GB/s", _took(e)] for name, e in entries["copies"].items()]
    return markdown(["limit", "rate", "ms (least to most)"], rows)


def _took(entry: Mapping[str, float]) -> str:
    middle, least, most = (1e3 * entry[key] for key in ("seconds", "least", "most"))
    return f"{middle:.4g} ({least:.4g} to {most:.4g})"


def _calibration(figures: JsonObject) -> str:
    entry, limit = figures["calibration"], figures.get("limits", {}).get("matrix_rate")
    plain = entry["ways"]["one block at a time"]["tokens_per_second"]
    rows = [
        [name, str(e["tokens"]), _took(e), f"{e['tokens_per_second']:.0f}", f"{e['tokens_per_second'] / plain:.2f}",
         f"{e['rate'] / 1e12:.1f}", f"{100 * e['rate'] / limit:.1f} %" if limit else "-"]
        for name, e in entry["ways"].items()
    ]  # fmt: skip
    heads = ["calibration", "tokens", "ms (least to most)", "tokens/s", "ratio", "TFLOP/s", "of the product's rate"]
    peak = (
        f"peak of device memory {entry['peak_bytes'] / 1e9:.1f} GB, of which weights {entry['weights_bytes'] / 1e9:.1f}"
    )
    return (
        f"{markdown(heads, rows)}\n\n{entry['parameters'] / 1e9:.2f}B parameters, attention {entry['attention']}, "
        f"blocks of {entry['block_size']} tokens, {entry['batch']} at a time; {peak}; model made in "
        f"{entry['seconds_to_make']:.1f} s. TFLOP/s counts the products with weights alone (the head's where it is "
        "computed), not attention's."
    )


def _merging(figures: JsonObject) -> str:
    entry, copies = figures["merging"], figures.get("limits", {}).get("copies")
    rows = []
    for name, e in entry["work"].items():
        share = f"{100 * e['rate'] / copies['in']['rate']:.0f} %" if copies else "-"
        cpu = f"{1e3 * e['cpu']['seconds']:.4g}" if "cpu" in e else "-"
        rows.append(
            [name, f"{e['read_bytes'] / 1e9:.2f}", _took(e), f"{e['rate'] / 1e9:.2f}", share,
             f"{e['peak_bytes'] / 2**20:.0f}", cpu]
        )  # fmt: skip
    heads = ["merging", "GB read", "ms (least to most)", "GB/s", "of the copy in", "device MiB", "CPU alone ms"]
    kernels = "with" if entry["kernels"] else "without"
    return (
        f"{markdown(heads, rows)}\n\nA base and {entry['models']} models (relax: one) from the host's memory, results "
        f"dropped; each input counts once, though TIES and WIDEN read it again on the CPU. CPU alone: {kernels} "
        f"kernels, {entry['threads']} threads, once."
    )


def _parity(figures: JsonObject) -> str:
    rows = [[name, "yes" if e["equal"] else "no", f"{e['largest']:.3g}"] for name, e in figures["parity"].items()]
    return markdown(["device against CPU", "equal bits", "largest difference"], rows, text_columns=2)


if __name__ == "__main__":
    sys.exit(run(main))
