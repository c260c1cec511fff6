"""Measurements of merging on a device for scripts/benchmarks/bench_gpu.py, and agreement with the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aim.capture.whole_model import calibrate
from aim.pipeline import merged_alone
from aim.relax import relax_tensor
from common.files.json_values import JsonObject
from merging.engine.device_pipeline import block_elements_for
from merging.engine.execution import ExecutionConfig, TensorTask, make_task
from merging.engine.executors import make_executor
from merging.methods.contract import Method, load_method
from merging.ops.kernels.kernels import Kernels, kernels
from merging.ops.tensor_blocks import TensorGroup
from merging.recipe.method_registry import find_method
from scripts.benchmarks.bench_gpu_parts import random_llama, timed

CPU = torch.device("cpu")
WORK: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "task_arithmetic": ("task_arithmetic", {}),
    "ties 0.5": ("ties", {"density": 0.5}),
    "dare_ties 0.5": ("dare_ties", {"density": 0.5}),
    "widen": ("widen", {}),
    "relax": ("relax", {}),
}  # fmt: skip
BLOCKS = (1 << 19, 1 << 20, 1 << 21, 1 << 22, 1 << 23)
"""Elements of one tensor per block that task arithmetic is tried with."""


class _Halfway:
    """A relaxation with one omega and an importance of its own for every tensor, the input axis being the last."""

    omegas = (0.4,)

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._s: dict[int, Tensor] = {}

    def _along(self, merged: Tensor) -> Tensor:
        columns = merged.shape[-1]
        if columns not in self._s:
            self._s[columns] = torch.linspace(0, 1, columns).to(self._device)
        return self._s[columns]

    def block(self, name: str, block: object, base: Tensor, merged: Tensor) -> list[Tensor]:
        return [relax_tensor(base, merged, self._along(merged), omega) for omega in self.omegas]

    def changes(self, name: str) -> bool:
        return True

    def compute_into(
        self, kernels: Kernels, name: str, block: object, base: Tensor, merged: Tensor, out: list[Tensor]
    ) -> bool:
        pulls = [self._along(merged) * (1.0 - omega) for omega in self.omegas]
        return all(kernels.relax(base, merged, pull, False, to) for pull, to in zip(pulls, out, strict=True))


def layer_shapes(hidden: int, wide: int, layers: int) -> list[tuple[int, int]]:
    """Return the shapes of the matrices of so many of a Llama's layers, key and value as wide as the rest."""
    return [*[(hidden, hidden)] * 4, (wide, hidden), (wide, hidden), (hidden, wide)] * layers


def stored(shapes: Sequence[tuple[int, int]], models: int, device: torch.device) -> list[list[Tensor]]:
    """Return, for each shape, a base and models near it, bf16, in ordinary memory of the host."""
    shapes_of_layer = []
    for shape in shapes:
        base = 0.02 * torch.randn(shape, device=device)
        near = [base + 0.0005 * torch.randn(shape, device=device) for _ in range(models)]
        shapes_of_layer.append([tensor.bfloat16().cpu() for tensor in (base, *near)])
    return shapes_of_layer


def job_of(method: str, device: torch.device, moves: bool | None) -> ExecutionConfig:
    """Return how a method, or the relaxation, makes its blocks."""
    functions: Method = merged_alone() if method == "relax" else load_method(method)
    relaxation: Any = _Halfway(device) if method == "relax" else None
    return ExecutionConfig(functions, device, relaxation=relaxation, device_pipeline=moves)


def merged(
    tensors: Sequence[Sequence[Tensor]], work: str, device: torch.device, elements: int | None, moves: bool | None,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Iterator[Sequence[Tensor]]]:  # fmt: skip
    """Yield, for each base with its models, the blocks of the result; elements: of a block (None: the device's)."""
    method, arguments = WORK[work]
    job = job_of(method, device, moves)

    def task(base: Tensor, models: Sequence[Tensor]) -> TensorTask:
        used = models[:1] if method == "relax" else models
        schema = {} if method == "relax" else find_method(method).parameters
        parameters = {name: p.for_models(arguments.get(name, p.default), len(used)) for name, p in schema.items()}
        group = TensorGroup(
            "w.weight", base, tuple(used), device, block_elements=elements or block_elements_for(device)
        )
        return make_task(group, job, parameters, dtype)

    tasks = {str(i): partial(task, base, models) for i, (base, *models) in enumerate(tensors)}
    with closing(make_executor(job, tasks)) as executor:
        for name in tasks:
            yield executor.run(name)


def merge_all(
    tensors: Sequence[Sequence[Tensor]], work: str, device: torch.device, elements: int | None, moves: bool | None
) -> int:
    """Merge tensor after tensor and drop the results; returns their bytes."""
    results = merged(tensors, work, device, elements, moves)
    return sum(block.numel() * block.element_size() for blocks in results for (block,) in blocks)


def merging(device: torch.device, runs: int, shapes: Sequence[tuple[int, int]], models: int) -> JsonObject:
    """Measure merging of tensors that lie in the host's memory, nothing written; beside the CPU's own way, once."""
    tensors = stored(shapes, models, device)
    on_gpu = device.type == "cuda"
    rows: JsonObject = {}
    entries: list[tuple[str, str, int | None]] = [(name, name, None) for name in WORK]
    entries += [(f"task_arithmetic, blocks of {n >> 10}k", "task_arithmetic", n) for n in BLOCKS]
    for label, work, elements in entries:
        read = sum(t.numel() * t.element_size() for group in tensors for t in group[: 2 if work == "relax" else None])
        if on_gpu:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        bytes_before = torch.cuda.memory_allocated(device) if on_gpu else 0
        took = timed(partial(merge_all, tensors, work, device, elements, True), device, runs)
        peak = torch.cuda.max_memory_allocated(device) - bytes_before if on_gpu else 0
        rows[label] = {**took, "read_bytes": read, "rate": read / took["seconds"], "peak_bytes": peak}
        if elements is None:
            rows[label]["cpu"] = timed(partial(merge_all, tensors, work, CPU, None, None), CPU, 1)
    return {"models": models, "kernels": kernels() is not None, "threads": torch.get_num_threads(), "work": rows}


def parity(device: torch.device) -> JsonObject:
    """Compare the device's results with the CPU's: which are equal bit for bit, and the largest difference.

    Merging in bf16 and fp32 of a matrix and a vector; calibration of a small model in fp32, relative to each mean.
    """
    rows: JsonObject = {}
    for work in WORK:
        for dtype in (torch.bfloat16, torch.float32):
            tensors = [[t.to(dtype) for t in group] for group in stored([(700, 512), (1, 3000)], 3, CPU)]
            results = [_whole(tensors, work, where, dtype) for where in (CPU, device)]
            pairs = list(zip(*results, strict=True))
            rows[f"{work}, {str(dtype).removeprefix('torch.')}"] = {
                "equal": all(torch.equal(one, other) for one, other in pairs),
                "largest": max(float((one.double() - other.double()).abs().max()) for one, other in pairs),
            }
    ids = torch.randint(5, 1000, (8, 64), generator=torch.Generator().manual_seed(0))
    small = {"hidden": 256, "intermediate": 688, "layers": 2, "vocab": 1000, "kv": 256}
    model = random_llama(small, CPU).float()
    one = calibrate(model, ids).means
    other = calibrate(model.to(device), ids).means
    deviations = [float(((mean - other[name]).abs() / mean.clamp(min=1e-30)).max()) for name, mean in one.items()]
    rows["calibration, float32 (relative)"] = {"equal": max(deviations) == 0, "largest": max(deviations)}
    return rows


def _whole(tensors: Sequence[Sequence[Tensor]], work: str, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The results in one piece each; a block is overwritten after the next."""
    results = merged(tensors, work, device, 40_000, None, dtype)
    return [torch.cat([block.clone() for (block,) in blocks]) for blocks in results]
