"""transformers in this process, on a CPU or GPU: scoring and decoding by our own loops, so that batches may change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eval.engine import memory
from eval.engine.stops import Stops
from eval.engine.tokens import Tokens, windows
from eval.harness.request_types import Answered, Request


class HFEngine:
    """A causal language model and its tokenizer.

    `max_length` is the most tokens of prompt and answer; `batch_size` the most rows, or None for as many as fit, which
    a failed allocation corrects. `sharing` computes beginnings that many prompts share once.
    """

    def __init__(
        self, model: Any, tokenizer: Any, max_length: int, batch_size: int | None, sharing: bool = True
    ) -> None:
        from eval.engine import kv_cache

        self.model, self.max_length = model.eval(), max_length
        self.tokens = Tokens(tokenizer, getattr(model, "generation_config", None))
        self._asked = batch_size
        self._plain_cache = kv_cache.supports(model)
        self._sharing = sharing and self._plain_cache
        self._rows: dict[str, int] = {}

    def answer(self, requests: Sequence[Request], answered: Answered) -> None:
        """Answer scores first, then generations; texts' likelihoods are scores of their windows."""
        scores = [r for r in requests if r.kind == "score"]
        if scores:
            self._score([(r, r.task, *self.tokens.pair(r)) for r in scores], answered, self._sharing)
        rolling = [r for r in requests if r.kind == "rolling"]
        if rolling:
            self._roll(rolling, answered)
        generate = [r for r in requests if r.kind == "generate"]
        plain = [r for r in generate if self._plain_cache and not _special_options(r)]
        if plain:
            self._decode(plain, answered)
        taken = {id(r) for r in plain}
        rest = [r for r in generate if id(r) not in taken]
        if rest:
            from eval.engine.generate import generate_batches

            generate_batches(self.model, self.tokens, rest, self.max_length, self._most_rows(), answered)

    def used(self) -> Mapping[str, Any]:
        """The dtype of the weights, the batch sizes last used, and whether beginnings were shared."""
        return {
            "dtype_used": str(self.model.dtype).removeprefix("torch."),
            "batch_size_used": dict(self._rows) or self._asked,
            "decoding": "continuous batches" if self._plain_cache else "transformers' generate",
        }

    def _roll(self, requests: Sequence[Request], answered: Answered) -> None:
        parts = [windows(self.tokens.encode(r.context), self.tokens.prefix, self.max_length) for r in requests]
        totals = [0.0] * len(requests)
        missing = [len(p) for p in parts]

        def scored(mark: int, answer: tuple[float, bool]) -> None:
            totals[mark] += answer[0]
            missing[mark] -= 1
            if not missing[mark]:
                answered(requests[mark], totals[mark])

        for mark, found in enumerate(parts):
            if not found:
                answered(requests[mark], 0.0)
        pairs = [(m, str(m), a, b) for m, found in enumerate(parts) for a, b in found]
        self._score(pairs, scored, sharing=False)

    def _decode(self, requests: Sequence[Request], answered: Answered) -> None:
        from eval.engine.decoding import Decoder, Generation

        stops: dict[tuple[str, ...], Stops] = {}
        generations = []
        for r in requests:
            end = stops.setdefault(r.until, Stops(self.tokens, r.until))
            prompt = self.tokens.prompt(r.context, self.max_length - r.max_tokens)
            generations.append(Generation(r, prompt or [self.tokens.pad], end, r.max_tokens))
        longest = max(len(g.prompt) + g.room for g in generations)
        decoder = Decoder(self.model, self.tokens.pad, self._rows_for(longest), self._pass_tokens)
        decoder.generate(generations, lambda r, ids: answered(r, stops[r.until].text(ids)))
        self._rows["generate"] = decoder.rows

    def _score(self, pairs: list[Any], scored: Callable[[Any, tuple[float, bool]], None], sharing: bool) -> None:
        from eval.engine.scoring import Scorer

        rows = self._asked or self._pass_tokens
        scorer = Scorer(self.model, self.tokens.pad, self.max_length, rows, self._pass_tokens, sharing)
        scorer.score(pairs, scored)
        self._rows["tokens of a scoring pass"] = scorer.tokens
        if self._asked:
            self._rows["score"] = scorer.rows

    @property
    def _pass_tokens(self) -> int:
        return memory.PASS_TOKENS[self._kind]

    @property
    def _kind(self) -> str:
        return "cuda" if self.model.device.type == "cuda" else "cpu"

    def _most_rows(self) -> int:
        return self._rows_for(self.max_length)

    def _rows_for(self, length: int) -> int:
        """Rows of `length` tokens: as asked, else what memory holds (their usual length is half of the most)."""
        if self._asked:
            return self._asked
        element = self.model.dtype.itemsize
        available = memory.available_bytes(self.model.device)
        return memory.rows_that_fit(self.model.config.to_dict(), element, length, available, self._kind)


def _special_options(request: Request) -> bool:
    """Whether a request has settings that only transformers' own generate knows (beams, penalties, ...)."""
    return bool(set(request.options) - {"top_k", "top_p"})
