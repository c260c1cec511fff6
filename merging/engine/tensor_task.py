"""One tensor to merge: its rows, the method's arguments, and the computation of a block of its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merging.engine.execution import Collector, ExecutionConfig
from merging.methods.contract import STATISTICS, select_arguments
from merging.ops.block_arguments import BlockArguments, ConstantArguments
from merging.ops.tensor_blocks import Block, TensorGroup


@dataclass(frozen=True)
class TensorTask:
    """A tensor that an executor merges.

    Attributes:
        group: the tensor in the base and in every model.
        config: the method and the manner of execution.
        parameters: of the method for this tensor.
        dtype: of the results.
        block_arguments: from the method's statistics over this tensor.
        collectors: one for each result, of its statistics, or None.
    """

    group: TensorGroup
    config: ExecutionConfig
    parameters: Mapping[str, object]
    dtype: torch.dtype
    block_arguments: BlockArguments
    collectors: Sequence[Collector | None] = ()

    @property
    def is_observed(self) -> bool:
        """True if collectors need the values that the method's torch expressions compute."""
        return any(self.collectors)

    def compute(self, block: Block) -> list[Tensor]:
        """Merge a block and relax it; returns the results on the group's device, rounded to `dtype`."""
        return self._compute(block, self.group, self.block_arguments.for_block(block))

    def read(self, block: Block) -> list[Tensor]:
        """Return a block's stored rows, the base's first, and the tensors from which its arguments are made."""
        sources = [*([] if self.group.base is None else [self.group.base]), *self.group.finetuned]
        return [*(source[block.rows] for source in sources), *self.block_arguments.on_host(block)]

    def compute_from(self, block: Block, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Do as `compute`, from the tensors that `read` returned, which are on the device by now."""
        count = len(self.group.finetuned) + (self.group.base is not None)
        rows, arguments = tensors[:count], self.block_arguments.from_host(block, tensors[count:])
        return self._compute(block, self.group.at(block, rows), arguments)

    def _compute(self, block: Block, group: TensorGroup, block_arguments: Mapping[str, object]) -> list[Tensor]:
        method, relaxation = self.config.method, self.config.relaxation
        base = group.base_block(block) if group.base is not None else None
        arguments = {**select_arguments(method.merge_block, self.parameters), **block_arguments}
        merged = method.merge_block(base, group.model_blocks(block), **arguments)
        results: Sequence[Tensor] = [merged]
        if relaxation is not None:
            assert base is not None
            results = relaxation.block(group.name, block, base, merged)
        for collector, result in zip(self.collectors, results, strict=False):
            if collector is not None:
                collector.block(block, group, result, arguments)
        rounded = {id(result): result.to(self.dtype) for result in results}  # once where they are one tensor
        return [rounded[id(result)] for result in results]


def make_task(
    group: TensorGroup,
    config: ExecutionConfig,
    parameters: Mapping[str, object],
    dtype: torch.dtype,
    collectors: Sequence[Collector | None] = (),
) -> TensorTask:
    """Compute the method's statistics over a tensor and return its task."""
    tensor_statistics = config.method.tensor_statistics
    block_arguments: BlockArguments = ConstantArguments()
    if tensor_statistics is not None and not config.reference:
        available = dict(parameters)
        if config.model_statistics is not None:
            available[STATISTICS] = config.model_statistics
        block_arguments = tensor_statistics(group, **select_arguments(tensor_statistics, available))
    return TensorTask(group, config, parameters, dtype, block_arguments, collectors)
