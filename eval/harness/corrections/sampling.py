"""Sampling that depends on the request alone: one random generator a row.

transformers draws all rows of a batch from one global generator, so that a draw depends on its neighbors and on the
batch size, and equal requests of a batch share their seed. Here the noise of each row comes from its own generator:
argmax(log p + Gumbel noise) is a draw from p.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

if TYPE_CHECKING:
    from common.files.json_values import JsonObject

WARPERS = {
    "top_k": (TopKLogitsWarper, 0),
    "top_p": (TopPLogitsWarper, 1.0),
    "min_p": (MinPLogitsWarper, 0.0),
    "typical_p": (TypicalLogitsWarper, 1.0),
}
"""Setting -> its transformers class and the value that changes nothing."""


class GumbelNoise(LogitsProcessor):  # type: ignore[misc]
    """Adds Gumbel noise to the scores of each row from the row's own seed."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores + noise, shape (rows, vocabulary), float32."""
        size = scores.shape[-1]
        draws = [torch.empty(size, dtype=torch.float32).exponential_(generator=g) for g in self._generators]
        return scores.float() - torch.stack(draws).log().to(scores.device)


def take_sampling(settings: JsonObject, seeds: Sequence[int]) -> LogitsProcessorList:
    """Remove the sampling settings from `settings` and return the processors that do the same; none for greedy.

    Temperature comes first, then top_k, top_p, min_p and typical_p, each only where asked for, then the noise.
    """
    temperature = float(settings.pop("temperature", 0.0) or 0.0)
    is_sampling = settings.pop("do_sample", None) is not False and temperature > 0
    chosen = {name: settings.pop(name) for name in tuple(WARPERS) if name in settings}
    processors = LogitsProcessorList()
    if not is_sampling:
        return processors
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(temperature))
    for name, (kind, neutral) in WARPERS.items():
        if chosen.get(name, neutral) not in (None, neutral):
            processors.append(kind(chosen[name]))
    processors.append(GumbelNoise(seeds))
    return processors


def seed_of(seed: int, prompt: str, number: int) -> int:
    """Return the seed of one request from the run's seed, the prompt and the sample's number."""
    text = f"{seed}:{number}:{prompt}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1


def settings_without_seed(settings: JsonObject) -> JsonObject:
    """Return generation settings without the seed, by which requests share a batch."""
    return {k: v for k, v in settings.items() if k != "seed"}
