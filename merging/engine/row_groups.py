"""A tensor of the plan as the group of rows that a method merges, every model's in the result's order."""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor

from merging.checkpoints.storage import Rows
from merging.engine.device_pipeline import block_elements_for
from merging.engine.execution import ExecutionConfig
from merging.engine.mean_row import mean_row
from merging.ops.tensor_blocks import TensorGroup
from merging.plan.types import Source, TensorPlan, source_of
from merging.tokenizers.vocabulary import AlignedRows, ChosenRow, gather

WHOLE = sys.maxsize
"""Elements per block of a tensor that is made in one."""


def group_of(tensor: TensorPlan, job: ExecutionConfig) -> TensorGroup:
    """Return the tensor in the base and in every model, its rows in the result's order.

    A stack of matrices is one long matrix to a method that goes by entry, so that a block need not hold a whole one.
    """
    flat = job.method.elementwise and len(tensor.shape) > 2

    def rows_of(source: Source) -> Rows:
        rows = aligned_rows(source, tensor)
        return rows.flatten(0, -2) if flat and isinstance(rows, Tensor) else rows

    return TensorGroup(
        name=tensor.name,
        base=None if tensor.base is None else rows_of(tensor.base),
        finetuned=tuple(rows_of(source) for source in tensor.models),
        device=job.device,
        seed=job.seed,
        is_embedding=tensor.is_embedding,
        transposed=tensor.transposed,
        block_elements=WHOLE if job.is_by_tensor else job.block_elements or block_elements_for(job.device),
    )


def aligned_rows(source: Source, tensor: TensorPlan) -> Rows:
    """Return a source's tensor by rows, in the order of the tensor of the plan; a single number is a vector of one."""
    rows = source.checkpoint.rows(source.name)
    if not rows.shape:
        return source.checkpoint.read(source.name).reshape(1)
    if source.alignment is None:
        return rows
    return AlignedRows(rows, source.alignment, partial(_fill, tensor, source))


def _fill(tensor: TensorPlan, asking: Source, wanted: Tensor) -> Tensor:
    """Return the rows that a model lacks, fp32: the base's, else the mean of the models that have them.

    A model without a token then has no part in it. A base that only gives tokenizer and config counts as well; where
    no base is given, none of the models stands for one. Rows that nobody has are the mean of the model's own.
    """
    rows = torch.zeros(len(wanted), *tensor.shape[1:])
    lacking = torch.ones(len(wanted), dtype=torch.bool)
    is_model = any(source.checkpoint is tensor.source.checkpoint for source in tensor.models)
    bases = [*([tensor.base] if tensor.base else []), *([] if is_model else [tensor.source])]
    for source in bases:
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
    rows /= count.clamp(min=1).reshape(-1, *[1] * (rows.dim() - 1))
    chosen = asking.alignment.chosen if asking.alignment else {}
    for i, row in enumerate(wanted.tolist() if chosen else ()):
        if row in chosen:
            rows[i] = _chosen_row(tensor, chosen[row])
    return rows


def _chosen_row(tensor: TensorPlan, wish: ChosenRow) -> Tensor:
    """The row (...) that a recipe asks for, fp32, from that checkpoint's tensor of the same role."""
    if wish.checkpoint is None:
        return torch.zeros(tensor.shape[1:])
    source = source_of(tensor, wish.checkpoint)
    assert source is not None  # preflight refuses it
    return gather(source.checkpoint.rows(source.name), torch.tensor([wish.row]))[0]


def _take(source: Source, wanted: Tensor) -> Tensor:
    index = wanted if source.alignment is None else source.alignment.index[wanted]
    return gather(source.checkpoint.rows(source.name), index)


def _has(source: Source, wanted: Tensor) -> Tensor:
    if source.alignment is None:
        return torch.ones(len(wanted), dtype=torch.bool)
    return source.alignment.index[wanted] >= 0
