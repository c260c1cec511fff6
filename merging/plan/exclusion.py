"""Tensors that a merge leaves out: taken from the base or a named model as they are (`--exclude`, `--exclude_from`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import UsageError, nearest
from common.processes.bounded_regex import search_foreign
from common.terminal_text import quoted
from merging.checkpoints.checkpoint import Checkpoint
from merging.plan.slices import Inputs, Slot
from merging.plan.tied_weights import Heads

HEAD_KEYS = ("architectures", "id2label", "label2id", "num_labels", "problem_type", "classifier_dropout",
             "classifier_activation", "classifier_bias", "summary_type")  # fmt: skip
"""Keys of a config that go with a model's output head."""


@dataclass(frozen=True)
class Exclusion:
    """Tensors that are not merged: those whose name in the result matches `pattern`, copied from `owner`."""

    pattern: str
    owner: Checkpoint

    @classmethod
    def of(cls, pattern: str | None, owner: str, inputs: Inputs) -> Exclusion | None:
        """Return what a recipe excludes; None where it excludes nothing.

        Args:
            pattern: a regular expression, searched in each tensor's name.
            owner: "base" (where there is none, the first model) or the name of one of the models.
            inputs: the checkpoints of the merge.

        Raises:
            UsageError: for a name that is none of the inputs'.
        """
        if pattern is None:
            return None
        if owner == "base":
            return cls(pattern, inputs.template_model)
        named = next((c for c in inputs.all if owner in (c.name, c.ref.path)), None)
        if named is None:
            names = [checkpoint.name for checkpoint in inputs.all]
            known = ", ".join(names)
            raise UsageError(
                f"--exclude_from {quoted(owner)} must be base or one of the models ({known}).{nearest(owner, names)}"
            )
        return cls(pattern, named)

    def matches(self, name: str) -> bool:
        """Return whether the tensor of that name is excluded."""
        return search_foreign(self.pattern, name, "--exclude")

    def apply(self, slots: Sequence[Slot], inputs: Inputs, heads: Heads) -> list[Slot]:
        """Return the layout with the excluded tensors as the owner has them, and no others that match.

        Raises UsageError where the pattern matches no tensor.
        """
        laid: list[Slot] = []
        for slot in slots:
            if not self.matches(slot.name):
                laid.append(slot)
            elif heads.stored(self.owner, name := self._name(slot, inputs)) is not None:
                laid.append(Slot(slot.name, None, slot.depth, (self.owner, name), (), name))
        placed = {slot.name for slot in slots}
        owner_names = [name for name in self.owner.tensors if name not in placed and self.matches(name)]
        if not owner_names and not any(self.matches(name) for name in (*placed, *self._names_elsewhere(inputs))):
            raise UsageError(f"--exclude {quoted(self.pattern)} matches no tensor; the first is {slots[0].name}.")
        return laid + [Slot(name, None, 0.0, (self.owner, name), (), name) for name in owner_names]

    def _names_elsewhere(self, inputs: Inputs) -> list[str]:
        return [name for checkpoint in inputs.all for name in checkpoint.tensors]

    def _name(self, slot: Slot, inputs: Inputs) -> str:
        """The name of a slot's tensor in the owner, which differs where layers are taken from other places."""
        if slot.source[0] is self.owner:
            return slot.source[1]
        if inputs.base is self.owner:
            return slot.base
        for position, name in zip(slot.output_slice.models if slot.output_slice else (), slot.models, strict=False):
            if inputs.models[position] is self.owner:
                return name
        return slot.name

    def changes_head(self, slots: Sequence[Slot], template_model: Checkpoint) -> bool:
        """Return whether the excluded tensors differ from the template model's in names or shapes."""
        ours = {
            s.name: self.owner.tensors[s.source[1]].shape
            for s in slots
            if s.source[1] in self.owner.tensors and self.matches(s.name)
        }
        theirs = {name: info.shape for name, info in template_model.tensors.items() if self.matches(name)}
        return self.owner is not template_model and ours != theirs

    def notes(self, slots: Sequence[Slot], inputs: Inputs) -> list[str]:
        """Return the sentences on what is excluded, and whose it is."""
        names = [slot.name for slot in slots if self.matches(slot.name)]
        listed = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else "none"
        left = {
            checkpoint.name: [name for name in checkpoint.tensors if self.matches(name) and name not in names]
            for checkpoint in inputs.all
        }
        return [
            f"Excluded from the merge, as {self.owner.name} has them: {listed} ({len(names)} tensors).",
            *(
                f"{model}: left out {', '.join(lacking[:3])}, which --exclude matches and {self.owner.name} lacks."
                for model, lacking in left.items()
                if lacking
            ),
        ]
