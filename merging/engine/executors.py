"""Executors: torch on the CPU or a device, compiled kernels, the device pipeline of a GPU, reference numerics.

All give the same bytes for a method, except reference numerics, which repeats the original program's bf16 arithmetic.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from common.threads import in_order, threads
from merging.engine.execution import ExecutionConfig, TensorTask
from merging.engine.finite_check import FiniteBlocks
from merging.engine.prefetch import PendingTask, prefetch, stream_through_device
from merging.methods.contract import LAYOUT, select_arguments
from merging.ops.kernels.kernels import KINDS, MAX_MODELS, Kernels, kernels
from merging.ops.tensor_blocks import Block

Blocks: TypeAlias = Sequence[Tensor]
"""The same rows of each result, on the CPU, in the dtype of the plan; may be overwritten after the next are read."""
LOOKAHEAD = 1
"""Tensors whose statistics are computed while the one before is merged, where kernels compute them in threads."""
MAX_WAITING_BLOCKS = 2
"""Blocks that a kernel may compute ahead of the writer."""


class Executor(Protocol):
    """Merges tensors, each from a task that is prepared when its turn comes."""

    def run(self, name: str) -> Iterator[Blocks]:
        """Yield the results of a tensor, block by block.

        Args:
            name: key of the tensor's task. Tensors run in the order of the tasks, each to its end.
        """

    def close(self) -> None:
        """Stop threads and free the memory of what has begun."""


def make_executor(config: ExecutionConfig, tasks: Mapping[str, PendingTask]) -> Executor:
    """Return the executor for a configuration.

    Args:
        config: the manner of execution.
        tasks: functions that prepare the tensors, by name, in the order in which they run.
    """
    if config.reference:
        return ReferenceExecutor(tasks)
    compiled = kernels() if config.method.kernel_spec is not None and config.compiled else None
    if config.uses_device_pipeline:
        return DeviceExecutor(tasks, config.device, LOOKAHEAD if compiled else 0)
    if compiled is not None and config.device.type == "cpu":
        return KernelExecutor(tasks, compiled)
    return TorchExecutor(tasks)


class TorchExecutor:
    """The method's torch expressions, block after block."""

    def __init__(self, tasks: Mapping[str, PendingTask]) -> None:
        self._tasks = tasks

    def run(self, name: str) -> Iterator[Blocks]:
        """Yield the results of a tensor, block by block."""
        task = self._tasks[name]()
        for block in task.group.blocks():
            yield _on_cpu(task.compute(block))

    def close(self) -> None:
        """Do nothing: no work is left over."""


class ReferenceExecutor:
    """The original program's arithmetic on whole tensors in bf16."""

    def __init__(self, tasks: Mapping[str, PendingTask]) -> None:
        self._tasks = tasks

    def run(self, name: str) -> Iterator[Blocks]:
        """Yield the results of a tensor as one block."""
        task = self._tasks[name]()
        group, reference, relaxation = task.group, task.config.method.reference, task.config.relaxation
        assert reference is not None  # the recipe was checked
        base = None if group.base is None else group.base[:].to(torch.bfloat16)
        finetuned = [tensor[:].to(torch.bfloat16) for tensor in group.finetuned]
        available = {**task.parameters, LAYOUT: group.is_in_out}
        merged = reference(base, finetuned, **select_arguments(reference, available))
        results: Sequence[Tensor] = [merged]
        if relaxation is not None:
            assert base is not None
            results = relaxation.reference(group.name, base, merged)
        yield [result.to(task.dtype) for result in results]

    def close(self) -> None:
        """Do nothing: no work is left over."""


class KernelExecutor:
    """Compiled kernels: from the stored dtypes to the results' in one pass, several blocks at a time.

    The bytes are those of the method's torch expressions, which compute every block that a kernel declines (an input or
    a result is not finite), tensors that collectors observe, and tensors of more than MAX_MODELS models.
    """

    def __init__(self, tasks: Mapping[str, PendingTask], compiled: Kernels) -> None:
        self._names, self._ready = iter(tasks), prefetch(tasks.values(), LOOKAHEAD)
        self._compiled = compiled

    def run(self, name: str) -> Iterator[Blocks]:
        """Yield the results of a tensor, block by block."""
        assert next(self._names) == name, "tensors run in the order of the tasks"
        task = next(self._ready)()
        if task.is_observed or len(task.group.finetuned) > MAX_MODELS:
            for block in task.group.blocks():
                yield _on_cpu(task.compute(block))
            return
        for computed in self._iter_blocks(task):
            yield _on_cpu(task.compute(computed)) if isinstance(computed, Block) else computed

    def close(self) -> None:
        """Stop the thread that prepares tasks."""
        self._ready.close()

    def _iter_blocks(self, task: TensorTask) -> Iterator[Blocks | Block]:
        """Yield the results of each block, or the block itself where torch must compute it."""
        group, relaxation, kernel_spec = task.group, task.config.relaxation, task.config.method.kernel_spec
        assert kernel_spec is not None
        parameters = select_arguments(kernel_spec, task.parameters)
        n_results = task.config.results
        dtype = task.dtype if task.dtype in KINDS else torch.float32
        is_relaxed = relaxation is not None and relaxation.changes(group.name)
        blocks = list(group.blocks())
        largest = max(block.elements for block in blocks)
        slots = min(len(blocks), threads() + MAX_WAITING_BLOCKS + 1)
        outputs = [
            [torch.empty(largest, dtype=dtype) for _ in range(n_results if is_relaxed else 1)] for _ in range(slots)
        ]
        merged_blocks = [torch.empty(largest) for _ in outputs] if is_relaxed else [slot[0] for slot in outputs]

        def compute(item: tuple[Block, int]) -> Blocks | Block:
            block, slot = item
            shape = (block.stop - block.start, *group.shape[1:])
            arguments = task.block_arguments.for_kernel(block)
            if arguments is None:
                return block
            spec = kernel_spec(**parameters, **select_arguments(kernel_spec, arguments))
            base = None if group.base is None else group.base[block.rows]
            models = [model[block.rows] for model in group.finetuned]
            merged, *out = (t[: block.elements].view(shape) for t in (merged_blocks[slot], *outputs[slot]))
            if spec is None or not self._compiled.compute_into(spec, base, models, block, merged):
                return block
            if relaxation is not None and is_relaxed:
                assert base is not None
                if not relaxation.compute_into(self._compiled, group.name, block, base, merged, out):
                    return block
            rounded = out if dtype is task.dtype else [tensor.to(task.dtype) for tensor in out]
            results = rounded if is_relaxed else rounded * n_results
            return FiniteBlocks(results) if dtype is task.dtype else results  # another dtype may overflow to infinity

        yield from in_order(compute, zip(blocks, itertools.cycle(range(slots)), strict=False), MAX_WAITING_BLOCKS)


class DeviceExecutor:
    """The method's torch expressions on a device, with reading, copies and computation overlapped."""

    def __init__(self, tasks: Mapping[str, PendingTask], device: torch.device, lookahead: int) -> None:
        self._names, self._streams = iter(tasks), stream_through_device(list(tasks.values()), device, lookahead)

    def run(self, name: str) -> Iterator[Blocks]:
        """Yield the results of a tensor, block by block."""
        assert next(self._names) == name, "tensors run in the order of the tasks"
        yield from next(self._streams)

    def close(self) -> None:
        """Wait for everything that runs on the device and free its memory."""
        self._streams.close()


def _on_cpu(results: Sequence[Tensor]) -> Blocks:
    return [result.cpu() for result in results]
