"""Licenses of the inputs by their model cards, and the license of the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from merging.checkpoints.checkpoint import Checkpoint

COMBINED_LICENSE = "licenses-of-the-inputs"
"""`license_name` of a result whose inputs have different licenses; the hub requires a name for `license: other`."""


@dataclass(frozen=True)
class Licenses:
    """Licenses of the inputs and of the result.

    Attributes:
        by_model: {model name: licenses}, for models whose card states one.
        result: The license of the result; None where the inputs state none or different ones.
        warning: A sentence for inputs with different licenses, else None.
        details: `license`, `license_name` and `license_link` for the front matter of the result's card.
    """

    by_model: Mapping[str, tuple[str, ...]]
    result: str | None
    warning: str | None
    details: Mapping[str, str] = field(default_factory=dict)


def licenses_of(checkpoints: Sequence[Checkpoint]) -> Licenses:
    """Return the licenses of the inputs; the result has one only where all that state a license agree."""
    by_model = {checkpoint.name: checkpoint.licenses for checkpoint in checkpoints if checkpoint.licenses}
    distinct = list(dict.fromkeys(license for licenses in by_model.values() for license in licenses))
    if len(distinct) > 1:
        listed = "; ".join(f"{name}: {', '.join(licenses)}" for name, licenses in by_model.items())
        warning = f"The inputs have different licenses ({listed}); the result's must satisfy them all."
        return Licenses(by_model, None, warning, {"license": "other", "license_name": COMBINED_LICENSE})
    details = [detail for checkpoint in checkpoints for detail in checkpoint.license_details]
    return Licenses(by_model, distinct[0] if distinct else None, None, details[0] if distinct else {})
