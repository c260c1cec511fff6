"""Configuration of an execution, its task for one tensor, and the interfaces of relaxation, collectors and writers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from merging.methods.contract import STATISTICS, Method, select_arguments
from merging.ops.block_arguments import BlockArguments, ConstantArguments
from merging.ops.kernels.kernels import Kernels
from merging.ops.tensor_blocks import Block, TensorGroup
from merging.plan.types import TensorPlan


class Relaxation(Protocol):
    """AIM's part of the loop, implemented by `aim.relaxer`; merging itself does not depend on activations.

    It computes one result for each of its omegas, from one read.
    """

    @property
    def omegas(self) -> Sequence[float]:
        """The omega of each result."""

    @property
    def needs_whole_tensors(self) -> bool:
        """True where `block` must get a tensor as one block."""

    def block(self, name: str, block: Block, base: Tensor, merged: Tensor) -> Sequence[Tensor]:
        """Relax the merged rows of a block towards the base's, both (rows, ...) fp32, with each omega.

        A stack of matrices may come as one long matrix (rows, columns).
        """

    def reference(self, name: str, base: Tensor, merged: Tensor) -> Sequence[Tensor]:
        """Relax a whole tensor with the original's bf16 arithmetic, with each omega."""

    def changes(self, name: str) -> bool:
        """Return False if that tensor's results are the merged tensor."""

    def compute_into(
        self, kernels: Kernels, name: str, block: Block, base: Tensor, merged: Tensor, out: Sequence[Tensor]
    ) -> bool:
        """Do as `block` with a compiled kernel, into a tensor for each omega; False where it declines."""


class Collector(Protocol):
    """Collects statistics of a result, block by block, while it is merged."""

    def block(self, block: Block, group: TensorGroup, merged: Tensor, arguments: Mapping[str, object]) -> None:
        """Add a block: merged (rows, ...) fp32; arguments: those of the method's block function."""

    def summary(self) -> Mapping[str, object]:
        """Return the statistics of the tensor, for JSON."""


class Writer(Protocol):
    """Destination of finished tensors, in the plan's order: `merging.output.writer.ShardedWriter`."""

    @property
    def done(self) -> int:
        """Number of tensors of the plan that are written."""

    def begin(self, name: str) -> None:
        """Start the next tensor of the plan."""

    def add(self, block: Tensor) -> None:
        """Write the tensor's next rows."""

    def end(self, metadata: Mapping[str, object]) -> None:
        """Finish the tensor, and store metadata with it."""


@dataclass(frozen=True)
class ExecutionConfig:
    """The method and the manner in which every tensor is computed.

    Attributes:
        method: the merge method.
        device: of the computation.
        seed: of random masks.
        reference: repeat the original program's bf16 arithmetic.
        relaxation: AIM's relaxation of the merged tensors, with one result for each omega.
        allow_nonfinite: write NaN and infinity, and count them.
        model_statistics: result of the method's `model_statistics`.
        make_collector: returns a collector of the statistics of a tensor, if they are wanted.
        block_elements: elements of one tensor per block; None for the device's default.
        compiled: let compiled kernels compute blocks, to the same bytes.
        device_pipeline: stream blocks through `merging.engine.device_pipeline`, to the same bytes; None: on a GPU.
    """

    method: Method
    device: torch.device
    seed: int = 42
    reference: bool = False
    relaxation: Relaxation | None = None
    allow_nonfinite: bool = False
    model_statistics: object = None
    make_collector: Callable[[TensorPlan], Collector] | None = None
    block_elements: int | None = None
    compiled: bool = True
    device_pipeline: bool | None = None

    @property
    def uses_device_pipeline(self) -> bool:
        """True where blocks go through `merging.engine.device_pipeline`."""
        return self.device.type == "cuda" if self.device_pipeline is None else self.device_pipeline

    @property
    def is_by_tensor(self) -> bool:
        """True where a tensor is computed in one block."""
        return self.relaxation is not None and self.relaxation.needs_whole_tensors

    @property
    def results(self) -> int:
        """Number of results that are computed from one read."""
        return 1 if self.relaxation is None else len(self.relaxation.omegas)


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
    if tensor_statistics is None or config.reference:
        return TensorTask(group, config, parameters, dtype, ConstantArguments(), collectors)
    available = dict(parameters)
    if config.model_statistics is not None:
        available[STATISTICS] = config.model_statistics
    block_arguments = tensor_statistics(group, **select_arguments(tensor_statistics, available))
    return TensorTask(group, config, parameters, dtype, block_arguments, collectors)
