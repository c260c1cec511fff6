"""Making the tensors of a planned adapter, one at a time: fp64 inside, one rounding to the dtype that is stored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from merging.checkpoints.row_sums import row_sums
from merging.engine import loop
from merging.engine.execution import ExecutionConfig
from merging.engine.execution import Relaxation as OfBlocks
from merging.lora.algebra import coefficients
from merging.lora.layout import Entry, Sum, Term
from merging.plan.types import TensorPlan


class Relaxation(OfBlocks, Protocol):
    """AIM's part, given by `aim.relaxer`: by channel for factors, by block for what is whole."""

    def pulls(self, name: str, axis: int) -> Sequence[Tensor] | None:
        """Return (1 - omega) s (channels,) fp64 with each omega for a tensor of the base, None if it is left as it is.

        axis: the one that its input channels run along.
        """


@dataclass(frozen=True)
class Maker:
    """Computes the tensors of a plan, one result for each omega. job: how whole tensors are made and relaxed."""

    method: str
    job: ExecutionConfig
    relaxation: Relaxation | None = None

    def blocks(self, entry: Entry) -> Iterator[Sequence[Tensor]]:
        """Yield a tensor in blocks of rows, in the dtype that is planned, on the CPU: one for each of the results."""
        if isinstance(entry.origin, TensorPlan):
            yield from loop.iter_blocks(entry.origin, self.job)
            return
        dtype = getattr(torch, entry.dtype)
        if entry.side == "B":
            yield [self._b(entry.origin).to(dtype)] * self.job.results
            return
        yield [a.to(dtype) for a in self._a(entry.origin)]

    def _a(self, sum_: Sum) -> Sequence[Tensor]:
        """A (rank, in) as each omega leaves it."""
        a = _joined([_read(term, "A") for term in sum_.terms], 0)
        axis = 0 if sum_.terms[0].product.transposed else 1
        pulls = self.relaxation.pulls(sum_.name, axis) if self.relaxation else None
        return [a] * self.job.results if pulls is None else [relax_columns(a, pull) for pull in pulls]

    def _b(self, sum_: Sum) -> Tensor:
        """B (out, rank), each adapter's columns times its multiplier."""
        parts = zip(sum_.terms, multipliers(self.method, sum_), strict=True)
        return _joined([_read(term, "B") if m == 1 else _read(term, "B").double() * m for term, m in parts], 1)


def relax_columns(a: Tensor, pull: Tensor) -> Tensor:
    """Return A diag(1 - pull): the columns of the task vector s B A shrink by it.

    a (rank, in) of any dtype, pull (in,) or (1,) fp64 in [0, 1] -> (rank, in) fp64, or A itself where nothing pulls.
    Exact at both ends: a column keeps its bits where pull is 0 and is +0 where it is 1.
    """
    if not bool((pull > 0).any()):
        return a
    wide = a.double()
    return torch.where(pull == 0, wide, torch.where(pull == 1, 0.0, wide * (1.0 - pull)))


def multipliers(method: str, sum_: Sum) -> list[float]:
    """Return c_t s_t / s for the adapters of a sum, exactly 1 where that is all that rounding leaves."""
    c = coefficients(method, sum_.name, sum_.parameters, sum_.models, lambda: inner_products(sum_))
    ratios = [c[term.model] * term.product.scaling / sum_.scaling for term in sum_.terms]
    return [float(round(m)) if abs(abs(m) - 1) <= 1e-12 else m for m in ratios]


def inner_products(sum_: Sum) -> Tensor:
    """Return <tau_i, tau_j> (models, models) fp64 of tau_t = s_t B_t A_t, without making any of them.

        <B_i A_i, B_j A_j> = sum over (A_i A_j^T) o (B_i^T B_j)

    Row sums of fixed order, their total rounded once: no number of threads enters.
    """
    factors = {t.model: (t.product.scaling, _read(t, "A").double(), _read(t, "B").double()) for t in sum_.terms}
    products = torch.zeros(sum_.models, sum_.models, dtype=torch.float64)
    for i, (s, a, b) in factors.items():
        for j, (other, a_j, b_j) in factors.items():
            if j <= i:
                parts = [
                    x * y
                    for row, column in zip(a, b.T, strict=True)
                    for x, y in zip(row_sums(a_j * row), row_sums(b_j.T * column), strict=True)
                ]
                products[i, j] = products[j, i] = s * other * math.fsum(parts)
    return products


def _read(term: Term, side: str) -> Tensor:
    key = term.product.pair.a if side == "A" else term.product.pair.b
    rows = term.adapter.rows(key)
    return rows[slice(None)]


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    """Parts side by side, widened without loss where their dtypes differ."""
    if len(parts) == 1:
        return parts[0]
    kinds = {part.dtype for part in parts}
    return torch.cat(parts if len(kinds) == 1 else [part.double() for part in parts], axis)
