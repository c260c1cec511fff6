"""Decoding in the context of the prompt.

lm-eval's `hf` model decodes the generated ids alone. A tokenizer of SentencePiece kind then drops the first space,
since its decoder takes the first token for the beginning of a text: a function body loses its indentation. A server
and vLLM decode the ids after their prompt, as this module does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT = 16
"""Ids of the prompt that are decoded with the continuation; decoders look at neighbors only."""


class ContextDecoder:
    """Decodes continuations with one tokenizer, without special tokens and without cleaning up spaces."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._anchor: list[int] | None = None

    def decode(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text that `ids` add to `prompt`.

        Args:
            prompt: Token ids of the prompt; may be empty, or only its end.
            ids: Token ids of the continuation.

        Returns:
            `decode(prompt + ids)` without its beginning `decode(prompt)`.
        """
        if not ids:
            return ""
        context = list(prompt[-CONTEXT:])
        text = self._added(context, ids)
        if text is None:  # a byte sequence that only became invalid with the continuation changes the prompt's text
            text = self._added(self._neutral(), ids)
        return self.plain(ids) if text is None else text

    def plain(self, ids: Sequence[int]) -> str:
        """Decode ids alone."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _added(self, context: list[int], ids: Sequence[int]) -> str | None:
        before, whole = self.plain(context), self.plain([*context, *ids])
        return whole[len(before) :] if whole.startswith(before) else None

    def _neutral(self) -> list[int]:
        """Ids of a letter, which no continuation changes."""
        if self._anchor is None:
            self._anchor = list(self.tokenizer.encode("a", add_special_tokens=False))[-1:]
        return self._anchor
