"""Rows of a tensor of the plan in the base and in every model, in the result's order."""

from __future__ import annotations

import sys
from functools import lru_cache, partial

import torch
from torch import Tensor

from merging.checkpoints.storage import Rows
from merging.engine.device_pipeline import block_elements_for
from merging.engine.execution import ExecutionConfig
from merging.ops.tensor_blocks import TILE_ELEMENTS, TensorGroup, cut
from merging.plan.types import Source, TensorPlan, source_of
from merging.tokenizers.vocabulary import AlignedRows, ChosenRow, gather

WHOLE = sys.maxsize
"""Elements per block of a tensor that is computed in one."""


def group_of(tensor: TensorPlan, config: ExecutionConfig) -> TensorGroup:
    """Return the tensor in the base and in every model, its rows in the result's order.

    A stack of matrices is one long matrix to a method that goes by entry, so that a block need not hold a whole one.
    """
    flat = config.method.elementwise and len(tensor.shape) > 2

    def rows_of(source: Source) -> Rows:
        rows = aligned_rows(source, tensor)
        return rows.flatten(0, -2) if flat and isinstance(rows, Tensor) else rows

    return TensorGroup(
        name=tensor.name,
        base=None if tensor.base is None else rows_of(tensor.base),
        finetuned=tuple(rows_of(source) for source in tensor.models),
        device=config.device,
        seed=config.seed,
        is_embedding=tensor.is_embedding,
        transposed=tensor.transposed,
        block_elements=WHOLE if config.is_by_tensor else config.block_elements or block_elements_for(config.device),
    )


def aligned_rows(source: Source, tensor: TensorPlan) -> Rows:
    """Return a source's tensor by rows, in the order of the tensor of the plan; a single number is a vector of one."""
    rows = source.checkpoint.rows(source.name)
    if not rows.shape:
        return source.checkpoint.read(source.name).reshape(1)
    if source.alignment is None:
        return rows
    return AlignedRows(rows, source.alignment, partial(_fill, tensor, source))


def _fill(tensor: TensorPlan, target: Source, indices: Tensor) -> Tensor:
    """Return the rows that a model lacks, fp32: the base's, else the mean of the models that have them.

    A model without a token then has no part in it. A base that only gives tokenizer and config counts as well; where
    no base is given, none of the models stands for one. Rows that no model has are the mean of the model's own.
    """
    rows = torch.zeros(len(indices), *tensor.shape[1:])
    missing = torch.ones(len(indices), dtype=torch.bool)
    is_model = any(source.checkpoint is tensor.source.checkpoint for source in tensor.models)
    bases = [*([tensor.base] if tensor.base else []), *([] if is_model else [tensor.source])]
    for source in bases:
        present = missing & _has(source, indices)
        rows[present] = _take(source, indices[present])
        missing &= ~present
    count = torch.zeros(len(indices), dtype=torch.int64)
    for source in tensor.models:
        present = missing & _has(source, indices)
        rows[present] += _take(source, indices[present])
        count += present
    in_no_model = missing & (count == 0)
    if bool(in_no_model.any()):
        rows[in_no_model] = mean_row(target)
    rows /= count.clamp(min=1).reshape(-1, *[1] * (rows.dim() - 1))
    chosen = target.alignment.chosen if target.alignment else {}
    for i, row in enumerate(indices.tolist() if chosen else ()):
        if row in chosen:
            rows[i] = _chosen_row(tensor, chosen[row])
    return rows


def _chosen_row(tensor: TensorPlan, choice: ChosenRow) -> Tensor:
    """Return the row (...) that a recipe chooses, fp32, from that checkpoint's tensor of the same role."""
    if choice.checkpoint is None:
        return torch.zeros(tensor.shape[1:])
    source = source_of(tensor, choice.checkpoint)
    assert source is not None  # the plan was checked
    return gather(source.checkpoint.rows(source.name), torch.tensor([choice.row]))[0]


def _take(source: Source, indices: Tensor) -> Tensor:
    index = indices if source.alignment is None else source.alignment.index[indices]
    return gather(source.checkpoint.rows(source.name), index)


def _has(source: Source, indices: Tensor) -> Tensor:
    if source.alignment is None:
        return torch.ones(len(indices), dtype=torch.bool)
    return source.alignment.index[indices] >= 0


@lru_cache(maxsize=64)
def mean_row(source: Source) -> Tensor:
    """Return the mean over the rows of a stored tensor, fp32 of its row's shape, added up in fp64 over fixed tiles.

    As a row of the output head its logit is the mean of all the others', so that such an id is never the likeliest; a
    row of zeros could be.
    """
    rows = source.checkpoint.rows(source.name)
    total = torch.zeros(rows.shape[1:], dtype=torch.float64)
    for tile in cut(rows.shape, TILE_ELEMENTS):
        total += rows[tile.rows].double().sum(0)
    return (total / max(1, rows.shape[0])).float()
