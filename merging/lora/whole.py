"""The tensors that adapters hold whole (modules_to_save, biases, embeddings with more rows) beside their factors."""

from __future__ import annotations

from dataclasses import replace

from merging.checkpoints.adapters.adapter import AdaptedWeights
from merging.checkpoints.adapters.adapter_keys import PREFIX, WRAPPERS
from merging.checkpoints.checkpoint import Checkpoint
from merging.plan.types import Source, TensorPlan

COMPARED_ROWS = 4096
"""Rows compared at a time where an adapter stores a tensor that may be its base's."""


def adapted(checkpoint: Checkpoint) -> AdaptedWeights:
    """Return the weights of a checkpoint that was opened as base+adapter."""
    assert isinstance(checkpoint.weights, AdaptedWeights)  # checked when the models were opened
    return checkpoint.weights


def is_whole(tensor: TensorPlan) -> bool:
    """Return True for a tensor of a merge that cannot be a sum of factors.

    Some adapter has it whole, and not only as its base has it; or its rows are other tokens in the result than in the
    base or in an adapter that changes them.
    """
    if tensor.base is not None and (tensor.base.alignment is not None or base_shape(tensor.base) != tensor.shape):
        return True
    for source in tensor.models:
        weights = adapted(source.checkpoint)
        if source.name in weights.whole and not _is_copy(weights, source.name, tensor):
            return True
        if source.name in weights.products and source.alignment is not None:
            return True
    return False


def base_shape(source: Source) -> tuple[int, ...]:
    """Return the shape that a tensor has where it is read."""
    return source.checkpoint.tensors[source.name].shape


def _is_copy(weights: AdaptedWeights, name: str, tensor: TensorPlan) -> bool:
    """Return True where an adapter stores, next to factors, a tensor as the base has it: PEFT saves embeddings so."""
    key = weights.whole[name]
    if name not in weights.products or tensor.base is None or weights.adapter.tensors[key].shape != tensor.shape:
        return False
    if not tensor.base.checkpoint.tensors[tensor.base.name].file.exists():
        return False  # only headers were fetched; the run itself compares
    import torch

    stored, base = weights.adapter.rows(key), tensor.base.checkpoint.rows(tensor.base.name)
    starts = range(0, tensor.shape[0], COMPARED_ROWS)
    blocks = (slice(start, start + COMPARED_ROWS) for start in starts)
    return all(torch.equal(stored[rows].double(), base[rows].double()) for rows in blocks)


def own_key(tensor: TensorPlan) -> str | None:
    """Return the key of a tensor that the one adapter has whole, without an adapter's name; None if it has not."""
    source = tensor.models[0]
    key = adapted(source.checkpoint).whole.get(source.name)
    return None if key is None else PREFIX + _unnamed(key)


def _unnamed(key: str) -> str:
    return key.removeprefix(PREFIX).replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")


def name_in_model(tensor: TensorPlan) -> str:
    """Return what PEFT calls a tensor in the model, by the first adapter that has something for it."""
    for source in tensor.models:
        weights = adapted(source.checkpoint)
        if source.name in weights.whole:
            return WRAPPERS.sub(".", weights.whole[source.name].removeprefix(PREFIX))
    for source in tensor.models:
        weights = adapted(source.checkpoint)
        if source.name in weights.products:
            return f"{weights.products[source.name].pair.module}.weight"
    return tensor.name


def without_products(tensor: TensorPlan) -> TensorPlan:
    """Return the plan of the tensor as the one adapter stores it whole, its factors being stored beside it."""
    checkpoint = tensor.models[0].checkpoint
    weights = adapted(checkpoint)
    bare = AdaptedWeights(weights.base, weights.adapter, {}, weights.whole, weights.heads, weights.config_file)
    view = replace(checkpoint, weights=bare)

    def without_factors(part: Source) -> Source:
        return replace(part, checkpoint=view) if part.checkpoint is checkpoint else part

    return replace(
        tensor, source=without_factors(tensor.source), models=tuple(without_factors(source) for source in tensor.models)
    )


def stored_dtypes(tensor: TensorPlan) -> list[str]:
    """Return the dtypes in which the adapters store a tensor: whole, or where none has it so, its factors."""
    wholes, factors = [], []
    for source in tensor.models:
        weights = adapted(source.checkpoint)
        if source.name in weights.whole:
            wholes.append(weights.adapter.tensors[weights.whole[source.name]].dtype)
        if source.name in weights.products:
            pair = weights.products[source.name].pair
            factors += [weights.adapter.tensors[key].dtype for key in (pair.a, pair.b)]
    return wholes or factors or [tensor.dtype]
