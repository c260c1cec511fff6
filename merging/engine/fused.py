"""Blocks made by a compiled kernel: from the stored types to the result's in one pass, several blocks at a time.

The bytes are those of the method's torch expression, which makes every block that a kernel declines: where an input or
the result is not finite.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.threads import in_order, threads
from merging.engine.finite_check import Finite
from merging.methods.contract import select_arguments
from merging.ops.block_arguments import BlockArguments
from merging.ops.kernels.kernels import KINDS, MAX_MODELS, Kernels, kernels
from merging.ops.tensor_blocks import Block, TensorGroup

if TYPE_CHECKING:
    from merging.engine.execution import ExecutionConfig

AHEAD = 2
"""Blocks that may wait for the writer."""


def kernel_for(group: TensorGroup, job: ExecutionConfig) -> Kernels | None:
    """Return the kernels where they can make this tensor's blocks, else None."""
    able = job.method.kernel_spec is not None and job.compiled and group.device.type == "cpu"
    able = able and len(group.finetuned) <= MAX_MODELS
    return kernels() if able else None


def fused_blocks(
    compiled: Kernels,
    group: TensorGroup,
    job: ExecutionConfig,
    arguments: Mapping[str, object],
    block_arguments: BlockArguments,
    dtype: torch.dtype,
) -> Iterator[Sequence[Tensor] | Block]:
    """Yield the results of each block in `dtype`, or the block itself where it must be computed plainly.

    A yielded tensor is overwritten after the next ones: its reader is done with it when it asks for more.
    """  # fmt: skip
    kernel_spec, relaxation = job.method.kernel_spec, job.relaxation
    assert kernel_spec is not None
    fixed = select_arguments(kernel_spec, arguments)
    kind = dtype if dtype in KINDS else torch.float32
    relaxes = relaxation is not None and relaxation.changes(group.name)
    blocks = list(group.blocks())
    largest = max(block.elements for block in blocks)
    slots = min(len(blocks), threads() + AHEAD + 1)
    ring = [[torch.empty(largest, dtype=kind) for _ in range(job.results if relaxes else 1)] for _ in range(slots)]
    between = [torch.empty(largest) for _ in ring] if relaxes else [outs[0] for outs in ring]

    def work(item: tuple[Block, int]) -> Sequence[Tensor] | Block:
        block, slot = item
        shape = (block.stop - block.start, *group.shape[1:])
        by_block = block_arguments.for_kernel(block)
        spec = None if by_block is None else kernel_spec(**fixed, **select_arguments(kernel_spec, by_block))
        base = None if group.base is None else group.base[block.rows]
        models = [model[block.rows] for model in group.finetuned]
        merged, *out = (t[: block.elements].view(shape) for t in (between[slot], *ring[slot]))
        if spec is None or not compiled.compute_into(spec, base, models, block, merged):
            return block
        if relaxation is not None and relaxes:
            assert base is not None
            if not relaxation.compute_into(compiled, group.name, block, base, merged, out):
                return block
        rounded = out if kind is dtype else [tensor.to(dtype) for tensor in out]
        results = rounded if relaxes else rounded * job.results
        return Finite(results) if kind is dtype else results  # in another dtype it may be infinite

    yield from in_order(work, zip(blocks, itertools.cycle(range(slots)), strict=False), AHEAD)
