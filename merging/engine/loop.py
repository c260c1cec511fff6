"""The only loop over tensors: read by name, merge block by block in fp32, relax, round once, write."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from common.distributed import SINGLE_PROCESS, ProcessGroup
from common.logging import hides_progress
from merging.engine.base_comparison import BaseComparison
from merging.engine.execution import ExecutionConfig, Observer, Writer
from merging.engine.finite_check import Finite, Nonfinite, blamed, sources_of
from merging.engine.fused import fused_blocks, kernel_for
from merging.engine.prefetch import TensorTask, prefetch, stream_through_device
from merging.engine.row_groups import aligned_rows, group_of
from merging.methods.contract import LAYOUT, STATISTICS, select_arguments
from merging.ops.block_arguments import BlockArguments, ConstantArguments
from merging.ops.kernels.kernels import kernels
from merging.ops.tensor_blocks import BLOCK_ELEMENTS, Block, TensorGroup, cut
from merging.plan.types import Listing, Plan, TensorPlan

Observers: TypeAlias = Sequence["Observer | None"]


def run(
    plan: Listing,
    job: ExecutionConfig,
    writers: Sequence[Writer],
    label: str = "merging",
    make: Callable[..., Iterator[Sequence[Tensor]]] | None = None,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Make every tensor of the plan that is not written yet and hand it to the writers, block by block.

    One writer for each of the results that `make` (`tensor_blocks`, with the same arguments) makes; all have written
    the same tensors. Raises StoppedError once another rank has ended.
    """
    done = writers[0].done
    left = plan.tensors[done:]
    comparison = BaseComparison(len(writers))
    bar = tqdm(plan.tensors, unit="tensor", desc=label, disable=hides_progress(), initial=done)
    with closing(_each(left, job, len(writers), make or tensor_blocks)) as made:
        for tensor, observers, results in made:
            inputs = partial(sources_of, tensor) if isinstance(tensor, TensorPlan) else tuple
            nonfinite = [Nonfinite(tensor.name, job.allow_nonfinite, inputs) for _ in writers]
            for writer in writers:
                writer.begin(tensor.name)
            comparison.begin(tensor)
            with blamed(inputs):
                for blocks in results:
                    process_group.check_ranks()
                    comparison.add(blocks)
                    for writer, check, block in zip(writers, nonfinite, blocks, strict=True):
                        writer.add(block if isinstance(blocks, Finite) else check.check(block))
            for i, (writer, check, observer) in enumerate(zip(writers, nonfinite, observers, strict=True)):
                writer.end({**_remark(check, observer), **comparison.end(i)})
            bar.update()
    bar.close()


def _each(
    tensors: Sequence[Any], job: ExecutionConfig, results: int, make: Callable[..., Iterator[Sequence[Tensor]]]
) -> Generator[tuple[Any, Observers, Iterator[Sequence[Tensor]]], None, None]:
    """Yield each tensor with its observers and its blocks; where these go through a device, all in one ring."""

    def observers(tensor: Any) -> list[Observer | None]:
        return [job.make_collector(tensor) if job.make_collector else None for _ in range(results)]

    if make is not tensor_blocks or job.reference:
        for tensor in tensors:
            seeing = observers(tensor)
            yield tensor, seeing, make(tensor, job, seeing)
        return
    sees: dict[str, list[Observer | None]] = {tensor.name: [] for tensor in tensors}  # each filled in its turn

    def task(tensor: TensorPlan) -> TensorTask:
        sees[tensor.name] += observers(tensor)
        return task_of(group_of(tensor, job), job, tensor.parameters, _dtype(tensor), sees[tensor.name])

    tasks = [partial(task, tensor) for tensor in tensors if _is_made(tensor)]
    with closing(merged_tasks(tasks, job)) as merged:
        for tensor in tensors:
            if _is_made(tensor):
                yield tensor, sees[tensor.name], _shaped(tensor, next(merged))
            else:
                yield tensor, observers(tensor), tensor_blocks(tensor, job)


def merged_tasks(
    tasks: Sequence[Callable[[], TensorTask]], job: ExecutionConfig
) -> Generator[Iterator[Sequence[Tensor]], None, None]:
    """Yield each task's blocks; of a method that kernels can prepare and merge, one task is prepared ahead."""
    ahead = 1 if job.method.kernel_spec and job.compiled and kernels() else 0
    if job.uses_device_pipeline:
        yield from stream_through_device(tasks, job.device, ahead)
    else:
        with closing(prefetch(tasks, ahead)) as ready:
            for task in ready:
                yield _later(task, job)


def with_survey(plan: Plan, job: ExecutionConfig) -> ExecutionConfig:
    """Return the job with what the method must know of all tensors at once, where it must."""
    model_statistics = job.method.model_statistics
    if model_statistics is None:
        return job
    merged = [tensor for tensor in plan.tensors if tensor.is_merged]
    if not merged:
        return job
    parameters = select_arguments(model_statistics, merged[0].parameters)
    groups = lambda: (group_of(tensor, job) for tensor in merged)  # noqa: E731
    return replace(job, model_statistics=model_statistics(groups, **parameters))


def tensor_blocks(tensor: TensorPlan, job: ExecutionConfig, observers: Observers = ()) -> Iterator[Sequence[Tensor]]:
    """Yield one output tensor in blocks of rows, in the plan's dtype, on the CPU: one for each of the job's results.

    What is yielded may be overwritten once more is asked for.
    """
    dtype = _dtype(tensor)
    if not _is_made(tensor):
        for block in _copied(tensor, dtype):
            yield [block] * job.results
    elif job.reference:
        yield [t.to(dtype).reshape(tensor.shape) for t in _by_reference(group_of(tensor, job), job, tensor.parameters)]
    else:
        yield from _shaped(tensor, merged_blocks(group_of(tensor, job), job, tensor.parameters, dtype, observers))


def _dtype(tensor: TensorPlan) -> torch.dtype:
    return getattr(torch, tensor.dtype)  # type: ignore[no-any-return]


def _is_made(tensor: TensorPlan) -> bool:
    return tensor.is_merged and 0 not in tensor.shape


def _shaped(tensor: TensorPlan, made: Iterable[Sequence[Tensor]]) -> Iterator[Sequence[Tensor]]:
    """The blocks as the plan has the tensor: a single number was merged as a vector of one."""
    return ([block.reshape(()) for block in blocks] if not tensor.shape else blocks for blocks in made)


def _copied(tensor: TensorPlan, dtype: torch.dtype) -> Iterator[Tensor]:
    """A tensor as its own checkpoint has it."""
    rows = aligned_rows(tensor.source, tensor)
    if not rows.shape:
        yield tensor.source.checkpoint.read(tensor.source.name).to(dtype)
        return
    for block in cut(rows.shape, BLOCK_ELEMENTS):
        yield rows[block.rows].to(dtype)


def merged_blocks(
    group: TensorGroup,
    job: ExecutionConfig,
    parameters: Mapping[str, Any],
    dtype: torch.dtype,
    observers: Observers = (),
) -> Iterator[Sequence[Tensor]]:
    """Merge one tensor block by block in fp32, relax it, and yield each result's block on the CPU, rounded once.

    What is yielded may be overwritten once more is asked for.
    """
    for made in merged_tasks([partial(task_of, group, job, parameters, dtype, observers)], job):
        yield from made


def _later(task: Callable[[], TensorTask], job: ExecutionConfig) -> Iterator[Sequence[Tensor]]:
    """The blocks of a task that is known, or turns out to be impossible, when the first is asked for."""
    yield from made_blocks(task(), job)


def made_blocks(task: TensorTask, job: ExecutionConfig) -> Iterator[Sequence[Tensor]]:
    """Yield a task's blocks made where they are: by a kernel where there is one and nothing observes the values."""
    group = task.group
    kernel = None if task.observed else kernel_for(group, job)
    made: Iterable[Sequence[Tensor] | Block] = group.blocks()
    if kernel is not None:
        made = fused_blocks(kernel, group, job, task.parameters, task.block_arguments, task.dtype)
    for block in made:
        if isinstance(block, Block):
            yield [result.cpu() for result in task.make(block, group, task.block_arguments.for_block(block))]
        else:
            yield block


def task_of(
    group: TensorGroup,
    job: ExecutionConfig,
    parameters: Mapping[str, Any],
    dtype: torch.dtype,
    observers: Observers = (),
) -> TensorTask:
    """Find out what the method must know of the whole tensor, and say how its blocks are made."""
    method, tensor_statistics = job.method, job.method.tensor_statistics
    known = parameters if job.model_statistics is None else {**parameters, STATISTICS: job.model_statistics}
    block_arguments: BlockArguments = ConstantArguments()
    if tensor_statistics is not None:
        block_arguments = tensor_statistics(group, **select_arguments(tensor_statistics, known))
    arguments = select_arguments(method.merge_block, parameters)

    def make(block: Block, there: TensorGroup, found: Mapping[str, Any]) -> list[Tensor]:
        """One block's results on the group's device, rounded; found: what `per_block` says of it."""
        base = there.base_block(block) if there.base is not None else None
        given = {**arguments, **found}
        merged = method.merge_block(base, there.model_blocks(block), **given)
        results: Sequence[Tensor] = [merged]
        if job.relaxation is not None:
            assert base is not None
            results = job.relaxation.block(group.name, block, base, merged)
        for observer, result in zip(observers, results, strict=False):
            if observer is not None:
                observer.block(block, there, result, given)
        rounded = {id(result): result.to(dtype) for result in results}  # once where they are one tensor
        return [rounded[id(result)] for result in results]

    return TensorTask(group, block_arguments, make, dtype, parameters, any(observers))


def merge_group(group: TensorGroup, job: ExecutionConfig, parameters: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """Return a whole merged tensor, for callers that hold one anyway."""
    return torch.cat([block.clone() for (block,) in merged_blocks(group, job, parameters, dtype)])


def _by_reference(group: TensorGroup, job: ExecutionConfig, parameters: Mapping[str, Any]) -> Sequence[Tensor]:
    base = None if group.base is None else group.base[:].to(torch.bfloat16)
    finetuned = [tensor[:].to(torch.bfloat16) for tensor in group.finetuned]
    known = {**parameters, LAYOUT: group.is_in_out}
    reference = job.method.reference
    assert reference is not None  # the recipe was checked
    merged = reference(base, finetuned, **select_arguments(reference, known))
    if job.relaxation is None:
        return [merged]
    assert base is not None
    return job.relaxation.reference(group.name, base, merged)


def _remark(nonfinite: Nonfinite, observer: Observer | None) -> Mapping[str, Any]:
    """What is kept with a finished tensor."""
    remark: dict[str, Any] = {"nonfinite": nonfinite.count} if nonfinite.count else {}
    return remark if observer is None else {**remark, "layer_statistics": dict(observer.summary())}
