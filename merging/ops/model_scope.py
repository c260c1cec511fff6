"""TIES over whole models, as its authors' code does it: one trim threshold per model over all its tensors together.

Every pass streams over all tensors; between passes only a histogram per model and a count per tensor are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from common.errors import CheckpointError, UsageError
from merging.ops.consensus import majority_sign
from merging.ops.order_statistics import LOWER_BINS, UPPER_BINS, Threshold, locate, value_of
from merging.ops.selection import Magnitudes, equal_entries, inside_bins, running, upper_histograms
from merging.ops.sparse.sparsify import kept_count
from merging.ops.tensor_blocks import TensorGroup

Groups: TypeAlias = Callable[[], Iterable[TensorGroup]]
"""Yields every tensor that is merged, from the first one at each call."""


@dataclass(frozen=True)
class ModelThreshold:
    """The threshold of one model: entries above it are kept, and `equal_kept` of the `equal` ones at it.

    Those are spread evenly, in index order over the tensors in name order: `before` is the number of equal entries in
    the tensors before each, where some are kept and some are not.
    """

    value: float
    equal: int
    equal_kept: int
    before: Mapping[str, int]


@dataclass(frozen=True)
class ModelScope:
    """The thresholds of the models (None: nothing is trimmed), with the parameters that they were computed for.

    zero_sign: the sign of entries whose sum is zero; with `zero_sum: majority`, the sign of the majority of all entries
    of the merged model.
    """

    density: Sequence[float]
    weights: Sequence[float]
    thresholds: tuple[ModelThreshold | None, ...]
    zero_sign: int = 1

    def check(self, group: TensorGroup, density: Sequence[float], weights: Sequence[float], zero_sum: str) -> None:
        """Refuse a tensor with parameters of its own.

        Raises:
            UsageError: if its density differs from the other tensors', or its weights with `zero_sum: majority`.
        """
        pairs = {"density": (self.density, density)}
        if zero_sum == "majority":
            pairs["weights"] = (self.weights, weights)
        for name, (expected, value) in pairs.items():
            if value != expected:
                raise UsageError(
                    f"--trim_scope model has one threshold per model, so {name} must be the same for all tensors; "
                    f"found {expected} and, for {group.name}, {value}."
                )


def model_scope(
    groups: Groups, *, density: Sequence[float], weights: Sequence[float], trim_scope: str, zero_sum: str
) -> ModelScope | None:
    """Return each model's trim threshold over all tensors; None where tensors are trimmed one by one.

    Exactly max(1, floor(density * elements)) entries of a model survive; the result does not depend on the blocks. Two
    to four passes: the upper and the lower half of the threshold, the entries equal to it, the majority sign.

    Raises:
        CheckpointError: if a model is mostly NaN.
        UsageError: if tensors are not all merged from the same models.
    """
    if trim_scope == "tensor":
        return None
    keep = _entries_to_keep(groups, density)
    ranks = _ranks(groups, keep)
    partly_kept = [i for i, rank in ranks.items() if 0 < rank[2] < rank[1]]
    before = _equal_before(groups, {i: ranks[i][0] for i in partly_kept})
    thresholds = tuple(
        ModelThreshold(*ranks[i], before.get(i, {})) if i in ranks else None for i in range(len(density))
    )
    scope = ModelScope(density, weights, thresholds)
    if zero_sum == "positive":
        return scope
    sign = majority_sign(((group, thresholds_in(group, scope)) for group in groups()), weights)
    return ModelScope(density, weights, thresholds, sign)


def thresholds_in(group: TensorGroup, scope: ModelScope) -> list[Threshold | None]:
    """Return each model's threshold for one tensor, with the place of its equal entries among all of the model's."""
    return [None if t is None else _threshold(group, i, t) for i, t in enumerate(scope.thresholds)]


def _threshold(group: TensorGroup, model: int, threshold: ModelThreshold) -> Threshold:
    value, equal, equal_kept = threshold.value, threshold.equal, threshold.equal_kept
    if not threshold.before:
        return Threshold(value, equal, equal_kept, {})
    by_block = equal_entries(group, Magnitudes(group, model), value)
    return Threshold(value, equal, equal_kept, running(by_block, threshold.before[group.name]))


def _entries_to_keep(groups: Groups, density: Sequence[float]) -> dict[int, int]:
    """Return the number of entries of each model that survive, for the models that are trimmed."""
    elements = 0
    for group in groups():
        elements += group.elements
        if len(group.finetuned) != len(density):
            raise UsageError(
                f"--trim_scope model needs every tensor to be merged from the same models; {group.name} is merged from "
                f"{len(group.finetuned)} of {len(density)}."
            )
    keep = {i: kept_count(d, elements) for i, d in enumerate(density)}
    return {i: k for i, k in keep.items() if k < elements}


def _ranks(groups: Groups, keep: Mapping[int, int]) -> dict[int, tuple[float, int, int]]:
    """Return (value, number of entries equal to it, number of those kept) of each model's `keep`-th magnitude."""
    upper = {i: torch.zeros(UPPER_BINS, dtype=torch.int64) for i in keep}
    for group in groups():
        for i, counts in zip(keep, upper_histograms(group, [Magnitudes(group, i) for i in keep]), strict=True):
            upper[i] += counts
    for i, counts in upper.items():
        if int(counts.sum()) < keep[i]:
            raise CheckpointError(
                f"Tensor {_first_with_nan(groups, i)} holds NaN in the base or in model {i + 1}; it cannot be trimmed."
            )
    places = {i: locate(counts, keep[i]) for i, counts in upper.items()}
    lower = {i: torch.zeros(LOWER_BINS, dtype=torch.int64) for i in keep}
    models = list(keep)
    for group in groups():
        for j, _, (halves, number) in inside_bins(group, [(Magnitudes(group, i), places[i][0]) for i in models]):
            lower[models[j]][halves] += number
    ranks = {}
    for i, (high, above) in places.items():
        low, larger = locate(lower[i], keep[i] - above)
        ranks[i] = (value_of(high, low), int(lower[i][low]), keep[i] - above - larger)
    return ranks


def _equal_before(groups: Groups, values: Mapping[int, float]) -> dict[int, dict[str, int]]:
    """Return, for each model, the number of entries equal to its value in the tensors before each by name."""
    counts: dict[int, dict[str, int]] = {i: {} for i in values}
    if values:
        for group in groups():
            for i, value in values.items():
                counts[i][group.name] = sum(equal_entries(group, Magnitudes(group, i), value).values())
    before: dict[int, dict[str, int]] = {}
    for i, by_name in counts.items():
        total, before[i] = 0, {}
        for name in sorted(by_name):
            before[i][name] = total
            total += by_name[name]
    return before


def _first_with_nan(groups: Groups, model: int) -> str:
    return next(
        group.name
        for group in groups()
        if any(bool(group.task_vector(model, block).isnan().any()) for block in group.blocks())
    )
