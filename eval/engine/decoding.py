"""Generations, many at a time: a finished sequence leaves at once and a waiting one takes its place.

Every sequence has its own stop strings, length and random draws, so that its text does not depend on its neighbours
(but for rounding). Sequences that memory turned out too small for go back to wait with what they have.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from console.errors import EvaluationError
from console.memory import ran_out
from eval.engine import kv_cache
from eval.engine.memory import release
from eval.engine.prefixes import shared, worth_it
from eval.engine.sampling import next_ids
from eval.engine.stops import Stops
from eval.harness.request_types import Request

Ended = Callable[[Request, list[int]], None]
REFILL = 8
"""A prompt enters a running batch when an eighth of its rows is free: entering costs a pass of its own."""


@dataclass
class Generation:
    """One generation under way: ids of its prompt and what followed."""

    request: Request
    prompt: list[int]
    stops: Stops
    room: int
    ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.draws = random.Random(f"{self.request.seed}:{self.request.key}:{self.request.number}")

    @property
    def ended(self) -> bool:
        return bool(self.ids) and (len(self.ids) >= self.room or self.stops.reached(self.ids))


class Decoder:
    """Generates with one model. `rows` is the most sequences at a time, `tokens` the most prompt tokens of a pass."""

    def __init__(self, model: Any, pad: int, rows: int, tokens: int) -> None:
        self.model, self.pad, self.rows, self.tokens = model, pad, rows, tokens
        self._few_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._device = model.device
        self._running: list[Generation] = []
        self._cache: Any = None
        self._mask: Tensor | None = None
        self._prefix: tuple[list[int], Any] | None = None

    def generate(self, generations: Sequence[Generation], ended: Ended) -> None:
        """Run all to their ends; `ended(request, ids)` as each gets there."""
        groups: dict[str, list[Generation]] = {}
        for sequence in generations:
            groups.setdefault(sequence.request.task, []).append(sequence)
        prefixes = {task: self._shared_length(group) for task, group in groups.items()}
        waiting = [s for group in groups.values() for s in sorted(group, key=lambda s: (-len(s.prompt), s.prompt))]
        waiting.reverse()  # taken from the end: longest first within a task
        while waiting or self._running:
            try:
                entering = self._entering(waiting, prefixes)
                if entering:
                    self._enter(entering, prefixes[entering[0].request.task])
                else:
                    self._step()
            except Exception as error:  # torch raises RuntimeError or its subclasses, by device and version
                if not ran_out(error):
                    raise
                self._shrink(waiting, error)
            self._leave(ended)
        self._prefix = None

    @staticmethod
    def _shared_length(group: Sequence[Generation]) -> int:
        length = min(shared([s.prompt for s in group]), min(len(s.prompt) for s in group) - 1)
        return length if worth_it(length, [len(s.prompt) for s in group]) else 0

    def _entering(self, waiting: list[Generation], prefixes: dict[str, int]) -> list[Generation]:
        """Take those that enter now from the end of `waiting`: all of one task, none where few rows are free."""
        free = self.rows - len(self._running)
        if not waiting or free < 1 or (self._running and free * REFILL < self.rows and len(waiting) > free):
            return []
        task = waiting[-1].request.task
        entering: list[Generation] = []
        longest = 0
        while waiting and len(entering) < free and waiting[-1].request.task == task:
            longest = max(longest, len(waiting[-1].prompt) + len(waiting[-1].ids) - prefixes[task])
            if entering and longest * (len(entering) + 1) > self.tokens:
                break
            entering.append(waiting.pop())
        self._running += entering  # so that they are not lost when memory does not suffice
        return entering

    @torch.inference_mode()
    def _enter(self, entering: list[Generation], skip: int) -> None:
        """Compute the prompts of new rows, padded on the left, and join them to the running ones."""
        inputs = [(s.prompt + s.ids)[skip:] for s in entering]
        width = max(map(len, inputs))
        ids = torch.full((len(inputs), width), self.pad, dtype=torch.long)
        mask = torch.zeros((len(inputs), skip + width), dtype=torch.long)
        mask[:, :skip] = 1
        for row, new in enumerate(inputs):
            ids[row, width - len(new) :] = torch.tensor(new)
            mask[row, skip + width - len(new) :] = 1
        ids, mask = ids.to(self._device), mask.to(self._device)
        cache = kv_cache.repeated(self._beginning(entering[0], skip), len(inputs)) if skip else kv_cache.new_cache()
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, skip:]
        logits = self._logits(ids, mask, positions, cache)
        earlier = len(self._running) - len(entering)
        self._cache, self._mask = kv_cache.joined(self._cache if earlier else None, self._mask, cache, mask)
        self._append(entering, logits)

    def _beginning(self, sequence: Generation, length: int) -> Any:
        """The cache of the first `length` ids; kept until another beginning is asked for."""
        ids = sequence.prompt[:length]
        if self._prefix is None or self._prefix[0] != ids:
            cache = kv_cache.new_cache()
            options = {"logits_to_keep": 1} if self._few_logits else {}
            inputs = torch.tensor([ids], device=self._device)
            self.model(input_ids=inputs, past_key_values=cache, use_cache=True, **options)
            self._prefix = ids, cache
        return self._prefix[1]

    @torch.inference_mode()
    def _step(self) -> None:
        """One more token for every running row."""
        assert self._mask is not None
        ids = torch.tensor([[s.ids[-1]] for s in self._running], device=self._device)
        mask = torch.cat([self._mask, self._mask.new_ones(len(ids), 1)], dim=1)
        positions = mask.sum(dim=1, keepdim=True) - 1
        logits = self._logits(ids, mask, positions, self._cache)
        self._mask = mask
        self._append(self._running, logits)

    def _logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **({"logits_to_keep": 1} if self._few_logits else {}),
        )
        return out.logits[:, -1]  # type: ignore[no-any-return]  # (rows, vocabulary)

    @staticmethod
    def _append(generations: Sequence[Generation], logits: Tensor) -> None:
        for sequence, new in zip(generations, next_ids(logits, generations), strict=True):
            sequence.ids.append(new)

    def _leave(self, ended: Ended) -> None:
        """Hand over what has ended and keep the rows of the rest."""
        done = [s for s in self._running if s.ended]
        if not done:
            return
        rest = [at for at, s in enumerate(self._running) if not s.ended]
        self._running = [self._running[at] for at in rest]
        if not rest:
            self._cache, self._mask = None, None
        elif self._cache is not None and self._mask is not None:
            self._cache, self._mask = kv_cache.kept(self._cache, self._mask, rest)
        for sequence in done:
            ended(sequence.request, sequence.ids)

    def _shrink(self, waiting: list[Generation], error: Exception) -> None:
        """Send all running sequences back to wait and allow half as many rows from now on."""
        running, self._running = self._running, []
        self._cache, self._mask = None, None
        release(self._device)
        if len(running) == 1:
            raise EvaluationError(
                f"There is not enough memory to continue one sequence of {len(running[0].prompt)} tokens on "
                f"{self._device}; give a shorter --max_model_len, a smaller --dtype or another --device."
            ) from error
        self.rows = max(1, min(self.rows, len(running)) // 2)
        self.tokens = max(1, self.tokens // 2)
        waiting += reversed(running)
