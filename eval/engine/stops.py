"""Where a generation ends: the model's end tokens and the request's stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from eval.engine.tokens import Tokens


class Stops:
    """Finds the end of generations with one set of stop strings.

    A stop string that is one special token is found among the ids, since special tokens are not part of the text. The
    text is cut before the first stop string in it; tokens generated after that do not matter.
    """

    def __init__(self, tokens: Tokens, until: Sequence[str]) -> None:
        self._tokens = tokens
        end = tokens.tokenizer.eos_token
        until = (*until, end) if end else until  # spelt out in ordinary tokens it ends the text as well
        special = {text: i for i, text in _special(tokens.tokenizer).items()}
        self._ids = tokens.ends | {special[s] for s in until if s in special}
        self._strings = tuple(s for s in until if s)
        self._tail = max((len(s.encode()) for s in self._strings), default=0) + 1

    def reached(self, ids: list[int]) -> bool:
        """Whether the generation `ids` has ended with its last token."""
        if ids[-1] in self._ids:
            return True
        if not self._strings:
            return False
        tail = self._tokens.decode(ids[-self._tail :])
        if not any(s in tail for s in self._strings):
            return False
        return any(s in self._tokens.decode(ids) for s in self._strings)

    def text(self, ids: list[int]) -> str:
        """The text of a generation, up to where it ends."""
        end = next((at for at, i in enumerate(ids) if i in self._ids), len(ids))
        text = self._tokens.decode(ids[:end])
        return text[: min((at for s in self._strings if (at := text.find(s)) >= 0), default=len(text))]


def _special(tokenizer: object) -> dict[int, str]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {i: str(token.content) for i, token in added.items() if token.special}
