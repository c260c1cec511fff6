"""AIM inside the loop over tensors: which tensors are relaxed, by which activation, and an account of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from console.errors import CheckpointError, UsageError
from merging.names import layer_of, role_of
from merging.planned import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from aim.importance import Importance
    from merging.tensors import Block


def check_omega(omega: float) -> None:
    """Raise UsageError for an omega outside [0, 1]."""
    if not 0.0 <= omega <= 1.0:
        raise UsageError(f"--omega must be in [0, 1] (1 leaves the merge as it is, 0 relaxes most), found {omega:g}.")


@dataclass
class Relaxer:
    """The relaxation of the loop over tensors: importance per tensor, and an account of what it did."""

    importance: Importance
    omega: float
    relax_tied: bool
    account: dict[str, str] = field(default_factory=dict)
    _measured: dict[str, str] = field(default_factory=dict, repr=False)
    _scaled: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def check(self, merge_plan: Plan) -> None:
        """Decide for every tensor whether it is relaxed, and why not.

        Raises CheckpointError where shapes differ, or where nothing would be relaxed.
        """
        for tensor in merge_plan.tensors:  # a layer that a slice put elsewhere was measured where the base has it
            if tensor.base is not None and layer_of(tensor.name):
                self._measured[tensor.name] = tensor.base.name
        tied_head = "lm_head.weight" not in {t.name for t in merge_plan.tensors}
        for tensor in merge_plan.tensors:
            name = tensor.name
            self.account[name] = self._verdict(name, tensor.is_float, tensor.is_embedding, tied_head)
            source = self._source(name)
            if self.account[name] == "relaxed":
                channels = len(self.importance.activations[source])
                if tensor.shape[self.importance.axes[source]] != channels:
                    raise CheckpointError(
                        f"Tensor {name} is {list(tensor.shape)}, and the importance of it has {channels} channels."
                    )
        if "relaxed" not in self.account.values():
            raise CheckpointError(
                f"The importance measured on {self.importance.base['name']} belongs to none of the tensors "
                f"(the first is {merge_plan.tensors[0].name}); nothing would be relaxed."
            )

    def _source(self, name: str) -> str:
        """The tensor whose activation belongs to `name`: the tied head's for the input embedding."""
        return "lm_head.weight" if role_of(name) == "input" else self._measured.get(name, name)

    def _verdict(self, name: str, is_float: bool, is_embedding: bool, tied_head: bool) -> str:
        if not is_float:
            return "not floating point"
        if is_embedding and not (tied_head and self.relax_tied and "lm_head.weight" in self.importance.activations):
            return "embedding"
        if name.endswith(".bias"):
            return "bias"
        source = self._source(name)
        if source not in self.importance.activations:
            return self.importance.unmeasured.get(source, "no activation was measured for it")
        if not float(self.importance.activations[source].max()) > 0:
            return "its activation is zero everywhere"
        return "relaxed"

    def block(self, name: str, block: Block, base: Tensor, merged: Tensor) -> Tensor:
        """Relax the rows of a block, fp32."""
        from aim.relax import importance, relax

        if self.account[name] != "relaxed":
            return merged
        if block.start == 0 or name not in self._scaled:  # once for a tensor's blocks, which come in order
            activation = self.importance.activations[self._source(name)]
            self._scaled = {name: importance(activation).to(merged.device)}
        return relax(base, merged, self._along(name, self._scaled[name], merged.dim(), block.rows), self.omega)

    def reference(self, name: str, base: Tensor, merged: Tensor) -> Tensor:
        """Relax a whole bf16 tensor with the original's arithmetic."""
        from aim.relax import relax_reference

        if self.account[name] != "relaxed":
            return merged
        activation = self.importance.activations[self._source(name)]
        return relax_reference(base, merged, self._along(name, activation, merged.dim(), slice(None)), self.omega)

    def _along(self, name: str, channels: Tensor, dimensions: int, rows: slice) -> Tensor:
        """Shape (d_in,) so that it broadcasts along the weight's input axis for the given rows."""
        axis = self.importance.axes[self._source(name)]
        if dimensions == 1:
            return channels[rows]
        return channels[rows].reshape(-1, *[1] * (dimensions - 1)) if axis == 0 else channels

    def details(self) -> dict[str, Any]:
        """Return what the run record says: omega, calibration, and each tensor that was not relaxed, by reason."""
        reasons: dict[str, list[str]] = {}
        for name, verdict in self.account.items():
            if verdict != "relaxed":
                reasons.setdefault(verdict, []).append(name)
        return {
            "omega": self.omega,
            "relaxed": sum(verdict == "relaxed" for verdict in self.account.values()),
            "not_relaxed": reasons,
            "calibration": {k: v for k, v in self.importance.calibration.items() if k != "positions"},
            "importance_of": dict(self.importance.base),
        }

    def sentence(self) -> str:
        """Say how many tensors are relaxed and what the others are."""
        counts = Counter(self.account.values())
        relaxed = counts.pop("relaxed", 0)
        rest = "; ".join(f"{count} not ({reason})" for reason, count in counts.most_common())
        nothing = " (omega 1 leaves the merge as it is)" if self.omega == 1 else ""
        return f"Relaxing {relaxed} tensors with omega {self.omega:g}{nothing}{'; ' + rest if rest else ''}."
