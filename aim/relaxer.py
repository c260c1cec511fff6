"""AIM inside the loop over tensors: which tensors are relaxed, by which activation, and an account of it."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from aim.calibration.packing import without_ids
from aim.scaling import Scaling
from common.errors import CheckpointError, UsageError
from common.files.bounded_reading import UnreadableError
from common.files.json_types import Between, Matching
from common.files.json_values import JsonObject
from common.processes.bounded_regex import check_pattern, search_foreign
from common.typed_config import check_fields
from merging.checkpoints.tensor_names import layer_of
from merging.plan.types import Plan, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

    from aim.importance import Importance
    from merging.ops.kernels.kernels import Kernels
    from merging.ops.tensor_blocks import Block
    from merging.plan.types import Source

MIN_TOKENS = 64
"""Tokens that an expert needs: the mean of |x| over 64 has a standard error of about a tenth."""
RELAXED, KEPT_BASE, ZERO = "relaxed", "the base's, by --keep_base", "its activation is zero everywhere"


Pattern = Annotated[str, Matching("(?s).*", "a regular expression")]


@dataclass(frozen=True)
class Rule:
    """Choice of tensors to relax, among those with activations.

    include, exclude: regular expressions on tensor names; what does not match the one or matches the other is left as
    merged. keep_base: those that keep the base's values. relax_tied: relax an embedding that is the output head too.
    min_tokens: an expert that fewer tokens were routed to is left as merged.
    """

    include: Pattern | None = None
    exclude: Pattern | None = None
    keep_base: Pattern | None = None
    relax_tied: bool = False
    min_tokens: Annotated[int, Between(1)] = MIN_TOKENS

    def check(self, flags: Mapping[str, str] | None = None) -> None:
        """Raise UsageError for an expression that is none, or a count below 1.

        flags: {field: its flag} where that has another name.
        """
        check_fields(self, flags)
        for name in ("include", "exclude", "keep_base"):
            try:
                check_pattern(getattr(self, name) or "", f"--{(flags or {}).get(name, name)}")
            except UnreadableError as error:
                raise UsageError(str(error)) from None

    @property
    def too_few(self) -> str:
        """Return the sentence on an expert that too few tokens were routed to."""
        return f"an expert with fewer than {self.min_tokens} tokens"

    def verdict(self, name: str) -> str | None:
        """Return what the rule alone says of a tensor; None where it says nothing."""
        if self.keep_base and search_foreign(self.keep_base, name, "--keep_base"):
            return KEPT_BASE
        if self.exclude and search_foreign(self.exclude, name, "--exclude"):
            return "excluded"
        if self.include and not search_foreign(self.include, name, "--include"):
            return "not included"
        return None


@dataclass
class Relaxer:
    """The relaxation of the loop over tensors: importance per tensor, and an account of what it did."""

    importance: Importance
    omegas: Sequence[float]
    rule: Rule = field(default_factory=Rule)
    scaling: Scaling = field(default_factory=Scaling)
    account: dict[str, str] = field(default_factory=dict)
    unrelaxed_experts: dict[str, list[int]] = field(default_factory=dict)
    _sources: dict[str, str] = field(default_factory=dict, repr=False)
    _shapes: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    _bases: dict[str, Source] = field(default_factory=dict, repr=False)
    _scaled: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _controlled: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def check(self, merge_plan: Plan) -> None:
        """Decide for every tensor whether it is relaxed, and why not.

        Raises CheckpointError where shapes differ, or where nothing would be relaxed.
        """
        for tensor in merge_plan.tensors:
            name = tensor.name
            self._shapes[name] = tensor.shape
            self._sources[name] = self._source_of(tensor)
            if tensor.base is not None:
                self._bases[name] = tensor.base
            self.account[name] = self._verdict(tensor, merge_plan.tied)
            if self.account[name] == RELAXED:
                self._fit(tensor)
        if not {RELAXED, KEPT_BASE} & set(self.account.values()):
            raise CheckpointError(
                f"The importance measured on {self.importance.base['name']} belongs to none of the tensors "
                f"(the first is {merge_plan.tensors[0].name}: {self.account[merge_plan.tensors[0].name]}); nothing "
                "would be relaxed."
            )

    def _source_of(self, tensor: TensorPlan) -> str:
        """Return the name of the entry whose activation belongs to a tensor.

        For a tied input embedding that is the head's, for a layer that a slice moves that of its layer in the base.
        """
        if tensor.base is None:
            return tensor.name
        if tensor.is_embedding:
            return self.importance.heads.get(tensor.base.name, tensor.base.name)
        return tensor.base.name if layer_of(tensor.name) else tensor.name

    def _verdict(self, tensor: TensorPlan, tied: bool) -> str:
        source = self._sources[tensor.name]
        if not tensor.is_float:
            return "not floating point"
        if not tensor.is_merged or tensor.base is None:
            return "not merged"
        ruled = self.rule.verdict(tensor.name)
        if ruled is not None:
            return ruled
        tied_head = tied and self.rule.relax_tied and source in self.importance.heads.values()
        if tensor.is_embedding and not tied_head:
            return "embedding"
        if tensor.name.endswith(".bias"):
            return "bias"
        if source not in self.importance.activations:
            return self.importance.unmeasured.get(source, "no activation was measured for it")
        tokens = self.importance.tokens.get(source)
        if isinstance(tokens, int) and is_expert(source) and tokens < self.rule.min_tokens:
            return self.rule.too_few
        if isinstance(tokens, list):
            few = [i for i, count in enumerate(tokens) if count < self.rule.min_tokens]
            if len(few) == len(tokens):
                return self.rule.too_few
            if few:
                self.unrelaxed_experts[tensor.name] = few
        if not float(self.importance.activations[source].max()) > 0:
            return ZERO
        return RELAXED

    def _fit(self, tensor: TensorPlan) -> None:
        """Raise CheckpointError where a tensor has not the channels that were measured."""
        source = self._sources[tensor.name]
        activation, axis = self.importance.activations[source], self.importance.axes[source]
        fits = -len(tensor.shape) <= axis < len(tensor.shape) and tensor.shape[axis] == activation.shape[-1]
        if not fits or (activation.dim() == 2 and tensor.shape[0] != len(activation)):
            raise CheckpointError(
                f"Tensor {tensor.name} is {list(tensor.shape)}, and the importance of it has "
                f"{' x '.join(map(str, activation.shape))} channels."
            )

    def block(self, name: str, block: Block, base: Tensor, merged: Tensor) -> list[Tensor]:
        """Return the rows of a block, fp32, relaxed with each omega."""
        from aim.relax import relax_tensor

        verdict = self.account[name]
        if verdict == KEPT_BASE:
            return [base] * len(self.omegas)
        if verdict != RELAXED:
            return [merged] * len(self.omegas)
        s = self._along(name, block, merged)
        if self.scaling.control == "uniform_norm":
            from aim.controls import factor_of_equal_norm

            factors = [factor_of_equal_norm(merged - base, s * (1.0 - omega)) for omega in self.omegas]
            return [relax_tensor(base, merged, merged.new_tensor(1.0 - factor), 0.0) for factor in factors]
        return [relax_tensor(base, merged, s, omega) for omega in self.omegas]

    @property
    def needs_whole_tensors(self) -> bool:
        """True where a tensor must come in one block."""
        return self.scaling.needs_whole_tensors

    def changes(self, name: str) -> bool:
        """Return whether a tensor's results differ from the merged tensor."""
        return self.account[name] in (RELAXED, KEPT_BASE)

    def compute_into(
        self, kernels: Kernels, name: str, block: Block, base: Tensor, merged: Tensor, out: Sequence[Tensor]
    ) -> bool:
        """Do as `block` with the compiled kernel, into a tensor for each omega; False where it declines."""
        if self.account[name] != RELAXED or self.needs_whole_tensors:
            return False
        s = self._along(name, block, merged)
        by_row = s.dim() > 1 and s.shape[-1] == 1 and s.numel() == merged.shape[0]
        if not by_row and s.numel() != merged.shape[-1]:
            s = s.expand_as(merged)
        flat = s.reshape(-1)
        pulls = (flat * (1.0 - omega) for omega in self.omegas)
        return all(kernels.relax(base, merged, pull, by_row, to) for pull, to in zip(pulls, out, strict=True))

    def _along(self, name: str, block: Block, merged: Tensor) -> Tensor:
        """The importance of a block's entries, broadcastable to them."""
        from aim.relax import along_rows

        source = self._sources[name]
        if block.start == 0 or name not in self._scaled:  # once for a tensor's blocks, which come in order
            s = self._importance(name).clone()
            if name in self.unrelaxed_experts:
                s[self.unrelaxed_experts[name]] = 0
            self._scaled = {name: s.to(merged.device)}
        s, shape = self._scaled[name], self._shapes[name]
        return along_rows(s, shape, self.importance.axes[source], block.start, block.stop, merged.dim())

    def _importance(self, name: str) -> Tensor:
        """Return s (channels,) or (experts, channels) fp32 of a tensor on the CPU, computed once per tensor."""
        with self._lock:
            if name not in self._controlled:
                a = self.importance.activations[self._sources[name]]
                if self.scaling.control == "weight_norm":
                    from aim.controls import weight_magnitudes

                    source, axis = self._bases[name], self.importance.axes[self._sources[name]]
                    a = weight_magnitudes(source.checkpoint.rows(source.name)[:], axis, stacked=a.dim() == 2)
                self._controlled[name] = self.scaling.importance(name, a)
            return self._controlled[name]

    def pulls(self, name: str, axis: int) -> list[Tensor] | None:
        """Return (1 - omega) s (channels,) fp64 for each omega: how far the task vector of a matrix shrinks by channel.

        axis: where the caller takes the channels to be. None where the tensor is left as merged, one number where it is
        frozen. Raises CheckpointError where the channels were measured along another axis.
        """
        import torch

        verdict = self.account[name]
        if verdict == KEPT_BASE:
            return [torch.ones(1, dtype=torch.float64)] * len(self.omegas)
        if verdict != RELAXED:
            return None
        measured = self.importance.axes[self._sources[name]] % len(self._shapes[name])
        if measured != axis:
            raise CheckpointError(
                f"Tensor {name}: its inputs run along axis {measured}, and in the adapter along axis {axis}; the "
                "adapter is for another kind of layer."
            )
        s = self._importance(name).double()
        return [s * (1.0 - omega) for omega in self.omegas]

    def reference(self, name: str, base: Tensor, merged: Tensor) -> list[Tensor]:
        """Return a whole bf16 tensor relaxed with the original's arithmetic, with each omega."""
        from aim.relax import along_rows, relax_reference

        verdict = self.account[name]
        if verdict == KEPT_BASE:
            return [base] * len(self.omegas)
        if verdict != RELAXED:
            return [merged] * len(self.omegas)
        source, shape = self._sources[name], self._shapes[name]
        a = self.importance.activations[source]
        a = along_rows(a, shape, self.importance.axes[source], 0, merged.shape[0], merged.dim())
        return [relax_reference(base, merged, a, omega) for omega in self.omegas]

    def details(self, omega: float) -> JsonObject:
        """Return what the run record says: omega, calibration, and each tensor that was not relaxed, by reason."""
        reasons: dict[str, list[str]] = {}
        for name, verdict in self.account.items():
            if verdict != RELAXED:
                reasons.setdefault(verdict, []).append(name)
        return {
            "omega": omega,
            "statistic": self.importance.statistic,
            "normalization": self.scaling.label().get("normalization", "max"),
            "control": self.scaling.control,
            "relaxed": sum(verdict == RELAXED for verdict in self.account.values()),
            "not_relaxed": reasons,
            "experts_not_relaxed": self.unrelaxed_experts,
            "calibration": without_ids(self.importance.calibration),
            "importance_of": dict(self.importance.base),
        }

    def sentence(self) -> str:
        """Say how many tensors are relaxed and what the others are."""
        counts = Counter(self.account.values())
        relaxed = counts.pop(RELAXED, 0)
        rest = "; ".join(f"{count} not ({reason})" for reason, count in counts.most_common())
        omegas = ", ".join(f"{omega:g}" for omega in self.omegas)
        nothing = " (omega 1 leaves the merge as it is)" if 1 in self.omegas else ""
        control = f" by the control {self.scaling.control}, not by AIM" if self.scaling.control else ""
        experts = sum(map(len, self.unrelaxed_experts.values()))
        few = f"; {experts} matrices of experts with fewer than {self.rule.min_tokens} tokens left as merged"
        return (
            f"Relaxing {relaxed} tensors with omega {omegas}{control}{nothing}{'; ' + rest if rest else ''}"
            f"{few if experts else ''}."
        )


def is_expert(name: str) -> bool:
    """Return whether a tensor is one expert's own matrix."""
    return bool(re.search(r"\.experts\.\d+\.", name))
