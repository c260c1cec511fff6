"""Statistics of the input per channel of every weight, over calibration tokens (`aim.statistics`).

Sums are fp32 over the tokens of a batch and fp64 over batches. A batch counts as a whole or not at all, so that one
that ran out of memory can be taken again in halves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aim.capture.hooks import LayerInput
from aim.statistics import DEFAULT, Statistic, find_statistic
from common.errors import CalibrationError
from common.terminal_text import quoted

HALVES = 2
"""Blocks are split in two halves, whose statistics are compared: their rank correlation says how stable they are."""


@dataclass
class Total:
    """Sum over tokens per channel, (channels,) or (experts, channels) fp64, and their number, () or (experts,)."""

    sum: Tensor
    tokens: Tensor

    def add(self, other: Total) -> None:
        """Add another total of the same weight, wherever it is held."""
        self.sum += other.sum.to(self.sum.device)
        self.tokens += other.tokens.to(self.tokens.device)

    def mean(self, finish: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return the mean (…, channels) fp32 where the sum is, or what `finish` makes of it in fp64.

        An expert without tokens has zeros.
        """
        tokens = self.tokens.clamp(min=1).to(self.sum.device)
        mean = self.sum / (tokens[:, None] if self.sum.dim() == 2 else tokens)
        return (finish(mean) if finish else mean).float()


class Batch:
    """Sums of one batch: a callback for `aim.capture.hooks.capture_inputs`. statistic: mean_abs where None."""

    def __init__(self, statistic: Statistic | None = None) -> None:
        self._statistic = statistic or find_statistic(DEFAULT)
        self.totals: dict[str, Total] = {}
        self.axes: dict[str, int] = {}
        self._last: tuple[Tensor, int, Tensor] | None = None

    def __call__(self, use: LayerInput) -> None:
        """Add one use of a weight."""
        self.axes[use.name] = use.axis
        if use.experts and use.expert is None:
            self._add(use.name, self._statistic.sum_tokens(use.x, 1), (use.x != 0).any(-1).sum(1))
            return
        channels = use.x.shape[-1]
        total, tokens = self._shared(use), use.x.numel() // channels
        if not use.experts:
            self._add(use.name, total, tokens)
            return
        place = self.totals.get(use.name)
        if place is None:
            zeros = total.new_zeros(use.experts, channels)
            place = self.totals[use.name] = Total(zeros, torch.zeros(use.experts, dtype=torch.int64))
        place.sum[use.expert] += total
        place.tokens[use.expert] += tokens

    def _add(self, name: str, total: Tensor, tokens: int | Tensor) -> None:
        addend = Total(total.clone(), torch.as_tensor(tokens, dtype=torch.int64))
        if name in self.totals:
            self.totals[name].add(addend)
        else:
            self.totals[name] = addend

    def _shared(self, use: LayerInput) -> Tensor:
        """The sum over tokens; query, key and value read the same tensor, which is added up once."""
        version = use.owner._version
        if self._last is None or self._last[0] is not use.owner or self._last[1] != version:
            self._last = (use.owner, version, self._statistic.sum_tokens(use.x.reshape(-1, use.x.shape[-1]), 0))
        return self._last[2]


@dataclass
class Sums:
    """Running totals of every weight, for each half of the calibration blocks.

    They stay where the batches made them, so that a GPU is waited for only when they are saved or the end has come.
    """

    halves: tuple[dict[str, Total], ...] = field(default_factory=lambda: tuple({} for _ in range(HALVES)))
    axes: dict[str, int] = field(default_factory=dict)

    def add(self, batch: Batch, half: int) -> None:
        """Take a batch that is through."""
        self.axes.update(batch.axes)
        for name, total in batch.totals.items():
            if name in self.halves[half]:
                before = self.halves[half][name]
                if before.sum.shape != total.sum.shape:
                    raise CalibrationError(
                        f"The interrupted calibration has {list(before.sum.shape)} channels of {name}, the base "
                        f"{list(total.sum.shape)}; start anew without --resume."
                    )
                before.add(total)
            else:
                self.halves[half][name] = total

    def means(self, statistic: Statistic | None = None) -> Activations:
        """Return the statistics of all blocks.

        Args:
            statistic: The one that was summed; mean_abs where None.

        Raises:
            CalibrationError: Naming a weight whose input is not finite.
        """
        totals: dict[str, Total] = {}
        for half in self.halves:
            for name, total in half.items():
                if name not in totals:
                    totals[name] = Total(total.sum.clone(), total.tokens.clone())
                else:
                    totals[name].add(total)
        finish = (statistic or find_statistic(DEFAULT)).finish
        means = {name: total.mean(finish).cpu() for name, total in totals.items()}
        for name, mean in means.items():
            if not torch.isfinite(mean).all():
                raise CalibrationError(
                    f"The base's activations into {name} are not finite; try --calibration_dtype float32."
                )
        return Activations(
            means=means,
            axes={name: self.axes[name] for name in means},
            tokens={name: total.tokens.tolist() for name, total in totals.items()},
            stability={name: self._agreement(name) for name in means},
        )

    def _agreement(self, name: str) -> float | list[float | None] | None:
        """Return Spearman's correlation of the two halves' means, per expert where there are several.

        None where it is not defined.
        """
        parts = [half.get(name) for half in self.halves]
        if any(part is None for part in parts):
            return None
        one, other = (part.mean() for part in parts if part is not None)
        other = other.to(one.device)  # a half of a run that goes on may still lie on the CPU
        if one.dim() == 1:
            return spearman(one, other)
        has_tokens = torch.stack([part.tokens.cpu() > 0 for part in parts if part is not None]).all(0).tolist()
        return [spearman(a, b) if is_counted else None for a, b, is_counted in zip(one, other, has_tokens, strict=True)]

    def tensors(self) -> dict[str, Tensor]:
        """Return everything as named tensors, for saving an interrupted run."""
        totals = {}
        for i, half in enumerate(self.halves):
            for name, total in half.items():
                totals[f"{i}.sum.{name}"] = total.sum.cpu().contiguous()
                totals[f"{i}.tokens.{name}"] = total.tokens.cpu()
        return totals

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], axes: Mapping[str, int]) -> Sums:
        """Return what `tensors` and `axes` were taken of. Raises ValueError, KeyError for what was never saved."""
        sums = cls(axes=dict(axes))
        for key, tensor in tensors.items():
            half, kind, name = key.split(".", 2)
            if kind not in ("sum", "tokens") or half not in map(str, range(HALVES)) or name not in axes:
                raise ValueError(f"it has a tensor {quoted(key)}")
            if kind == "tokens":
                continue
            tokens = tensors[f"{half}.tokens.{name}"]
            dtypes = (tensor.dtype, tokens.dtype) == (torch.float64, torch.int64)
            if not dtypes or tensor.dim() not in (1, 2) or tensor.shape[:-1] != tokens.shape:
                raise ValueError(
                    f"{quoted(key)} is {tensor.dtype} {list(tensor.shape)}, its tokens {tokens.dtype} "
                    f"{list(tokens.shape)}"
                )
            sums.halves[int(half)][name] = Total(tensor, tokens)
        return sums


@dataclass(frozen=True)
class Activations:
    """The statistics by parameter name.

    Attributes:
        means: fp32, (channels,) or (experts, channels).
        axes: The axis of the weight that the channels run along.
        tokens: Tokens (per expert).
        stability: Spearman's correlation between the halves (None: not defined).
    """

    means: Mapping[str, Tensor]
    axes: Mapping[str, int]
    tokens: Mapping[str, Any]
    stability: Mapping[str, Any]


def spearman(one: Tensor, other: Tensor) -> float | None:
    """Return Spearman's rank correlation of two vectors, equal values sharing a rank; None where one is constant."""
    ranks = torch.stack([_ranks(one), _ranks(other)])
    centred = ranks - ranks.mean(1, keepdim=True)
    norms = centred.square().sum(1).sqrt()
    if not bool((norms > 0).all()):
        return None
    return round(float((centred[0] * centred[1]).sum() / norms.prod()), 6)


def _ranks(values: Tensor) -> Tensor:
    """Ranks in fp64, the mean rank where values are equal."""
    _, group, counts = values.double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    result: Tensor = (last - (counts.double() - 1) / 2)[group]
    return result
