"""Interface to the compiled kernels: tensors of fp32 and bf16 on the CPU, contiguous; others are converted first."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_double, c_float, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from merging.ops.kernel_spec import ColumnWeights, KernelSpec, RandomMask, WeightedSum
from merging.ops.kernels.build import library
from merging.ops.order_statistics import LOWER_BINS, Threshold

if TYPE_CHECKING:
    from merging.ops.tensor_blocks import Block

MAX_MODELS = 64
KINDS = {torch.float32: 0, torch.bfloat16: 1}


class _Source(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("kind", c_int64))


class _Term(ctypes.Structure):
    _fields_ = (
        ("source", _Source), ("weight", c_float), ("factor", c_float), ("factors", c_void_p), ("mask", c_void_p),
        ("key", c_void_p), ("limit", c_uint64), ("trim", c_int64), ("threshold", c_float), ("equal", c_int64),
        ("kept", c_int64), ("before", c_int64),
    )  # fmt: skip


SIGNATURES: dict[str, tuple[object, ...]] = {
    "combine": (_Source, POINTER(_Term), c_int64, c_int64, c_int64, c_int64, c_float, c_float, c_int64, c_void_p,
                c_int64, c_int64),
    "by_column": (_Source, POINTER(_Source), c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64),
    "relax": (_Source, _Source, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64),
    "upper_halves": (_Source, _Source, c_void_p, c_int64),
    "lower_halves": (_Source, _Source, c_int64, c_void_p, c_void_p, c_int64),
    "nonfinite": (c_void_p, c_int64, c_int64),
    "squares": (_Source, POINTER(_Source), c_int64, c_int64, c_int64, POINTER(c_double)),
    "magprune": (_Source, _Source, c_int64, c_int64, c_double, c_double, c_void_p, c_int64, c_void_p, c_void_p,
                 c_void_p),
    "variances": (_Source, POINTER(_Source), c_int64, c_void_p, c_int64),
    "words": (c_void_p, c_int64, c_void_p, c_int64),
}  # fmt: skip


@cache
def kernels() -> Kernels | None:
    """Return the kernels, or None where this machine cannot compile them."""
    compiled = library()
    if compiled is None:
        return None
    for name, arguments in SIGNATURES.items():
        getattr(compiled, name).argtypes = arguments
        getattr(compiled, name).restype = c_int64
    return Kernels(compiled)


def raw(tensor: Tensor) -> Tensor:
    """Return the tensor as a kernel reads it: contiguous, fp32 or bf16."""
    return (tensor if tensor.dtype in KINDS else tensor.to(torch.float32)).contiguous()


@dataclass(frozen=True)
class Kernels:
    """The kernels. Those that return False found a value that is not finite: torch must compute their output."""

    compiled: ctypes.CDLL

    def compute_into(
        self, spec: KernelSpec, base: Tensor | None, models: Sequence[Tensor], block: Block, out: Tensor
    ) -> bool:
        """Compute a block as described into out (rows, ...), fp32 or bf16; False where it is not finite."""
        if isinstance(spec, WeightedSum):
            return self.combine(base, models, spec, block, out)
        if base is None or spec.coefficients.shape[1] * out.shape[0] != out.numel():  # columns of another width
            return False
        return self.by_column(base, models, spec, out)

    def combine(
        self, base: Tensor | None, models: Sequence[Tensor], spec: WeightedSum, block: Block, out: Tensor
    ) -> bool:
        """Compute a block of a weighted sum of task vectors into out (rows, ...), fp32 or bf16."""
        inputs = [raw(model) for model in models]  # referenced here while the kernel reads them
        anchor = {"base": base, "first": inputs[0], "nothing": None}[spec.anchor]
        terms = (_Term * len(inputs))()
        keys = []
        for i, (term, model) in enumerate(zip(terms, inputs, strict=True)):
            term.source, term.weight = _source(model), spec.weights[i]
            factor = spec.factors[i] if spec.factors else 1.0
            if isinstance(factor, Tensor):
                term.factors = factor.data_ptr()
            else:
                term.factor = factor
            if spec.masks and isinstance(random_mask := spec.masks[i], RandomMask):
                keys.append(_halves(random_mask.key))
                term.key, term.limit = ctypes.addressof(keys[-1]), random_mask.limit
            elif spec.masks and isinstance(mask := spec.masks[i], Tensor):
                term.mask = mask.data_ptr()
            if spec.thresholds and (threshold := spec.thresholds[i]) is not None:
                _trim(term, threshold, block)
        anchor = None if anchor is None else raw(anchor)
        return not self.compiled.combine(
            _source(anchor), terms, len(inputs), spec.elect, spec.zero_sign, spec.normalize, spec.total, spec.scaling,
            block.offset, out.data_ptr(), KINDS[out.dtype], out.numel(),
        )  # fmt: skip

    def by_column(self, base: Tensor, models: Sequence[Tensor], spec: ColumnWeights, out: Tensor) -> bool:
        """Compute theta_0 + sum_t c_t tau_t into out (rows, columns) with coefficients (n, columns) fp32."""
        inputs = [raw(tensor) for tensor in (base, *models)]
        rows, columns = out.shape[0], out.numel() // out.shape[0]
        sources = (_Source * len(models))(*map(_source, inputs[1:]))
        coefficients = spec.coefficients.contiguous()
        return not self.compiled.by_column(
            _source(inputs[0]), sources, coefficients.data_ptr(), len(models), out.data_ptr(), KINDS[out.dtype], rows,
            columns,
        )  # fmt: skip

    def relax(self, base: Tensor, merged: Tensor, pull: Tensor, by_row: bool, out: Tensor) -> bool:
        """Relax merged towards base into out: by pull fp32, one for each column or, by_row, for each row."""
        base, merged, pull = raw(base), raw(merged), pull.contiguous()
        rows = len(pull) if by_row else out.numel() // len(pull)
        return not self.compiled.relax(
            _source(base), _source(merged), pull.data_ptr(), by_row, out.data_ptr(), KINDS[out.dtype], rows,
            out.numel() // rows,
        )  # fmt: skip

    def upper_halves(self, base: Tensor, model: Tensor, counts: Tensor) -> bool:
        """Add to counts (UPPER_BINS,) int64 the number of |tau| with each upper half."""
        base, model = raw(base), raw(model)
        return not self.compiled.upper_halves(_source(base), _source(model), counts.data_ptr(), base.numel())

    def lower_halves(self, base: Tensor, model: Tensor, upper: int) -> tuple[Tensor, Tensor]:
        """Return the lower halves of the |tau| with that upper half, ascending, and the count of each; int64."""
        base, model = raw(base), raw(model)
        lower, number = (torch.empty(min(base.numel(), LOWER_BINS), dtype=torch.int32) for _ in range(2))
        length = self.compiled.lower_halves(
            _source(base), _source(model), upper, lower.data_ptr(), number.data_ptr(), base.numel()
        )
        return lower[:length].long(), number[:length].long()

    def nonfinite(self, block: Tensor) -> int:
        """Return the number of values that are NaN or infinite; fp32 or bf16, contiguous."""
        return int(self.compiled.nonfinite(block.data_ptr(), KINDS[block.dtype], block.numel()))

    def squares(self, base: Tensor, models: Sequence[Tensor], sums: Tensor) -> bool:
        """Add to sums (2 n + 1, columns) fp64 the column sums of theta_t^2 (n), theta_0^2 and theta_t theta_0 (n)."""
        inputs = [raw(tensor) for tensor in (base, *models)]
        sources = (_Source * len(models))(*map(_source, inputs[1:]))
        rows, columns = base.shape[0], sums.shape[1]
        to = ctypes.cast(sums.data_ptr(), POINTER(c_double))
        return not self.compiled.squares(_source(inputs[0]), sources, len(models), rows, columns, to)

    def magprune(
        self, base: Tensor, model: Tensor, density: float, epsilon: float, key: int, offset: int
    ) -> tuple[Tensor, Tensor] | None:
        """Return DELLA's mask (rows, columns) bool and the chances that it was drawn with, fp32."""
        base, model = raw(base), raw(model)
        rows, columns = base.shape[0], base.numel() // base.shape[0]
        scratch, mask = torch.empty(4 * columns, dtype=torch.int32), torch.empty(base.shape, dtype=torch.bool)
        chances = torch.empty(base.shape)
        halves = _halves(key)
        failed = self.compiled.magprune(
            _source(base), _source(model), rows, columns, density, epsilon, ctypes.addressof(halves), offset,
            scratch.data_ptr(), mask.data_ptr(), chances.data_ptr(),
        )  # fmt: skip
        return None if failed else (mask, chances)

    def variances(self, base: Tensor, models: Sequence[Tensor]) -> Tensor | None:
        """Return the variance of the task vectors over the models, of base's shape, fp32."""
        inputs = [raw(tensor) for tensor in (base, *models)]
        sources, out = (_Source * len(models))(*map(_source, inputs[1:])), torch.empty(base.shape)
        failed = self.compiled.variances(_source(inputs[0]), sources, len(models), out.data_ptr(), out.numel())
        return None if failed else out

    def words(self, key: int, first: int, count: int) -> Tensor:
        """Return `count` 32-bit words of a Philox stream from number `first`, as int32."""
        out, halves = torch.empty(count, dtype=torch.int32), _halves(key)
        self.compiled.words(ctypes.addressof(halves), first, out.data_ptr(), count)
        return out


def _source(tensor: Tensor | None) -> _Source:
    return _Source(None, 0) if tensor is None else _Source(tensor.data_ptr(), KINDS[tensor.dtype])


def _halves(key: int) -> ctypes.Array[c_uint64]:
    return (c_uint64 * 2)(key % 2**64, key >> 64)


def _trim(term: _Term, threshold: Threshold, block: Block) -> None:
    term.trim, term.threshold = 1, threshold.value
    term.equal, term.kept = threshold.equal, threshold.equal_kept
    term.before = threshold.equal_before.get(block.start, 0)
