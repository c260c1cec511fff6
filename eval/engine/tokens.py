"""Text to token ids in lm-eval's conventions, so that the same prompt is the same input."""

from __future__ import annotations

from typing import Any

from eval.harness.request_types import Request


class Tokens:
    """A tokenizer with its special ids. `ends`: the ids at which a generation ends."""

    def __init__(self, tokenizer: Any, generation_config: Any = None) -> None:
        self.tokenizer = tokenizer
        self.bos = tokenizer.bos_token
        ends = getattr(generation_config, "eos_token_id", None)
        found = set(ends) if isinstance(ends, list | tuple | set) else {ends}
        self.ends = frozenset(i for i in (*found, tokenizer.eos_token_id) if i is not None)
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.prefix: int | None = prefix
        self._prefix_text = tokenizer.decode([prefix]) if prefix is not None else None
        pads = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id, 0)
        self.pad: int = next(p for p in pads if p is not None)

    def encode(self, text: str) -> list[int]:
        """Ids with whatever the tokenizer puts around a text, unless the text brings the begin token itself."""
        if self._prefix_text and text.startswith(self._prefix_text):
            return list(self.tokenizer.encode(text, add_special_tokens=False))
        return list(self.tokenizer.encode(text))

    def prompt(self, text: str, room: int) -> list[int]:
        """Ids of a prompt; the first ones are dropped where it is longer than `room`."""
        if self.bos and text.startswith(self.bos):
            return list(self.tokenizer.encode(text, add_special_tokens=False))[-room:]
        return list(self.tokenizer.encode(text))[-room:]

    def pair(self, request: Request) -> tuple[list[int], list[int]]:
        """Ids of context and continuation. Spaces that end the context belong to the continuation, and both are cut
        out of the ids of the whole, since tokens need not end where the context does."""
        context, continuation = request.context, request.continuation
        if not context:
            ids = list(self.tokenizer.encode(continuation, add_special_tokens=False))
            if self.prefix is None or ids[0] == self.prefix:
                return ids[:1], ids[1:]
            return [self.prefix], ids
        bare = context.rstrip()
        if bare != context:
            context, continuation = bare, context[len(bare) :] + continuation
        before = self.encode(context)
        return before, self.encode(context + continuation)[len(before) :]

    def decode(self, ids: list[int], special: bool = False) -> str:
        """Text of ids, without special tokens unless asked for."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=not special))


def windows(ids: list[int], prefix: int | None, length: int) -> list[tuple[list[int], list[int]]]:
    """Cut a text into (context, continuation) pairs of at most `length` inputs that together score every id once.

    The first window begins with `prefix`; each later one has as much context as fits.
    """
    if not ids:
        return []
    first = ([prefix], ids[:length]) if prefix is not None else (ids[:1], ids[1:length])
    pairs, done = [first], min(length, len(ids))
    while done < len(ids):
        end = min(done + length, len(ids))
        start = max(0, end - length - 1)
        pairs.append((ids[start:done], ids[done:end]))
        done = end
    return pairs
