"""Finite logits: NaN or infinity ends the run, since an argmax over NaN is a wrong answer without a word.

Some models mask entries of their vocabulary, such as padded ones, with minus infinity. That is no fault as long as a
row has a finite entry: its largest logit decides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import LogitsProcessor

from common.errors import EvaluationError


def check_logits(logits: Tensor, dtype: object) -> None:
    """Check logits or log-probabilities.

    Args:
        logits: Shape (..., vocabulary).
        dtype: That of the weights, for the message.

    Raises:
        EvaluationError: A row holds NaN or infinity, or minus infinity in every entry.
    """
    if not bool(torch.isfinite(logits.amax(dim=-1)).all()):  # the maximum is NaN where an entry is
        raise non_finite(dtype)


def check_log_likelihood(value: float, dtype: object) -> None:
    """Raise EvaluationError for a log-likelihood that is not a finite number."""
    if value == -math.inf:
        raise EvaluationError(
            "The model gives a token of a choice no probability at all (logit minus infinity); unmask that entry of "
            "its vocabulary, or leave out benchmarks of multiple choice."
        )
    if not math.isfinite(value):
        raise non_finite(dtype)


def non_finite(dtype: object) -> EvaluationError:
    """The error for logits that are not finite."""
    name = str(dtype).removeprefix("torch.")
    advice = "its weights hold NaN or infinity" if name == "float32" else "try --dtype float32"
    return EvaluationError(f"The model's logits are NaN or infinite in {name}; {advice}.")


class FiniteLogits(LogitsProcessor):  # type: ignore[misc]
    """First logits processor of a generation: ends the run at NaN or infinity."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores as they are, after the check."""
        check_logits(scores, self._dtype)
        return scores
