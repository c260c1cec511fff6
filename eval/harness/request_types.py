"""What a model is asked, and what it answers: the words between tasks, journal and engines. No third-party import."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Answer = str | tuple[float, bool] | float
"""A generation; a continuation's log-likelihood and whether greedy decoding would give it; a text's log-likelihood."""

Answered = Callable[["Request", Answer], None]


@dataclass(frozen=True)
class Request:
    """One question to a model.

    `kind`: "generate" (text after `context`), "score" (the log-likelihood of `continuation` after `context`), or
    "rolling" (the log-likelihood of `context` itself). `number` is the choice or the sample of the item. A generation
    ends at one of `until`, after `max_tokens`, or with the model's end token; `temperature` 0 is greedy, else `seed`
    fixes the draws of this one request. `options` are further generation settings by transformers' names.
    """

    key: str
    task: str
    item: int
    number: int
    kind: Literal["generate", "score", "rolling"]
    context: str
    continuation: str = ""
    until: tuple[str, ...] = ()
    max_tokens: int = 0
    temperature: float = 0.0
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def work(self) -> int:
        """What it is beside others of its benchmark: the characters to read, or 1 for a text whose length is not known
        beforehand."""
        return 1 if self.kind == "generate" else len(self.context) + len(self.continuation)


class Engine(Protocol):
    """A model that answers requests, in whatever order suits it."""

    def answer(self, requests: Sequence[Request], answered: Answered) -> None:
        """Answer every request, calling `answered` for each as soon as its answer is known."""

    def used(self) -> Mapping[str, Any]:
        """What the results file records of this engine: dtype, batch sizes, ..."""


def digest(*parts: Any) -> str:
    """SHA-256 over parts that JSON can hold (anything else by its string), 64 hex digits."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def key_of(scope: str, task: str, version: Any, doc: str, kind: str, text: Sequence[str], settings: Any) -> str:
    """The name of a request in the journal: equal names, equal questions to the same model.

    `scope` stands for the model and how it is run, `doc` is the item's digest, `text` the prompt (and continuation),
    `settings` those of the generation. Batch sizes and devices are not part of it: they change rounding at most.
    """
    return digest(scope, task, version, doc, kind, text, settings)[:32]
