"""Ends of generations: end ids and stop strings, looked for in the text as it is decoded after its prompt.

lm-eval's `hf` model keeps a batch going until its last row has ended and looks for each stop string in each row apart.
Here each row ends for itself, and it is recorded where and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import StoppingCriteria

from eval.harness.corrections.decoding import CONTEXT, ContextDecoder

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


class StopCriteria(StoppingCriteria):  # type: ignore[misc]
    """Per-row end of a batch of generations.

    `lengths[row]` is the number of generated tokens and `reasons[row]` "stop" once the row has ended. A stop string
    inside a reasoning block does not end a generation: with `think_end` they are looked for after that id.
    """

    def __init__(
        self, decoder: ContextDecoder, width: int, rows: int, strings: Sequence[str], ends: frozenset[int],
        think_end: int | None = None,
    ) -> None:  # fmt: skip
        self._decoder, self._width = decoder, width
        self._strings = tuple(s for s in strings if s)
        self._ends, self._think_end = ends, think_end
        self._tail = max((len(s.encode()) for s in self._strings), default=0) + 2
        self._thinking = [think_end is not None] * rows
        self.reasons: list[str | None] = [None] * rows
        self.lengths = [0] * rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        """Return which rows have ended, shape (rows,)."""
        start = max(self._width, input_ids.shape[1] - self._tail)
        first = max(0, start - CONTEXT)
        rows = input_ids[:, first:].tolist()
        for row, reason in enumerate(self.reasons):
            if reason is None:
                self.lengths[row] += 1
                if self._has_ended(row, rows[row], start - first):
                    self.reasons[row] = "stop"
        return torch.tensor([r is not None for r in self.reasons], device=input_ids.device)

    def _has_ended(self, row: int, ids: list[int], start: int) -> bool:
        """Look at the last ids of a row, of which those from `start` on are generated."""
        if ids[-1] in self._ends:
            return True
        if self._thinking[row]:
            self._thinking[row] = ids[-1] != self._think_end
            return False
        if self._think_end in ids[start:]:
            start += ids[start:].index(self._think_end) + 1
        if not self._strings or start == len(ids):
            return False
        near = " " + self._decoder.plain(ids[start:])  # a decoder may drop the first space of a text
        if not any(s in near for s in self._strings):
            return False
        text = self._decoder.decode(ids[:start], ids[start:])
        return any(s in text for s in self._strings)


def end_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None, until: Sequence[str]
) -> frozenset[int]:
    """Return the ids that end a generation.

    They are the tokenizer's and the model's end tokens, and stop strings that are one special token.
    """
    ends = getattr(generation_config, "eos_token_id", None)
    ids = set(ends) if isinstance(ends, list | tuple | set) else {ends}
    special = {str(t.content): i for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if t.special}
    ids |= {tokenizer.eos_token_id, *(special[s] for s in until if s in special)}
    return frozenset(i for i in ids if i is not None)


def cut(text: str, strings: Sequence[str]) -> str:
    """Return the text before the first stop string in it."""
    return text[: min((at for s in strings if s and (at := text.find(s)) >= 0), default=len(text))]
