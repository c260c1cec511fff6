"""Measure the peak anonymous memory of merges on checkpoints that are made for it, beside the bare interpreter's.

`python scripts/benchmarks/bench_memory.py --shape 1b --folder DIR` prints a table. Inputs of the larger shapes are
sparse files (zeros that take no disk), with --layers to shorten them: memory does not depend on the number of layers.
"""

from __future__ import annotations

import json
import math
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from common.cli import Parser, add_output_flags, run
from common.files.paths import user_path
from common.logging import logger
from eval.results.result import read_json_file

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {
    "tiny": {"hidden": 256, "intermediate": 688, "layers": 4, "vocab": 4000, "kv": 256},
    "0.1b": {"hidden": 768, "intermediate": 2048, "layers": 12, "vocab": 32000, "kv": 768},
    "0.3b": {"hidden": 1024, "intermediate": 2816, "layers": 20, "vocab": 32000, "kv": 1024},
    "1b": {"hidden": 2048, "intermediate": 5632, "layers": 22, "vocab": 32000, "kv": 256},
    "3b": {"hidden": 3200, "intermediate": 8640, "layers": 26, "vocab": 32000, "kv": 3200},
    "13b": {"hidden": 5120, "intermediate": 13824, "layers": 40, "vocab": 32000, "kv": 5120},
}
LOOK = 0.03
"""Seconds between looks at a process's memory: task arithmetic took 6.1 s with one every 2 ms and 5.5 s with these."""
EXTRA = {"slerp": ["--t", "0.3"], "nearswap": ["--t", "0.01"], "dare_linear": ["--density", "0.5"],
         "dare_ties": ["--density", "0.5"]}  # fmt: skip


def tensors_of(shape: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of a Llama's tensors."""
    hidden, wide = shape["hidden"], shape["intermediate"]
    yield "model.embed_tokens.weight", (shape["vocab"], hidden)
    for i in range(shape["layers"]):
        layer = f"model.layers.{i}."
        for name, rows, columns in (
            ("self_attn.q_proj", hidden, hidden), ("self_attn.k_proj", shape["kv"], hidden),
            ("self_attn.v_proj", shape["kv"], hidden), ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", wide, hidden), ("mlp.up_proj", wide, hidden), ("mlp.down_proj", hidden, wide),
        ):  # fmt: skip
            yield f"{layer}{name}.weight", (rows, columns)
        yield f"{layer}input_layernorm.weight", (hidden,)
        yield f"{layer}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape["vocab"], hidden)


def parameters(shape: dict[str, int]) -> int:
    """Return the number of parameters of a Llama of that shape, its head not tied."""
    return sum(math.prod(size) for _, size in tensors_of(shape))


def make(folder: Path, shape: dict[str, int], seed: int | None) -> Path:
    """Write a bf16 checkpoint of the shape: random values, or with seed None a sparse file of zeros."""
    file = folder / "model.safetensors"
    if file.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape["hidden"],
        "intermediate_size": shape["intermediate"], "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["hidden"] // 64, "num_key_value_heads": shape["kv"] // 64, "head_dim": 64,
        "vocab_size": shape["vocab"], "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, size in tensors_of(shape):
        end = offset + 2 * int(np.prod(size))
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        if seed is None:
            stream.truncate(8 + len(encoded) + offset)
            return folder
        generator = np.random.default_rng(0 if seed == 0 else 1)
        noise = np.random.default_rng(seed)
        for start in range(0, offset, 1 << 24):
            count = (min(offset, start + (1 << 24)) - start) // 2
            values = 0.02 * generator.standard_normal(count, dtype=np.float32)
            values += 0.0005 * noise.standard_normal(count, dtype=np.float32)
            stream.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    return folder


def peak(command: Sequence[str], children: bool = False) -> tuple[float, float, int]:
    """Run a command; returns its peak anonymous memory in MiB, its seconds, and its exit code.

    children: whether those of the processes that it starts are added to its own.
    """
    started, highest = time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while process.poll() is None:
        highest = max(highest, _anonymous(process.pid, children))
        time.sleep(LOOK)
    _, errors = process.communicate()
    if process.returncode:
        logger.warning(errors)
    return highest / 1024, time.perf_counter() - started, process.returncode


def _anonymous(process: int, children: bool) -> int:
    """KiB of anonymous memory that a process holds now; 0 once it has ended."""
    place = Path(f"/proc/{process}")
    try:
        match = re.search(r"RssAnon:\s+(\d+)", (place / "status").read_text())
        threads = list((place / "task").iterdir()) if children else []  # each knows those that it started
        below = [child for thread in threads for child in (thread / "children").read_text().split()]
    except OSError:
        return 0
    return (int(match[1]) if match else 0) + sum(_anonymous(int(child), True) for child in below)


def main(argv: Sequence[str]) -> int:
    """Make the checkpoints, measure each method, print a table."""
    from merging.recipe.method_registry import all_methods

    parser = Parser(prog="scripts/benchmarks/bench_memory.py", description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="1b", help="shape of the checkpoints")
    parser.add_argument("--layers", type=int, help="number of layers of the checkpoints (default: that of the shape)")
    parser.add_argument("--models", type=int, default=3, help="number of fine-tuned models")
    parser.add_argument("--results", type=user_path, metavar="FILE", help="add the run to this JSON list of runs")
    parser.add_argument("--sparse", action="store_true", help="use inputs of zeros, sparse files that take no disk")
    parser.add_argument("--methods", help="methods to measure, separated by commas (default: every method)")
    parser.add_argument(
        "--folder",
        type=lambda text: user_path(text).resolve(),
        required=True,
        help="folder of the checkpoints",
    )
    add_output_flags(parser)
    args = parser.parse_args(argv)
    shape = {**SHAPES[args.shape], **({"layers": args.layers} if args.layers else {})}
    name = f"{args.shape}-{shape['layers']}{'-sparse' if args.sparse else ''}"
    seeds = [None if args.sparse else i for i in range(args.models + 1)]
    base, *models = [make(args.folder / f"{name}-{i}", shape, seed) for i, seed in enumerate(seeds)]
    interpreter, _, _ = peak([sys.executable, "-c", "import torch, numpy, safetensors.torch; torch.zeros(1)"])
    largest = max(int(np.prod(size)) for _, size in tensors_of(shape)) * 2 / 2**20
    print(f"{name}: {args.models} models and a base, largest tensor {largest:.0f} MiB.")
    print(f"The interpreter with torch alone holds {interpreter:.0f} MiB of anonymous memory, taken off below.\n")
    print("| method | peak anonymous MiB | s |\n|---|---:|---:|")
    worst, peaks = 0, {}
    for method in args.methods.split(",") if args.methods else all_methods():
        spec = all_methods()[method]
        count = int(min(args.models, spec.max_models))
        out = args.folder / "out"
        command = [sys.executable, "merge.py", "--method", method, "--base_model", str(base), "--models_to_merge",
                   ",".join(map(str, models[:count])), "--save_path", str(out), "--overwrite", "--quiet",
                   "--no-load_check", *EXTRA.get(method, [])]  # fmt: skip
        memory, seconds, code = peak(command)
        memory_text = "failed" if code else f"{memory - interpreter:.0f}"
        print(f"| {method} | {memory_text} | {seconds:.1f} |", flush=True)
        worst = max(worst, code)
        if not code:
            peaks[method] = round(memory - interpreter)
    if args.results:
        runs = read_json_file(args.results) if args.results.exists() else []
        entry = {"name": name, "models": args.models, "largest_mib": round(largest),
                 "interpreter_mib": round(interpreter), "peak_mib": peaks}  # fmt: skip
        args.results.write_text(json.dumps([*runs, entry], indent=2) + "\n", encoding="utf-8")
    return worst


if __name__ == "__main__":
    sys.exit(run(main))
