"""Requests to a model and their answers: the types between tasks, journal and backends. No third-party import."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from common.files.json_values import JsonObject

Answer = str | tuple[float, bool] | float
"""A generation; a continuation's log-likelihood and whether greedy decoding would give it; a text's log-likelihood."""


@dataclass(frozen=True)
class Facts:
    """Length, finish and prompt truncation of an answer; None where the backend does not report them.

    `tokens` is the number of generated tokens, `finish` is "stop" (end token or stop string) or "length" (the limit),
    and `prompt_truncated` is True where the prompt lost its beginning to fit the model.
    """

    tokens: int | None = None
    finish: str | None = None
    prompt_truncated: bool | None = None

    def to_json(self) -> dict[str, int | str]:
        """Return what is known."""
        return {k: v for k, v in asdict(self).items() if v is not None}


Answered = Callable[["Request", Answer, Facts], None]


@dataclass(frozen=True)
class Request:
    """One question to a model.

    `kind`: "generate" (text after `context`), "score" (the log-likelihood of `continuation` after `context`), or
    "rolling" (the log-likelihood of `context` itself). `number` is the choice or the sample of the item. A generation
    ends at one of `until`, after `max_tokens`, or with the model's end token; `temperature` 0 is greedy, else `seed`
    fixes the draws of this one request. `options` are further generation settings by transformers' names.
    `special_tokens` says whether the tokenizer adds its begin token: None leaves that to the tokenizer.
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
    options: JsonObject = field(default_factory=dict)
    special_tokens: bool | None = None

    @property
    def work(self) -> int:
        """Relative cost within its benchmark.

        The characters to read, or 1 for a generation, whose length is not known beforehand.
        """
        return 1 if self.kind == "generate" else len(self.context) + len(self.continuation)


class Backend(Protocol):
    """A model that answers requests, in whatever order suits it."""

    remarks: list[str]

    def answer(self, requests: Sequence[Request], answered: Answered) -> None:
        """Answer every request, calling `answered` for each when its batch has ended."""

    def used(self) -> JsonObject:
        """Return what the results file records of this model: dtype, batch sizes, ..."""


def digest(*parts: object) -> str:
    """SHA-256 over parts that JSON can hold (anything else by its string), 64 hex digits."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def key_of(
    scope: str, task: str, version: object, doc: str, kind: str, text: Sequence[str], settings: JsonObject | None
) -> str:
    """The name of a request in the journal: equal names, equal questions to the same model.

    `scope` stands for the model and how it is run, `doc` is the item's digest, `text` the prompt (and continuation),
    `settings` those of the generation. Batch sizes and devices are not part of it: they change rounding at most.
    """
    return digest(scope, task, version, doc, kind, text, settings)[:32]
