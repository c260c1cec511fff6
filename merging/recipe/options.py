"""Rules of a recipe for inputs that differ."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.errors import UsageError
from common.terminal_text import quoted

EXTRA_TENSORS = ("keep", "drop", "error")
PLAN_KEYS = ("allow_config_mismatch", "extra_tensors")
"""Recipe keys of `PlanOptions`."""


@dataclass(frozen=True)
class PlanOptions:
    """Rules for inputs that differ.

    Attributes:
        allow_config_mismatch: Merge models whose configs differ in keys that change the function of the weights.
        extra_tensors: Rule for tensors that not every input has: "keep" (as in the template model), "drop" or "error";
            None keeps multi-token prediction and refuses other tensors.
        keep_wide: Keep the dtype of tensors that every input stores in a wider dtype than its other tensors.
    """

    allow_config_mismatch: bool = False
    extra_tensors: str | None = None
    keep_wide: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        """Raise UsageError for invalid values."""
        if not isinstance(self.allow_config_mismatch, bool):
            raise UsageError(
                f"allow_config_mismatch must be true or false, found {quoted(self.allow_config_mismatch)}."
            )
        if self.extra_tensors not in (None, *EXTRA_TENSORS):
            raise UsageError(f"extra_tensors must be {', '.join(EXTRA_TENSORS)}, found {quoted(self.extra_tensors)}.")

    def as_yaml_dict(self) -> dict[str, object]:
        """Return the keys of a recipe that differ from the defaults."""
        return {
            **({"allow_config_mismatch": True} if self.allow_config_mismatch else {}),
            **({"extra_tensors": self.extra_tensors} if self.extra_tensors else {}),
        }


DEFAULTS = PlanOptions()
