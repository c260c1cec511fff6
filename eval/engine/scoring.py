"""Log-likelihoods of continuations: sorted by length, each input computed once, logits only where they are needed."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eval.engine.kv_cache import repeated
from eval.engine.memory import tried
from eval.engine.prefixes import shared, worth_it

Scored = Callable[[Any, tuple[float, bool]], None]


@dataclass(frozen=True)
class Question:
    """One input and what is asked about its end: `wanted` pairs a caller's mark with a continuation's ids."""

    ids: tuple[int, ...]
    wanted: list[tuple[Any, list[int]]] = field(default_factory=list)

    @property
    def positions(self) -> int:
        """How many of the last positions' logits are needed."""
        return max(len(ids) for _, ids in self.wanted)


class Scorer:
    """Scores continuations with one model. `rows` is the most rows of a pass, `tokens` the most tokens."""

    def __init__(self, model: Any, pad: int, max_length: int, rows: int, tokens: int, sharing: bool) -> None:
        self.model, self.pad, self.max_length = model, pad, max_length
        self.rows, self.tokens = rows, tokens
        self._sharing = sharing
        self._few_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._device = model.device

    def score(self, pairs: Iterable[tuple[Any, str, list[int], list[int]]], scored: Scored) -> None:
        """Score (mark, group, context ids, continuation ids); `scored(mark, (log-likelihood, greedy))` as they come.

        Inputs of one group may share a beginning, which is then computed once. Too long inputs lose their beginning.
        """
        groups: dict[str, dict[tuple[int, ...], Question]] = defaultdict(dict)
        for mark, group, context, continuation in pairs:
            if not continuation:  # nothing to score: certain
                scored(mark, (0.0, True))
                continue
            ids = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            question = groups[group].setdefault(ids, Question(ids))
            question.wanted.append((mark, continuation[-len(ids) :]))
        alone: list[Question] = []
        for questions in groups.values():
            listed = list(questions.values())
            length = self._shared_length(listed)
            if length:
                self._with_prefix(listed, length, scored)
            else:
                alone += listed
        for batch in self._batches(alone, 0):
            self._scored_or_halved(batch, None, scored)

    def _shared_length(self, questions: Sequence[Question]) -> int:
        if not self._sharing:
            return 0
        length = min(shared([q.ids for q in questions]), min(len(q.ids) - q.positions for q in questions))
        return length if worth_it(length, [len(q.ids) for q in questions]) else 0

    def _with_prefix(self, questions: Sequence[Question], length: int, scored: Scored) -> None:
        from eval.engine.kv_cache import new_cache

        cache = new_cache()
        with torch.inference_mode():
            prefix = torch.tensor([questions[0].ids[:length]], device=self._device)
            self.model(input_ids=prefix, past_key_values=cache, use_cache=True, **self._last_logits(1))
        for batch in self._batches(questions, length):
            self._scored_or_halved(batch, (cache, length), scored)

    def _last_logits(self, count: int) -> dict[str, Any]:
        return {"logits_to_keep": count} if self._few_logits else {}

    def _batches(self, questions: Sequence[Question], skip: int) -> Iterator[list[Question]]:
        """Longest first: what does not fit shows at once, and the time left is over-estimated, not under."""
        batch: list[Question] = []
        for question in sorted(questions, key=lambda q: (-len(q.ids), q.ids)):
            widest = len((batch or [question])[0].ids) - skip
            if batch and (len(batch) >= self.rows or widest * (len(batch) + 1) > self.tokens):
                yield batch
                batch = []
            batch.append(question)
        if batch:
            yield batch

    def _scored_or_halved(self, batch: list[Question], prefix: tuple[Any, int] | None, scored: Scored) -> None:
        """Score a batch; where memory does not suffice, its halves, and smaller batches from then on."""
        answers = tried(
            lambda: self._answers(batch, prefix),
            len(batch),
            self._device,
            f"There is not enough memory to score one sequence of {len(batch[0].ids)} tokens on {self._device}; give a "
            "shorter --max_model_len, a smaller --dtype or another --device.",
        )
        if answers is None:
            self.rows = max(1, min(self.rows, len(batch)) // 2)
            self.tokens = max(1, self.tokens // 2)
            middle = len(batch) // 2
            self._scored_or_halved(batch[:middle], prefix, scored)
            self._scored_or_halved(batch[middle:], prefix, scored)
            return
        for mark, answer in answers:
            scored(mark, answer)

    @torch.inference_mode()
    def _answers(self, batch: list[Question], prefix: tuple[Any, int] | None) -> list[tuple[Any, tuple[float, bool]]]:
        skip = prefix[1] if prefix else 0
        lengths = [len(q.ids) - skip for q in batch]
        inputs = torch.full((len(batch), max(lengths)), self.pad, dtype=torch.long)
        for row, question in enumerate(batch):
            inputs[row, : lengths[row]] = torch.tensor(question.ids[skip:])
        needed = sorted({p for n, q in zip(lengths, batch, strict=True) for p in range(n - q.positions, n)})
        options: dict[str, Any] = {"use_cache": False}
        if prefix:
            options = {"use_cache": True, "past_key_values": repeated(prefix[0], len(batch))}
        if self._few_logits:
            options["logits_to_keep"] = torch.tensor(needed, device=self._device)
        # Padding on the right needs no mask: a causal model does not look there.
        logits: Tensor = self.model(input_ids=inputs.to(self._device), **options).logits
        column = {p: i for i, p in enumerate(needed)} if self._few_logits else {p: p for p in needed}
        answers = []
        for row, question in enumerate(batch):
            at = [column[p] for p in range(lengths[row] - question.positions, lengths[row])]
            steps = torch.log_softmax(logits[row, at].float(), dim=-1)  # (positions, vocabulary)
            best = steps.argmax(dim=-1).tolist()
            for mark, ids in question.wanted:
                found = steps[len(at) - len(ids) :].gather(1, torch.tensor(ids, device=steps.device)[:, None])
                answers.append((mark, (float(found.double().sum()), best[len(at) - len(ids) :] == ids)))
        return answers
