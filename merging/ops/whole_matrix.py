"""Merging of task vectors as whole matrices, shared by TSV-Merge, Iso-C and WUDI.

They are defined for the weights of linear layers. Here a matrix is a tensor of two dimensions whose name ends in
"weight", apart from lookup tables (embeddings of tokens, positions and the like) and the output head, which is one of
the vocabulary's tensors; and each of the slices of a tensor of three dimensions that stacks the experts of a mixture.
Everything else (norms, biases, convolutions, ...) is merged entry by entry.

A matrix is stored [out, in], as torch.nn.Linear stores it (WUDI tells the sides apart, the other two do not).

A matrix is handled in fp64 and its result rounded to fp32 once. Decompositions and products of whole matrices are split
by threads, and their last bits vary with them: by 2e-13 of the largest entry at most, measured between 1 and 2 threads
on matrices of 1024 to 1500 rows. Rounding hides that but for a few entries in a million, which move by one unit in the
last place of fp32. Blocks do not enter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from common.errors import CheckpointError
from merging.checkpoints.tensor_names import role_of, stacks_experts
from merging.ops.block_arguments import ArgumentsByBlock, BlockArguments, ConstantArguments
from merging.ops.consensus import add_to, divided, weighted_sum
from merging.ops.tensor_blocks import Block, TensorGroup

LOOKUP_TABLE = re.compile(r"(^|\.)([^.]*emb[^.]*|wte|wpe|shared|relative_attention_bias)\.weight$")


@dataclass(frozen=True)
class TaskMatrices:
    """The task vectors w_t tau_t of one matrix, read one at a time, so that a method need not hold all of them."""

    group: TensorGroup
    weights: Sequence[float]
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, [out, in] however it is stored."""
        rows, columns = self.group.shape[-2:]
        return (columns, rows) if self.group.is_in_out else (rows, columns)

    @property
    def device(self) -> torch.device:
        """Device on which they are computed."""
        return self.group.device

    def __len__(self) -> int:
        return len(self.weights)

    def read(self, model: int) -> Tensor:
        """Return w_t tau_t of one model (rows, columns) in fp64. Raises CheckpointError for NaN or infinity in it."""
        matrix = torch.empty(self.group.shape[-2:], dtype=torch.float64, device=self.device)
        if self.expert is None:
            for block in self.group.tiles():
                matrix[block.rows] = self._finite(model, block)
        else:
            one = Block(self.expert, self.expert + 1, self.shape[0] * self.shape[1])
            matrix.copy_(self._finite(model, one)[0])
        matrix.mul_(self.weights[model])
        return matrix.T if self.group.is_in_out else matrix

    def _finite(self, model: int, block: Block) -> Tensor:
        task_vector = self.group.task_vector(model, block)
        if not torch.isfinite(task_vector).all():
            raise CheckpointError(
                f"Tensor {self.group.name} holds NaN or infinity in the base or in model {model + 1}; "
                "it cannot be merged as a matrix."
            )
        return task_vector

    def sum(self) -> Tensor:
        """Return sum_t w_t tau_t (rows, columns) in fp64."""
        total = self.read(0)
        for model in range(1, len(self)):
            total += self.read(model)
        return total


MergeMatrix: TypeAlias = Callable[[TaskMatrices], Tensor]
"""Returns the merged task vector of one matrix (rows, columns), fp64."""


def is_matrix(group: TensorGroup) -> bool:
    """Return True for the weight of a linear layer, as far as name and shape tell."""
    if len(group.shape) != 2 or group.is_embedding or not group.name.endswith("weight"):
        return False
    return not LOOKUP_TABLE.search(group.name) and role_of(group.name) is None


def is_stack(group: TensorGroup) -> bool:
    """Return True for a tensor that stacks one matrix per expert."""
    return stacks_experts(group.name, group.shape)


def merge_matrices(group: TensorGroup, weights: Sequence[float], merge_matrix: MergeMatrix) -> BlockArguments:
    """Merge a matrix at once, and the experts of a stack with their block.

    Returns:
        The argument `task_vector` of each block (rows, ...) fp32; None for a tensor that is no matrix.
    """
    if is_stack(group):

        def experts(block: Block) -> dict[str, object]:
            merged = [merge_matrix(TaskMatrices(group, weights, i)).float() for i in range(block.start, block.stop)]
            return {"task_vector": torch.stack(merged)}

        return ArgumentsByBlock(experts)
    if not is_matrix(group):
        return ConstantArguments(task_vector=None)
    merged = merge_matrix(TaskMatrices(group, weights)).float()
    merged = merged.T if group.is_in_out else merged
    return ArgumentsByBlock(lambda block: {"task_vector": merged[block.rows]})


def add_merged(
    base: Tensor,
    finetuned: Tensor,
    *,
    weights: Sequence[float],
    scaling: float,
    task_vector: Tensor | None,
    non_matrix: str = "mean",
) -> Tensor:
    """Return theta_0 + lambda * tau, tau being the merged task vector of a matrix.

        tau = sum_t w_t tau_t / n (non_matrix: mean), sum_t w_t tau_t (sum) or 0 (base) where there is no matrix

    base (rows, ...), finetuned (n, rows, ...), task_vector (rows, ...) or None -> (rows, ...).
    """
    if task_vector is None:
        if non_matrix == "base":
            return base
        task_vector = weighted_sum(finetuned - base, weights)
        if non_matrix == "mean":
            task_vector = divided(task_vector, len(weights))
    return add_to(base, task_vector * scaling)


def decompose(matrix: Tensor, name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (rows, r), the singular values (r,) and V^T (r, columns) without those that are zero to rounding.

    r is the numerical rank in the precision of `dtype`: singular values of more than max(rows, columns) times its
    epsilon times the largest. The directions of a value of zero are arbitrary, no result may depend on them. Raises
    CheckpointError where the decomposition does not converge.
    """
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:
        raise CheckpointError(f"Tensor {name}: the singular value decomposition did not converge.") from None
    limit = max(matrix.shape) * torch.finfo(dtype).eps
    rank = int((s > limit * s[:1]).sum())
    return u[:, :rank], s[:rank], vh[:rank]


def polar(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return the nearest matrix with orthonormal columns (or rows), U V^T, and the singular values that are not zero.

    Zero on the null space of a matrix that lacks rank.
    """
    u, s, vh = decompose(matrix, name)
    return u @ vh, s
