"""Token ids of prompts and choices.

One rule for special tokens: a begin-of-sequence token stands in front of a prompt once or not at all, and a tokenizer
that appends an end token does not end prompts with it. A choice that has no token of its own is scored by its last one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from common.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]
"""lm-eval's scoring request: (context, choice) or None, and the token ids of both."""

WITHOUT_BEGIN = ("mmlu", "ifeval", "mbpp", "humaneval")
"""Benchmarks that the paper ran by lm-eval, and parts of them by prefix (mmlu_anatomy, mmlu_pro)."""


def adds_special_tokens(preset: str, benchmark: str, model_type: str) -> bool | None:
    """Return lm-eval's `add_bos_token` for the prompts of a benchmark: False for none, None for the tokenizer's rule.

    lm-eval added no begin token to prompts of causal models, Gemma excepted, until commit 5302f2a90 (2025-11-10): the
    paper's MMLU, IFEval, MBPP and HumanEval ran without it, its GSM8K and MATH with vLLM's default, which adds it.
    """
    ran_without = benchmark in WITHOUT_BEGIN or benchmark.startswith("mmlu_")
    return False if preset == "paper" and ran_without and "gemma" not in model_type else None


def appended_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that a tokenizer appends to a text by itself, such as an end token."""
    try:
        plain = list(tokenizer.encode("a", add_special_tokens=False))
        whole = list(tokenizer.encode("a"))
    except (TypeError, ValueError):  # tokenizers of other libraries have no such argument
        return ()
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[start + len(plain) :])
    return ()


class CorrectedEncoding:
    """Mixin of lm-eval's local models: `tok_encode` and `_encode_pair` by the rules of this module."""

    tokenizer: PreTrainedTokenizerBase
    backend: str
    add_bos_token: bool | None
    _appended: tuple[int, ...] | None = None

    def tok_encode(self, string: str | list[str], add_special_tokens: bool | None = None, **kwargs: object) -> Any:
        """Encode one text or a list of texts, without ids that the tokenizer appends."""
        if self._has_prefix():
            ids = super().tok_encode(string, add_special_tokens=add_special_tokens, **kwargs)  # type: ignore[misc]
        else:  # lm-eval looks at the start of each text for the begin token that this tokenizer lacks
            ids = self._encoded_without_prefix(string, add_special_tokens)
        if self._appended is None:
            self._appended = appended_ids(self.tokenizer) if self.backend == "causal" else ()
        if not self._appended:
            return ids
        if isinstance(string, str):
            return self._without_appended(string, ids)
        return [self._without_appended(text, one) for text, one in zip(string, ids, strict=True)]

    def _has_prefix(self) -> bool:
        prefixes = (getattr(self, "custom_prefix_token_id", None), self.tokenizer.bos_token_id,
                    self.tokenizer.eos_token_id)  # fmt: skip
        return any(i is not None for i in prefixes)

    def _encoded_without_prefix(
        self, string: str | list[str], add_special_tokens: bool | None
    ) -> list[int] | list[list[int]]:
        rule = self.add_bos_token if add_special_tokens is None else add_special_tokens
        options = {} if rule is None else {"add_special_tokens": rule}
        if isinstance(string, str):
            return list(self.tokenizer.encode(string, **options))
        return [list(self.tokenizer.encode(text, **options)) for text in string]

    def _without_appended(self, text: str, ids: list[int]) -> list[int]:
        count = len(self._appended or ())
        if tuple(ids[-count:]) != self._appended:
            return ids
        plain = self.tokenizer.encode(text, add_special_tokens=False)
        return ids[:-count] if len(ids) >= len(plain) + count else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode a context and a choice; the choice has at least one id.

        Raises:
            EvaluationError: The choice is empty.
        """
        if not continuation:
            raise empty_choice(context)
        before, after = super()._encode_pair(context, continuation)  # type: ignore[misc]
        if not after:
            whole: Sequence[int] = self.tok_encode(context + continuation)
            before, after = list(whole[:-1]), list(whole[-1:])
            if not before:
                before = [self.prefix_token_id]  # type: ignore[attr-defined]
        return before, after


def check_choice_lengths(requests: Iterable[TokenRequest], most: int) -> None:
    """Raise EvaluationError for a choice of more than `most` tokens; requests are (key, context ids, choice ids)."""
    longest = max((len(choice) for _, _, choice in requests), default=0)
    if longest > most:
        raise EvaluationError(
            f"A choice of {longest} tokens does not fit the {most} positions of --max_model_len; give more, or leave "
            "out its benchmark."
        )


def check_vocabulary(ids: Iterable[int], size: int, label: str) -> None:
    """Raise EvaluationError for an id that a model of `size` token embeddings lacks; size 0 is not known."""
    largest = max(ids, default=0)
    if size and largest >= size:
        raise EvaluationError(
            f"A prompt holds token {largest}, but {label} has {size} token embeddings; give the tokenizer that it was "
            "trained with (--model_args tokenizer=FOLDER)."
        )


def empty_choice(context: str) -> EvaluationError:
    """The error for a choice without text, whose log-likelihood would be 0, the best of all."""
    return EvaluationError(
        f"A choice after {context[-40:]!r} is empty and has no log-likelihood; correct the task's doc_to_choice."
    )
