"""TIES over whole models, as its paper's code does it: one trim threshold per model over all its tensors together.

Every pass streams over all tensors; what is kept between passes is a histogram per model and a count per tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from common.errors import CheckpointError, UsageError
from merging.ops.consensus import majority_sign
from merging.ops.magnitudes import Magnitudes
from merging.ops.order_statistics import LOWER_BINS, UPPER_BINS, locate, value_of
from merging.ops.selection import Threshold, equal_entries, inside_bins, running, upper_histograms
from merging.ops.sparse.sparsify import kept_count
from merging.ops.tensor_blocks import TensorGroup

Groups: TypeAlias = Callable[[], Iterable[TensorGroup]]
"""Yields every tensor that is merged, afresh at each call."""


@dataclass(frozen=True)
class Cut:
    """The threshold of one model: entries above it are kept, and `equal_kept` of the `equal` ones at it.

    Those are spread evenly, in index order over the tensors in name order: `before` has how many stand in the tensors
    before each, where some are kept and some are not.
    """

    value: float
    equal: int
    equal_kept: int
    before: Mapping[str, int]


@dataclass(frozen=True)
class ModelScope:
    """What was found: a cut per model (None: nothing is trimmed), for the settings that it was found for.

    zero_sign: the sign of entries whose sum is zero, under `zero_sum: majority` that of the majority of all entries of
    the merged model.
    """

    density: Sequence[float]
    weights: Sequence[float]
    cuts: tuple[Cut | None, ...]
    zero_sign: int = 1

    def check(self, group: TensorGroup, parameters: Mapping[str, Any]) -> None:
        """Refuse a tensor with settings of its own. Raises UsageError."""
        named = {"density": self.density} | ({"weights": self.weights} if parameters["zero_sum"] == "majority" else {})
        for name, found in named.items():
            if parameters[name] != found:
                raise UsageError(
                    f"--trim_scope model has one threshold per model, so {name} must be the same for all tensors; "
                    f"found {found} and, for {group.name}, {parameters[name]}."
                )


def survey(groups: Groups, parameters: Mapping[str, Any]) -> ModelScope | None:
    """Find each model's trim threshold over all tensors; None where tensors are trimmed one by one.

    Exactly max(1, floor(density * elements)) entries of a model survive; no block size enters. Two to four passes:
    the upper and the lower half of the threshold, the entries equal to it, the majority sign. Raises CheckpointError
    for a model that is mostly NaN, UsageError where tensors are not all merged from the same models.
    """
    if parameters["trim_scope"] == "tensor":
        return None
    density, weights = parameters["density"], parameters["weights"]
    keep = _kept(groups, density)
    ranks = _ranks(groups, keep)
    spread = [i for i, rank in ranks.items() if 0 < rank[2] < rank[1]]
    before = _equal_before(groups, {i: ranks[i][0] for i in spread})
    cuts = tuple(Cut(*ranks[i], before.get(i, {})) if i in ranks else None for i in range(len(density)))
    found = ModelScope(density, weights, cuts)
    if parameters["zero_sum"] == "positive":
        return found
    return ModelScope(density, weights, cuts, majority_sign(((g, thresholds_in(g, found)) for g in groups()), weights))


def thresholds_in(group: TensorGroup, found: ModelScope) -> list[Threshold | None]:
    """Return each model's threshold for one tensor, with the place of its equal entries among all of the model's."""
    return [None if cut is None else _threshold(group, i, cut) for i, cut in enumerate(found.cuts)]


def _threshold(group: TensorGroup, model: int, cut: Cut) -> Threshold:
    if not cut.before:
        return Threshold(cut.value, cut.equal, cut.equal_kept, {})
    equal = equal_entries(group, Magnitudes(group, model), cut.value)
    return Threshold(cut.value, cut.equal, cut.equal_kept, running(equal, cut.before[group.name]))


def _kept(groups: Groups, density: Sequence[float]) -> dict[int, int]:
    """Return how many entries of each model survive, for the models that are trimmed."""
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
    """Return (value, how many equal it, how many of those are kept) of each model's `keep`-th largest magnitude."""
    upper = {i: torch.zeros(UPPER_BINS, dtype=torch.int64) for i in keep}
    for group in groups():
        for i, counts in zip(keep, upper_histograms(group, [Magnitudes(group, i) for i in keep]), strict=True):
            upper[i] += counts
    for i, counts in upper.items():
        if int(counts.sum()) < keep[i]:
            raise CheckpointError(
                f"Tensor {_spoiled(groups, i)} holds NaN in the base or in model {i + 1}; it cannot be trimmed."
            )
    places = {i: locate(counts, keep[i]) for i, counts in upper.items()}
    lower = {i: torch.zeros(LOWER_BINS, dtype=torch.int64) for i in keep}
    models = list(keep)
    for group in groups():
        for j, _, (halves, number) in inside_bins(group, [(Magnitudes(group, i), places[i][0]) for i in models]):
            lower[models[j]][halves] += number
    found = {}
    for i, (high, above) in places.items():
        low, larger = locate(lower[i], keep[i] - above)
        found[i] = (value_of(high, low), int(lower[i][low]), keep[i] - above - larger)
    return found


def _equal_before(groups: Groups, values: Mapping[int, float]) -> dict[int, dict[str, int]]:
    """Return, for each model, how many entries equal its value stand in the tensors that come first by name."""
    counts: dict[int, dict[str, int]] = {i: {} for i in values}
    if values:
        for group in groups():
            for i, value in values.items():
                counts[i][group.name] = sum(equal_entries(group, Magnitudes(group, i), value).values())
    before: dict[int, dict[str, int]] = {}
    for i, found in counts.items():
        total, before[i] = 0, {}
        for name in sorted(found):
            before[i][name] = total
            total += found[name]
    return before


def _spoiled(groups: Groups, model: int) -> str:
    return next(
        group.name
        for group in groups()
        if any(bool(group.task_vector(model, block).isnan().any()) for block in group.blocks())
    )
