"""Controls of AIM: functions of s (..., channels) that keep a property of it and drop its link to the activations."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from merging.checkpoints.row_sums import row_sums


def generator_of(seed: int, name: str) -> torch.Generator:
    """Return a generator that depends on the seed and the tensor's name alone."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def uniform(s: Tensor) -> Tensor:
    """Return the mean of s in every channel, each matrix of a stack its own."""
    return s.double().mean(-1, keepdim=True).float().expand_as(s).contiguous()


def permuted(s: Tensor, generator: torch.Generator) -> Tensor:
    """Return s in a random order of the channels, each matrix of a stack in its own."""
    return _by_matrix(s, lambda row: row[torch.randperm(len(row), generator=generator)])


def random(s: Tensor, generator: torch.Generator) -> Tensor:
    """Return as many values of s, drawn with replacement, each matrix of a stack from its own."""
    return _by_matrix(s, lambda row: row[torch.randint(len(row), (len(row),), generator=generator)])


def reversed_order(s: Tensor) -> Tensor:
    """Return the values of s so that the channel with the k-th smallest gets the k-th largest."""
    order = s.argsort(dim=-1, stable=True)
    return torch.empty_like(s).scatter_(-1, order, s.gather(-1, order).flip(-1))


def weight_magnitudes(weight: Tensor, axis: int, stacked: bool) -> Tensor:
    """Return the mean |W| per input channel, fp32.

    weight: any shape, its channels along `axis`; stacked: a matrix per entry of axis 0. -> (channels,) or (experts,
    channels). Sums of rows of fixed order, so that no number of threads enters.
    """
    matrices = weight.movedim(axis, -1).float().abs()
    if stacked:
        return torch.stack([_column_means(matrix) for matrix in matrices])
    return _column_means(matrices)


def _column_means(matrix: Tensor) -> Tensor:
    columns = matrix.reshape(-1, matrix.shape[-1]).T.contiguous()
    return torch.tensor(row_sums(columns), dtype=torch.float64).div(columns.shape[1]).float()


def factor_of_equal_norm(difference: Tensor, pull: Tensor) -> float:
    """Return f in [0, 1] with |f tau| = |(1 - pull) o tau|, so that uniform shrinking leaves the norm that AIM leaves.

    difference: tau (rows, ...) fp32; pull: (1 - omega) s, broadcastable to it. 1 for a tensor without a difference.
    """
    tau = difference.double()
    tau = tau.reshape(tau.shape[0], -1) if tau.dim() > 1 else tau[None]
    remaining = (difference.double() * (1.0 - pull.double())).reshape(tau.shape)
    squares, kept_squares = (math.fsum(row_sums(t.square())) for t in (tau, remaining))
    return math.sqrt(kept_squares / squares) if squares > 0 else 1.0


def _by_matrix(s: Tensor, change) -> Tensor:  # type: ignore[no-untyped-def]
    return change(s) if s.dim() == 1 else torch.stack([change(row) for row in s])
