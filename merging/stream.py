"""The only loop over tensors: read by name, merge block by block in fp32, relax, round once, write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from console.errors import CheckpointError, UsageError
from merging.checkpoint import Checkpoint
from merging.preflight import Plan, TensorPlan
from merging.registry import Implementation, accepted
from merging.tensors import Block, TensorGroup
from merging.writer import ShardedWriter


class Relaxation(Protocol):
    """AIM's part of the loop, given by `aim.relax`; merging itself knows nothing of activations."""

    def block(self, name: str, block: Block, base: Tensor, merged: Tensor) -> Tensor:
        """Relax the merged rows of a block towards the base's, both (rows, ...) fp32."""

    def reference(self, name: str, base: Tensor, merged: Tensor) -> Tensor:
        """Relax a whole tensor with the original's bf16 arithmetic."""


@dataclass(frozen=True)
class Job:
    """What to do with every tensor: the method's functions, its parameters, and how to compute."""

    implementation: Implementation
    parameters: Mapping[str, Any]
    device: torch.device
    seed: int = 42
    reference: bool = False
    relaxation: Relaxation | None = None


def resolve_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `cuda:n`. Raises UsageError where it does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, found {name!r}.") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, found {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices.")
    return device


def run(
    plan: Plan,
    job: Job,
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
    donor: Checkpoint,
    writer: ShardedWriter,
    quiet: bool = False,
    label: str = "merging",
) -> None:
    """Merge every tensor of the plan and hand it to the writer.

    The plan's sources are those of the models followed by the base's; `donor` is the checkpoint whose rows the others
    were aligned to (its own tensors count as aligned). Tensors that are not floating point are the donor's.
    """
    bar = tqdm(plan.tensors, unit="tensor", desc=label, disable=True if quiet else None)
    for tensor in bar:
        merged = merge_tensor(tensor, job, base, models, donor)
        check_finite(tensor.name, merged)
        writer.write(tensor.name, merged)


def merge_tensor(
    tensor: TensorPlan, job: Job, base: Checkpoint | None, models: Sequence[Checkpoint], donor: Checkpoint
) -> Tensor:
    """Return one output tensor in the plan's dtype."""
    own = donor.read(tensor.name)
    if not tensor.is_float:
        return own
    checkpoints = [*models, base] if base is not None else list(models)
    inputs = [
        own if checkpoint is donor else _read(tensor, i, checkpoint, own) for i, checkpoint in enumerate(checkpoints)
    ]
    shape = own.shape
    inputs = [x.reshape(1) if x.dim() == 0 else x for x in inputs]
    group = TensorGroup(
        name=tensor.name,
        base=inputs.pop() if base is not None else None,
        finetuned=tuple(inputs),
        device=job.device,
        seed=job.seed,
        is_embedding=tensor.is_embedding,
    )
    dtype = getattr(torch, tensor.dtype)
    merged = _by_reference(group, job).to(dtype) if job.reference else merge_group(group, job, dtype)
    return merged.reshape(shape)


def _read(tensor: TensorPlan, i: int, checkpoint: Checkpoint, own: Tensor) -> Tensor:
    read = checkpoint.read(tensor.sources[i])
    alignment = tensor.alignments[i]
    return read if alignment is None else alignment.apply(read, own)


def merge_group(group: TensorGroup, job: Job, dtype: torch.dtype) -> Tensor:
    """Merge (and relax) one tensor block by block in fp32; the one rounding is to `dtype`. Returns it on the CPU."""
    implementation = job.implementation
    per_block = implementation.prepare(group, job.parameters) if implementation.prepare else None
    arguments = accepted(implementation.merge, job.parameters)
    out = torch.empty(group.shape, dtype=dtype)
    for block in group.blocks():
        base = group.base_block(block) if group.base is not None else None
        merged = implementation.merge(
            base, group.model_blocks(block), **arguments, **(per_block(block) if per_block else {})
        )
        if job.relaxation is not None:
            assert base is not None
            merged = job.relaxation.block(group.name, block, base, merged)
        out[block.rows] = merged.to("cpu")
    return out


def _by_reference(group: TensorGroup, job: Job) -> Tensor:
    base = None if group.base is None else group.base.to(torch.bfloat16)
    finetuned = [tensor.to(torch.bfloat16) for tensor in group.finetuned]
    known = {**job.parameters, "is_embedding": group.is_embedding}
    reference = job.implementation.reference
    assert reference is not None  # the recipe was checked
    merged = reference(base, finetuned, **accepted(reference, known))
    if job.relaxation is not None:
        assert base is not None
        merged = job.relaxation.reference(group.name, base, merged)
    return merged


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor with NaN or infinity in it. Raises CheckpointError naming it."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"Tensor {name} of the result is not finite: an input or a weight is NaN or infinite, "
            f"or {kind} cannot hold the result."
        )
