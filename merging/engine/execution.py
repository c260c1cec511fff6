"""How to make every tensor of a plan, and whom the loop over them talks to: relaxation, observers, writers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from merging.methods.contract import Method
from merging.ops.kernels.kernels import Kernels
from merging.ops.tensor_blocks import Block, TensorGroup
from merging.plan.types import TensorPlan


class Relaxation(Protocol):
    """AIM's part of the loop, given by `aim.relaxer`; merging itself knows nothing of activations.

    It makes one result for each of its omegas, from one read.
    """

    @property
    def omegas(self) -> Sequence[float]:
        """What the results differ in."""

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
        """Whether that tensor's results are not simply the merged tensor."""

    def compute_into(
        self, kernels: Kernels, name: str, block: Block, base: Tensor, merged: Tensor, out: Sequence[Tensor]
    ) -> bool:
        """Do as `block` with a compiled kernel, into a tensor for each omega; False where it declines."""


class Observer(Protocol):
    """Sees every merged block beside what it was made of, for the layer statistics."""

    def block(self, block: Block, group: TensorGroup, merged: Tensor, given: Mapping[str, Any]) -> None:
        """Take account of a block: merged (rows, ...) fp32; `given` is what the method got for it."""

    def summary(self) -> Mapping[str, Any]:
        """Return what was found over the tensor, for JSON."""


class Writer(Protocol):
    """Where finished tensors go, in the plan's order: `merging.output.writer.ShardedWriter`."""

    @property
    def done(self) -> int:
        """How many tensors of the plan are written."""

    def begin(self, name: str) -> None:
        """Start the next tensor of the plan."""

    def add(self, block: Tensor) -> None:
        """Write the tensor's next rows."""

    def end(self, remark: Mapping[str, Any]) -> None:
        """Finish the tensor, keeping a remark with it."""


@dataclass(frozen=True)
class ExecutionConfig:
    """How to make every tensor: the method's functions and how to compute.

    survey: what the method's `survey` found over all tensors, where it has one. observe: gives an observer for a
    tensor, where the run is to be described. block_elements: of one tensor, None for what suits the device. compiled:
    whether kernels may make blocks, to the same bytes. moved: whether blocks go through
    `merging.engine.device_pipeline`, which is made for a GPU and gives the same bytes on the CPU; None where the device
    is one.
    """

    method: Method
    device: torch.device
    seed: int = 42
    reference: bool = False
    relaxation: Relaxation | None = None
    allow_nonfinite: bool = False
    model_statistics: object = None
    make_collector: Callable[[TensorPlan], Observer] | None = None
    block_elements: int | None = None
    compiled: bool = True
    device_pipeline: bool | None = None

    @property
    def uses_device_pipeline(self) -> bool:
        """Whether blocks go through `merging.engine.device_pipeline`."""
        return self.device.type == "cuda" if self.device_pipeline is None else self.device_pipeline

    @property
    def is_by_tensor(self) -> bool:
        """True where a tensor is made in one block."""
        return self.relaxation is not None and self.relaxation.needs_whole_tensors

    @property
    def results(self) -> int:
        """How many results are made from one read."""
        return 1 if self.relaxation is None else len(self.relaxation.omegas)
