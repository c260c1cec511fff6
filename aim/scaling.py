"""Importance s in [0, 1] of a tensor's channels: its normalization, and the controls that replace it in experiments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from common.errors import UsageError
from common.files.json_types import Between, OneOf
from common.typed_config import check_fields

if TYPE_CHECKING:
    from torch import Tensor

    from merging.plan.merge_plan import RelaxationLineage

NORMALIZATIONS = {
    "max": "s = a / max(a), the paper's",
    "quantile": "s = min(1, a / q), q being the quantile --quantile of a",
}
CONTROLS = {
    "uniform": "one factor per matrix, with the mean of AIM's",
    "uniform_norm": "one factor per matrix, which leaves the task vector the norm that AIM leaves it",
    "permuted": "AIM's s in a random order of the channels",
    "reversed": "AIM's s with its order reversed: the largest goes to the least active channel",
    "weight_norm": "s from the mean absolute weight of the base per channel, without activations",
    "random": "s drawn with replacement from AIM's s of the matrix",
}
"""What a run by that name computes instead of AIM."""
RANDOM_CONTROLS = ("permuted", "random")
QUANTILE = 0.99


@dataclass(frozen=True)
class Scaling:
    """Computation of s from a tensor's activations.

    Attributes:
        normalization: A key of `NORMALIZATIONS`.
        quantile: The quantile of a that s = 1 corresponds to, in (0, 1]; for normalization "quantile".
        control: A key of `CONTROLS`, or None for AIM.
        control_seed: Seed of a random control, which also depends on the tensor's name alone.
    """

    normalization: Annotated[str, OneOf(tuple(NORMALIZATIONS))] = "max"
    quantile: Annotated[float, Between(0, 1, numbers=True, above=True)] = QUANTILE
    control: Annotated[str, OneOf(tuple(CONTROLS))] | None = None
    control_seed: Annotated[int, Between(0)] = 0

    def check(self) -> None:
        """Raise UsageError for unknown names, values out of bounds and settings without an effect."""
        check_fields(self)
        if self.quantile != QUANTILE and self.normalization != "quantile":
            raise UsageError(
                "--quantile has an effect with --normalization quantile alone; give that, or leave it out."
            )
        if self.control_seed and self.control not in RANDOM_CONTROLS:
            raise UsageError(
                f"--control_seed has an effect with --control {' or '.join(RANDOM_CONTROLS)} alone; leave it out."
            )

    @property
    def needs_whole_tensors(self) -> bool:
        """True where a factor depends on the merged tensor, so that a tensor is relaxed in one block."""
        return self.control == "uniform_norm"

    def normalize(self, activation: Tensor) -> Tensor:
        """Return s in [0, 1] of activations (..., channels) fp32, each matrix of a stack by its own scale.

        Zeros where nothing was active. A quantile of 0 gives s = 1 to every active channel, the limit of a small one.
        """
        import torch

        from aim.relax import importance

        if self.normalization == "max":
            return importance(activation)
        scale = torch.quantile(activation, self.quantile, dim=-1, keepdim=True)
        return torch.where(
            scale > 0, (activation / scale.where(scale > 0, 1.0)).clamp(max=1.0), (activation > 0).float()
        )

    def importance(self, name: str, activation: Tensor) -> Tensor:
        """Return s (..., channels) fp32 of the tensor `name`, by the control where there is one.

        activation: (channels,) or (experts, channels); for "weight_norm" that of `weight_magnitudes`. "uniform_norm"
        returns AIM's own, from which its factor is computed per tensor.
        """
        from aim import controls

        s = self.normalize(activation)
        if self.control in RANDOM_CONTROLS:
            generator = controls.generator_of(self.control_seed, name)
            return controls.permuted(s, generator) if self.control == "permuted" else controls.random(s, generator)
        if self.control == "uniform":
            return controls.uniform(s)
        return controls.reversed_order(s) if self.control == "reversed" else s

    def label(self) -> RelaxationLineage:
        """Return what a lineage records besides omega: normalization and control where they are not the paper's."""
        record: RelaxationLineage = {}
        if self.normalization == "quantile":
            record["normalization"] = f"quantile {self.quantile:g}"
        if self.control:
            record["control"] = self.control
        return record
