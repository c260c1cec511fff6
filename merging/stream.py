"""The only loop over tensors: read by name, merge block by block in fp32, relax, round once, write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from merging.finite import Nonfinite, blamed, sources_of
from merging.fused import fused_blocks, kernel_for
from merging.job import Job, Observer, Writer
from merging.mean_row import mean_row
from merging.planned import Listing, Plan, Source, TensorPlan
from merging.processes import ALONE, Processes
from merging.registry import accepted
from merging.rows import Rows
from merging.tensors import BLOCK_ELEMENTS, Block, TensorGroup, cut
from merging.transfers import elements_for, moved_blocks
from merging.vocabulary import AlignedRows, gather


def run(
    plan: Listing,
    job: Job,
    writers: Sequence[Writer],
    quiet: bool = False,
    label: str = "merging",
    make: Callable[..., Iterator[Sequence[Tensor]]] | None = None,
    processes: Processes = ALONE,
) -> None:
    """Make every tensor of the plan that is not written yet and hand it to the writers, block by block.

    One writer for each of the results that `make` (`tensor_blocks`, with the same arguments) makes; all have written
    the same tensors. Raises StoppedError once another of the processes has ended.
    """
    make = make or tensor_blocks
    done = writers[0].done
    tensor: Any  # whatever `make` takes
    bar = tqdm(plan.tensors, unit="tensor", desc=label, disable=True if quiet else None, initial=done)
    for tensor in plan.tensors[done:]:
        observers = [job.observe(tensor) if job.observe else None for _ in writers]
        inputs = partial(sources_of, tensor) if isinstance(tensor, TensorPlan) else tuple
        nonfinite = [Nonfinite(tensor.name, job.allow_nonfinite, inputs) for _ in writers]
        for writer in writers:
            writer.begin(tensor.name)
        with blamed(inputs):
            for blocks in make(tensor, job, observers):
                processes.check()
                for writer, check, block in zip(writers, nonfinite, blocks, strict=True):
                    writer.add(check.check(block))
        for writer, check, observer in zip(writers, nonfinite, observers, strict=True):
            writer.end(_remark(check, observer))
        bar.update()
    bar.close()


def with_survey(plan: Plan, job: Job) -> Job:
    """Return the job with what the method must know of all tensors at once, where it must."""
    survey = job.implementation.survey
    if survey is None:
        return job
    merged = [tensor for tensor in plan.tensors if tensor.is_merged]
    parameters = merged[0].parameters if merged else {}
    return replace(job, survey=survey(lambda: (group_of(tensor, job) for tensor in merged), parameters))


def tensor_blocks(
    tensor: TensorPlan, job: Job, observers: Sequence[Observer | None] = ()
) -> Iterator[Sequence[Tensor]]:
    """Yield one output tensor in blocks of rows, in the plan's dtype, on the CPU: one for each of the job's results.

    What is yielded may be overwritten once more is asked for.
    """
    dtype = getattr(torch, tensor.dtype)
    if not tensor.is_merged or 0 in tensor.shape:
        for block in _copied(tensor, dtype):
            yield [block] * job.results
    elif job.reference:
        yield [t.to(dtype).reshape(tensor.shape) for t in _by_reference(group_of(tensor, job), job, tensor.parameters)]
    else:
        scalar = not tensor.shape
        for blocks in merged_blocks(group_of(tensor, job), job, tensor.parameters, dtype, observers):
            yield [block.reshape(()) for block in blocks] if scalar else blocks


def _copied(tensor: TensorPlan, dtype: torch.dtype) -> Iterator[Tensor]:
    """A tensor as its own checkpoint has it."""
    rows = _rows(tensor.own, tensor)
    if not rows.shape:
        yield tensor.own.checkpoint.read(tensor.own.name).to(dtype)
        return
    for block in cut(rows.shape, BLOCK_ELEMENTS):
        yield rows[block.rows].to(dtype)


def group_of(tensor: TensorPlan, job: Job) -> TensorGroup:
    """Return the tensor in the base and in every model, its rows in the result's order.

    A stack of matrices is one long matrix to a method that goes by entry, so that a block need not hold a whole one.
    """
    flat = job.implementation.by_entry and len(tensor.shape) > 2

    def rows_of(source: Source) -> Rows:
        rows = _rows(source, tensor)
        return rows.flatten(0, -2) if flat and isinstance(rows, Tensor) else rows

    return TensorGroup(
        name=tensor.name,
        base=None if tensor.base is None else rows_of(tensor.base),
        finetuned=tuple(rows_of(source) for source in tensor.models),
        device=job.device,
        seed=job.seed,
        is_embedding=tensor.is_embedding,
        transposed=tensor.transposed,
        block_elements=job.block_elements or elements_for(job.device),
    )


def _rows(source: Source, tensor: TensorPlan) -> Rows:
    rows = source.checkpoint.rows(source.name)
    if not rows.shape:
        return source.checkpoint.read(source.name).reshape(1)
    if source.alignment is None:
        return rows
    return AlignedRows(rows, source.alignment, partial(_fill, tensor, source))


def _fill(tensor: TensorPlan, asking: Source, wanted: Tensor) -> Tensor:
    """Rows that a model lacks, fp32: the base's, else the donor's, else the mean of the models that have them.

    A model without a token then has no part in it. Rows that nobody has are the mean of its own.
    """
    rows = torch.zeros(len(wanted), *tensor.shape[1:])
    lacking = torch.ones(len(wanted), dtype=torch.bool)
    for source in (tensor.base or tensor.own, tensor.own):
        found = lacking & _has(source, wanted)
        rows[found] = _take(source, wanted[found])
        lacking &= ~found
    count = torch.zeros(len(wanted), dtype=torch.int64)
    for source in tensor.models:
        found = lacking & _has(source, wanted)
        rows[found] += _take(source, wanted[found])
        count += found
    nobody = lacking & (count == 0)
    if bool(nobody.any()):
        rows[nobody] = mean_row(asking)
    return rows / count.clamp(min=1).reshape(-1, *[1] * (rows.dim() - 1))


def _take(source: Source, wanted: Tensor) -> Tensor:
    index = wanted if source.alignment is None else source.alignment.index[wanted]
    return gather(source.checkpoint.rows(source.name), index)


def _has(source: Source, wanted: Tensor) -> Tensor:
    if source.alignment is None:
        return torch.ones(len(wanted), dtype=torch.bool)
    return source.alignment.index[wanted] >= 0


def merged_blocks(
    group: TensorGroup,
    job: Job,
    parameters: Mapping[str, Any],
    dtype: torch.dtype,
    observers: Sequence[Observer | None] = (),
) -> Iterator[Sequence[Tensor]]:
    """Merge one tensor block by block in fp32, relax it, and yield each result's block on the CPU, rounded once.

    What is yielded may be overwritten once more is asked for.
    """
    implementation = job.implementation
    known = parameters if job.survey is None else {**parameters, "survey": job.survey}
    per_block = implementation.prepare(group, known) if implementation.prepare else None
    arguments = accepted(implementation.merge, parameters)

    def make(block: Block, there: TensorGroup, found: Mapping[str, Any]) -> list[Tensor]:
        """One block's results on the group's device, rounded; found: what `per_block` says of it."""
        base = there.base_block(block) if there.base is not None else None
        given = {**arguments, **found}
        merged = implementation.merge(base, there.model_blocks(block), **given)
        results: Sequence[Tensor] = [merged]
        if job.relaxation is not None:
            assert base is not None
            results = job.relaxation.block(group.name, block, base, merged)
        for observer, result in zip(observers, results, strict=False):
            if observer is not None:
                observer.block(block, there, result, given)
        rounded = {id(result): result.to(dtype) for result in results}  # once where they are one tensor
        return [rounded[id(result)] for result in results]

    if job.moves:
        yield from moved_blocks(group, per_block, make)
        return
    kernel = None if any(observers) else kernel_for(group, job)
    made: Iterable[Sequence[Tensor] | Block] = group.blocks()
    if kernel is not None:
        made = fused_blocks(kernel, group, job, arguments, per_block, dtype)
    for block in made:
        if isinstance(block, Block):
            yield [result.cpu() for result in make(block, group, per_block(block) if per_block else {})]
        else:
            yield block


def merge_group(group: TensorGroup, job: Job, parameters: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """Return a whole merged tensor, for callers that hold one anyway."""
    return torch.cat([block.clone() for (block,) in merged_blocks(group, job, parameters, dtype)])


def _by_reference(group: TensorGroup, job: Job, parameters: Mapping[str, Any]) -> Sequence[Tensor]:
    base = None if group.base is None else group.base[:].to(torch.bfloat16)
    finetuned = [tensor[:].to(torch.bfloat16) for tensor in group.finetuned]
    known = {**parameters, "is_embedding": group.inputs_first}
    reference = job.implementation.reference
    assert reference is not None  # the recipe was checked
    merged = reference(base, finetuned, **accepted(reference, known))
    if job.relaxation is None:
        return [merged]
    assert base is not None
    return job.relaxation.reference(group.name, base, merged)


def _remark(nonfinite: Nonfinite, observer: Observer | None) -> Mapping[str, Any]:
    """What is kept with a finished tensor."""
    remark: dict[str, Any] = {"nonfinite": nonfinite.count} if nonfinite.count else {}
    return remark if observer is None else {**remark, "health": dict(observer.summary())}
