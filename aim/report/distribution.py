"""Distribution of importance s over the channels of each kind of layer, and what AIM takes back of a task vector."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING

from aim.relaxer import Rule
from aim.report.summary import InputGroup, input_groups
from aim.scaling import Scaling
from common.errors import CheckpointError
from common.files.json_values import JsonObject, JsonValue

if TYPE_CHECKING:
    from torch import Tensor

    from aim.importance import Importance
    from merging.checkpoints.checkpoint import Checkpoint

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
LEVELS = (0.1, 0.5)
CURVE = (0.0, *(i / 20 for i in range(1, 20)), 0.98, 0.99, 0.995, 1.0)
"""Quantiles that a figure draws."""
DIGITS = 4


@dataclass(frozen=True)
class Distribution:
    """Importance s over the channels of all layers of one kind.

    Attributes:
        kind: Tensors of a layer that get the same input, as `aim.report.summary` names them.
        layers: Number of layers, or of experts of all layers.
        channels: Number of channels of one of them.
        quantiles: s at each of `QUANTILES`.
        mean: Mean of s.
        above: Share of the channels with s above each of `LEVELS`.
        largest_to_median: max(a) / median(a) of one layer, the median over the layers; None where a median is 0.
        curve: s at each of `CURVE`.
    """

    kind: str
    layers: int
    channels: int
    quantiles: tuple[float, ...]
    mean: float
    above: tuple[float, ...]
    largest_to_median: float | None
    curve: tuple[float, ...]

    def as_json(self) -> JsonObject:
        """Return everything in JSON's types, rounded to `DIGITS` digits."""
        return {key: _rounded(value) for key, value in asdict(self).items()}


def distributions(
    importance: Importance, scaling: Scaling | None = None, rule: Rule | None = None
) -> list[Distribution]:
    """Return the distribution of s of each kind of layer, in the order of the model."""
    return [_distribution(kind, groups, scaling or Scaling()) for kind, groups in by_kind(importance, rule).items()]


def by_kind(importance: Importance, rule: Rule | None = None) -> dict[str, list[InputGroup]]:
    """Return the relaxed tensors of all layers by kind; the stack precedes the kind where there are several."""
    groups = input_groups(importance, rule)[0]
    several = len({group.stack for group in groups if group.stack}) > 1
    kinds: dict[str, list[InputGroup]] = {}
    for group in groups:
        prefix = f"{group.stack}*." if several and group.stack else ""
        kinds.setdefault(prefix + group.kind, []).append(group)
    return kinds


def even_shares(
    importance: Importance, omega: float, scaling: Scaling | None = None, rule: Rule | None = None
) -> dict[str, float]:
    """Return what `taken_back` returns for a task vector that has the same norm in every channel of a kind."""
    shares = {}
    for kind, groups in by_kind(importance, rule).items():
        factors = 1 - (1 - omega) * _importance(groups, scaling or Scaling())
        shares[kind] = 1 - float(factors.square().mean().sqrt())
    return shares


def _importance(groups: Sequence[InputGroup], scaling: Scaling) -> Tensor:
    """Return s of all channels of groups, fp64 in one vector."""
    import torch

    return torch.cat([scaling.normalize(v.values.float()) for group in groups for v in group.vectors]).double()


def _distribution(kind: str, groups: Sequence[InputGroup], scaling: Scaling) -> Distribution:
    activations = [vector.values for group in groups for vector in group.vectors]
    s = _importance(groups, scaling)
    medians = [float(a.median()) for a in activations]
    ratios = [float(a.max()) / middle for a, middle in zip(activations, medians, strict=True) if middle > 0]
    return Distribution(
        kind=kind,
        layers=len(activations),
        channels=len(activations[0]),
        quantiles=_quantiles(s, QUANTILES),
        mean=float(s.mean()),
        above=tuple(float((s > level).double().mean()) for level in LEVELS),
        largest_to_median=median(ratios) if len(ratios) == len(activations) else None,
        curve=_quantiles(s, CURVE),
    )


def _quantiles(values: Tensor, quantiles: Sequence[float]) -> tuple[float, ...]:
    """Return quantiles of values (n,), interpolated linearly; torch.quantile takes at most 2^24 values."""
    ordered = values.sort().values
    result = []
    for quantile in quantiles:
        below, part = divmod(quantile * (len(ordered) - 1), 1.0)
        low, high = ordered[int(below)], ordered[min(int(below) + 1, len(ordered) - 1)]
        result.append(float(low + (high - low) * part))
    return tuple(result)


def taken_back(
    importance: Importance,
    base: Checkpoint,
    merged: Checkpoint,
    omega: float,
    scaling: Scaling,
    rule: Rule | None = None,
) -> dict[str, float]:
    """Return 1 - |theta - theta_0| / |theta_m - theta_0| of each kind of layer, theta being the relaxed merge.

    Norms run over all tensors of a kind. A kind without a task vector is left out.

    Raises:
        CheckpointError: for a tensor that the merge lacks, or has in another shape.
    """
    shares = {}
    for kind, groups in by_kind(importance, rule).items():
        before = after = 0.0
        for name in (name for group in groups for name in group.tensors):
            task_vector, relaxed = _task_vectors(importance, name, base, merged, omega, scaling, rule or Rule())
            before += float(task_vector.double().square().sum())
            after += float(relaxed.double().square().sum())
        if before:
            shares[kind] = 1 - math.sqrt(after / before)
    return shares


def _task_vectors(
    importance: Importance, name: str, base: Checkpoint, merged: Checkpoint, omega: float, scaling: Scaling, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Return a tensor's task vector before and after it is relaxed, fp32."""
    from aim.relax import along_rows

    if name not in merged.tensors or merged.tensors[name].shape != base.tensors[name].shape:
        merged_shape = list(merged.tensors[name].shape) if name in merged.tensors else "no such tensor"
        raise CheckpointError(
            f"{merged.name}: tensor {name}: {merged_shape}, and {base.name} has {list(base.tensors[name].shape)}; give "
            "a merge of this base."
        )
    task_vector = merged.read(name).float() - base.read(name).float()
    s = scaling.importance(name, importance.activations[name]).clone()
    tokens = importance.tokens.get(name)
    if isinstance(tokens, list):
        s[[i for i, count in enumerate(tokens) if count < rule.min_tokens]] = 0
    shape = tuple(task_vector.shape)
    factor = 1 - (1 - omega) * along_rows(s, shape, importance.axes[name], 0, shape[0], len(shape))
    return task_vector, task_vector * factor


def _rounded(value: JsonValue) -> JsonValue:
    if isinstance(value, tuple):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def rounded_shares(shares: Mapping[str, float]) -> dict[str, float]:
    """Return shares rounded to `DIGITS` digits."""
    return {kind: _rounded(share) for kind, share in shares.items()}
