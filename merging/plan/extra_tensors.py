"""Tensors that not every input has: kept from the template model, dropped, or refused by a stated rule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.text_part import is_text_part
from merging.plan.prediction import prediction_names
from merging.recipe.options import PlanOptions


class ExtraTensors:
    """The rule for tensors that not every input has, and an account of what it did."""

    def __init__(self, options: PlanOptions, checkpoints: Sequence[Checkpoint]) -> None:
        self._rule = options.extra_tensors
        self._prediction = {id(checkpoint): prediction_names(checkpoint) for checkpoint in checkpoints}
        self._account: defaultdict[tuple[str, str], list[str]] = defaultdict(list)

    def is_prediction(self, checkpoint: Checkpoint, name: str) -> bool:
        """Return True for a tensor of a part that predicts further tokens."""
        return name in self._prediction[id(checkpoint)]

    def rule(self, owner: Checkpoint, name: str, lacking: Sequence[Checkpoint]) -> str:
        """Return "keep", "drop" or "error" for a tensor of the template model that other inputs lack."""
        if all(map(is_text_part, lacking)):  # the vision tower of a model beside text models
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
