"""The next token of each row: the likeliest, or a draw that depends on the row alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def next_ids(logits: Tensor, sequences: Sequence[Any]) -> list[int]:
    """Choose from (rows, vocabulary) for each sequence, by its request's temperature, top_k and top_p, and its draws.

    One uniform number a token against the cumulated probabilities (float64): the same draw whatever the batch.
    """
    chosen = logits.argmax(dim=-1).tolist()
    for row, sequence in enumerate(sequences):
        request = sequence.request
        if request.temperature > 0:
            chosen[row] = _draw(logits[row], request.temperature, request.options, sequence.draws.random())
    return [int(i) for i in chosen]


def _draw(logits: Tensor, temperature: float, options: Any, uniform: float) -> int:
    scaled = logits.double() / temperature
    top_k = options.get("top_k") or 0
    if 0 < top_k < len(scaled):
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[-1], -torch.inf)
    probabilities = scaled.softmax(dim=-1)
    top_p = options.get("top_p") or 1.0
    if top_p < 1.0:
        ordered, order = probabilities.sort(descending=True, stable=True)
        outside = ordered.cumsum(dim=0) - ordered >= top_p
        probabilities = probabilities.clone()
        probabilities[order[outside]] = 0.0
    bounds = probabilities.cumsum(dim=0)
    return min(int(torch.searchsorted(bounds, uniform * bounds[-1], right=True)), len(bounds) - 1)
