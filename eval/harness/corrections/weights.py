"""Complete weights: a tensor that the checkpoint lacks is random in the loaded model, and ends the run.

transformers only warns of it, and lm-eval turns the warning off.
"""

from __future__ import annotations

from collections.abc import Iterable

from common.errors import EvaluationError

SHOWN = 5


def check_loading_info(info: object, label: str) -> list[str]:
    """Check what `from_pretrained(..., output_loading_info=True)` reports.

    Tied heads are not listed by transformers and need no tensor.

    Args:
        info: The loading info: missing_keys, mismatched_keys, unexpected_keys, error_msgs.
        label: Name of the model, for messages.

    Returns:
        Sentences on tensors of the checkpoint that the model has no use for.

    Raises:
        EvaluationError: Tensors are missing or have another shape.
    """
    missing = sorted(map(str, _get(info, "missing_keys")))
    if missing:
        raise EvaluationError(
            f"{label} lacks {_count(missing)} of its model ({_names(missing)}): they would be random numbers; complete "
            "the checkpoint."
        )
    mismatched = sorted(map(_mismatch, _get(info, "mismatched_keys")))
    if mismatched:
        raise EvaluationError(
            f"{label} has {_count(mismatched)} of another shape than its config ({_names(mismatched)})."
        )
    errors = [str(e).strip() for e in _get(info, "error_msgs")]
    if errors:
        raise EvaluationError(f"{label} could not be loaded whole: {errors[0].splitlines()[0]}")
    unexpected = sorted(map(str, _get(info, "unexpected_keys")))
    return [f"{label}: {_count(unexpected)} not used ({_names(unexpected)})."] if unexpected else []


def _get(info: object, name: str) -> Iterable[object]:
    value = info.get(name) if isinstance(info, dict) else getattr(info, name, None)
    return value or ()


def _mismatch(entry: object) -> str:
    """Describe a tensor of another shape: its name, or (name, shape in the checkpoint, shape in the model)."""
    return f"{entry[0]} {tuple(entry[1])}, not {tuple(entry[2])}" if isinstance(entry, tuple | list) else str(entry)


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _names(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
