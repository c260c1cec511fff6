"""Tensors that are not merged: excluded by name (`--exclude`), or absent from some inputs (`--extra_tensors`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import UsageError, nearest
from common.processes.bounded_regex import search_foreign
from common.terminal_text import quoted
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.text_part import is_text_part
from merging.plan.prediction import prediction_names
from merging.plan.slices import Inputs, Slot
from merging.plan.tied_weights import Heads
from merging.recipe.merge_recipe import PlanOptions

HEAD_KEYS = ("architectures", "id2label", "label2id", "num_labels", "problem_type", "classifier_dropout",
             "classifier_activation", "classifier_bias", "summary_type")  # fmt: skip
"""Config keys of a model's output head."""


@dataclass(frozen=True)
class Exclusion:
    """Rule of `--exclude`: tensors whose name in the result matches `pattern` are copied from `owner`."""

    pattern: str
    owner: Checkpoint

    @classmethod
    def of(cls, pattern: str, owner: str, inputs: Inputs) -> Exclusion:
        """Return the rule of a recipe.

        Args:
            pattern: A regular expression, searched in each tensor's name.
            owner: "base" (the first model where there is none) or the name of one of the models.
            inputs: The checkpoints of the merge.

        Raises:
            UsageError: `owner` is not among the inputs.
        """
        if owner == "base":
            return cls(pattern, inputs.template_model)
        named = next((c for c in inputs.all if owner in (c.name, c.ref.path)), None)
        if named is None:
            names = [checkpoint.name for checkpoint in inputs.all]
            listed = ", ".join(names)
            raise UsageError(
                f"--exclude_from {quoted(owner)} must be base or one of the models ({listed}).{nearest(owner, names)}"
            )
        return cls(pattern, named)

    def matches(self, name: str) -> bool:
        """Return True where the tensor of that name is excluded."""
        return search_foreign(self.pattern, name, "--exclude")

    def apply(self, slots: Sequence[Slot], inputs: Inputs, heads: Heads) -> list[Slot]:
        """Return the slots with the owner's tensors in place of all matching ones.

        Raises:
            UsageError: The pattern matches no tensor.
        """
        placed_slots: list[Slot] = []
        for slot in slots:
            if not self.matches(slot.name):
                placed_slots.append(slot)
            elif heads.stored(self.owner, name := self._name(slot, inputs)) is not None:
                placed_slots.append(Slot(slot.name, None, slot.depth, (self.owner, name), (), name))
        placed = {slot.name for slot in slots}
        owner_names = [name for name in self.owner.tensors if name not in placed and self.matches(name)]
        if not owner_names and not any(self.matches(name) for name in (*placed, *self._names_elsewhere(inputs))):
            raise UsageError(f"--exclude {quoted(self.pattern)} matches no tensor; the first is {slots[0].name}.")
        return placed_slots + [Slot(name, None, 0.0, (self.owner, name), (), name) for name in owner_names]

    def _names_elsewhere(self, inputs: Inputs) -> list[str]:
        return [name for checkpoint in inputs.all for name in checkpoint.tensors]

    def _name(self, slot: Slot, inputs: Inputs) -> str:
        """Return the name of a slot's tensor in the owner, which differs where a slice moves layers."""
        if slot.source[0] is self.owner:
            return slot.source[1]
        if inputs.base is self.owner:
            return slot.base
        for position, name in zip(slot.output_slice.models if slot.output_slice else (), slot.models, strict=False):
            if inputs.models[position] is self.owner:
                return name
        return slot.name

    def changes_head(self, slots: Sequence[Slot], template_model: Checkpoint) -> bool:
        """Return True where the excluded tensors differ from the template model's in names or shapes."""
        excluded = {
            s.name: self.owner.tensors[s.source[1]].shape
            for s in slots
            if s.source[1] in self.owner.tensors and self.matches(s.name)
        }
        expected = {name: info.shape for name, info in template_model.tensors.items() if self.matches(name)}
        return self.owner is not template_model and excluded != expected

    def notes(self, slots: Sequence[Slot], inputs: Inputs) -> list[str]:
        """Return notes on the excluded tensors and their owner."""
        names = [slot.name for slot in slots if self.matches(slot.name)]
        listed = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else "none"
        left_out = {
            checkpoint.name: [name for name in checkpoint.tensors if self.matches(name) and name not in names]
            for checkpoint in inputs.all
        }
        return [
            f"Excluded from the merge, copied from {self.owner.name}: {listed} ({len(names)} tensors).",
            *(
                f"{model}: left out {', '.join(lacking[:3])}, which --exclude matches and {self.owner.name} lacks."
                for model, lacking in left_out.items()
                if lacking
            ),
        ]


class ExtraTensors:
    """Rule of `--extra_tensors` for tensors that not every input has, and notes on its use."""

    def __init__(self, options: PlanOptions, checkpoints: Sequence[Checkpoint]) -> None:
        self._rule = options.extra_tensors
        self._prediction = {id(checkpoint): prediction_names(checkpoint) for checkpoint in checkpoints}
        self._account: defaultdict[tuple[str, str], list[str]] = defaultdict(list)

    def is_prediction(self, checkpoint: Checkpoint, name: str) -> bool:
        """Return True for a tensor of multi-token prediction."""
        return name in self._prediction[id(checkpoint)]

    def rule(self, owner: Checkpoint, name: str, lacking: Sequence[Checkpoint]) -> str:
        """Return "keep", "drop" or "error" for a tensor of the template model that other inputs lack."""
        if all(map(is_text_part, lacking)):  # the vision tower of a model merged with text models
            return "keep"
        return self._rule or ("keep" if self.is_prediction(owner, name) else "error")

    def leaves_out(self, checkpoint: Checkpoint, name: str) -> bool:
        """Return True for a tensor that the template model lacks and that may be left out."""
        if self._rule == "error":
            return False
        return self._rule is not None or self.is_prediction(checkpoint, name)

    def note(self, what: str, name: str, lacking: Sequence[Checkpoint]) -> None:
        """Take down a tensor that was kept or dropped since these inputs lack it."""
        self._account[what, ", ".join(checkpoint.name for checkpoint in lacking)].append(name)

    def notes(self, template: str) -> list[str]:
        """Return the sentences on what was kept and dropped."""
        words = {"keep": f"kept as in {template}", "drop": "dropped"}
        return [
            f"Not in {lacking}: {', '.join(names[:3])} ({len(names)} tensors), {words[what]} (--extra_tensors)."
            for (what, lacking), names in self._account.items()
        ]
