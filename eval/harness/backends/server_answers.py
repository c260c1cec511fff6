"""Answers of a server, read within limits of size, time and types before lm-eval uses them."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from common.errors import EvaluationError
from common.files.bounded_reading import UnreadableError, parse_json
from common.files.json_types import Between, Fields, ListOf, Maybe, check_shape
from common.terminal_text import foreign

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

    from common.files.json_values import JsonObject

MAX_ANSWER = 64 << 20
"""Bytes of an answer; log-likelihoods of a prompt of 100,000 tokens have about ten million."""
MAX_REPLY = 2000
"""Bytes that are read of a refusal."""
CHUNK = 1 << 16
PASSING = (408, 425, 429)
"""Statuses below 500 that another attempt may not get."""
USAGE = {"usage": Maybe(Fields({}, {"completion_tokens": Maybe(Between(0))}))}
GENERATED = Fields({"choices": ListOf(Fields({"index": Between(0), "text": Maybe(str)}))}, USAGE)
SCORED = Fields({"choices": ListOf(Fields({"index": Between(0)}, {"logprobs": Maybe(dict)}))}, USAGE)
MESSAGE = Maybe(Fields({}, {"content": Maybe(str)}))
CHAT = Fields({"choices": ListOf(Fields({"index": Between(0)}, {"message": MESSAGE}))}, USAGE)
LOGPROBS = Fields({"token_logprobs": list, "top_logprobs": ListOf(Maybe(dict))})


class RefusedRequest(BaseException):
    """A status that another attempt would get again. Not an Exception: lm-eval repeats a request after each of those.

    Never leaves the backend: `refusals` turns it into an error of the server.
    """

    def __init__(self, status: int, answer: str) -> None:
        super().__init__(f"{status}: {foreign(answer, 300)}")
        self.status = status


class UnusableAnswer(BaseException):
    """An answer that is no completion. Not an Exception, for the same reason as `RefusedRequest`."""


class ServerRefusal(Exception):
    """A request that the server refused for good, with its status and words."""

    def __init__(self, refusal: RefusedRequest) -> None:
        super().__init__(str(refusal))
        self.status = refusal.status


def joined(chunks: Iterable[bytes]) -> bytes:
    """Return an answer that comes in chunks. Raises UnusableAnswer for one of more than MAX_ANSWER bytes."""
    content = bytearray()
    for chunk in chunks:
        content += chunk
        if len(content) > MAX_ANSWER:
            raise UnusableAnswer(f"it has more than {MAX_ANSWER} bytes")
    return bytes(content)


def check_status(status: int, content: bytes, location: str | None) -> None:
    """Raise RefusedRequest for a status that another attempt would get again; redirections are not followed."""
    if 300 <= status < 400:
        raise RefusedRequest(status, f"it leads to {location}; give that address as --base_url")
    if 400 <= status < 500 and status not in PASSING:
        raise RefusedRequest(status, content[:MAX_REPLY].decode("utf-8", "replace"))


def parsed(content: bytes, shape: Fields) -> JsonObject:
    """Return a completion. Raises UnusableAnswer for what is not one of the shape, with choices of distinct indexes."""
    try:
        answer = parse_json(content, "it", allow_surrogates=True)
        check_shape(answer, shape, "it")
    except UnreadableError as error:
        raise UnusableAnswer(str(error).rstrip(".")) from error
    indexes = sorted(choice["index"] for choice in answer["choices"])
    if not indexes or indexes != list(range(len(indexes))):
        raise UnusableAnswer(f"its choices have the indexes {foreign(str(indexes))}")
    return dict(answer)


def check_logprobs(choice: JsonObject, count: int, start: int) -> None:
    """Check the log-likelihoods of an echoed prompt and one generated token.

    Args:
        choice: Of an answer.
        count: Tokens of the prompt.
        start: Number of the first token that counts.

    Raises:
        UnusableAnswer: There are not as many as tokens, or one that counts is no number.
    """
    try:
        check_shape(choice.get("logprobs"), LOGPROBS, "its logprobs")
    except UnreadableError as error:
        raise UnusableAnswer(str(error).rstrip(".")) from error
    values, best = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
    if not len(values) == len(best) == count + 1:
        raise UnusableAnswer(
            f"it has {len(values)} log-likelihoods for a prompt of {count} tokens and one more; give the tokenizer of "
            "the served model with --model_args tokenizer=FOLDER"
        )
    for value, top in zip(values[start:-1], best[start:-1], strict=True):
        if not top or not all(_is_likelihood(number) for number in (value, *top.values())):
            raise UnusableAnswer("a log-likelihood in it is no number")


def _is_likelihood(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


class Answer:
    """An answer of aiohttp that was read within the limits; has what lm-eval uses of it."""

    def __init__(self, response: ClientResponse, content: bytes, shape: Fields) -> None:
        self._response, self._content, self._shape = response, content, shape
        self.ok, self.status = response.ok, response.status

    def raise_for_status(self) -> None:
        """Raise aiohttp's error for a status from 400 on."""
        self._response.raise_for_status()

    async def text(self) -> str:
        """Return the beginning of the answer."""
        return self._content[:MAX_REPLY].decode("utf-8", "replace")

    async def json(self) -> JsonObject:
        """Return the completion. Raises UnusableAnswer."""
        return parsed(self._content, self._shape)


class BoundedSession:
    """An aiohttp session whose `post` reads answers of one shape within the limits."""

    def __init__(self, session: ClientSession, shape: Fields) -> None:
        self._session, self._shape = session, shape

    @asynccontextmanager
    async def post(self, *arguments: Any, **options: Any) -> AsyncIterator[Answer]:
        """Send a request; the answer's status is below 300, or another attempt may succeed."""
        async with self._session.post(*arguments, **options, allow_redirects=False) as response:
            content = bytearray()
            async for chunk in response.content.iter_chunked(CHUNK):
                content += chunk
                if len(content) > MAX_ANSWER:
                    raise UnusableAnswer(f"it has more than {MAX_ANSWER} bytes")
            check_status(response.status, bytes(content), response.headers.get("Location"))
            yield Answer(response, bytes(content), self._shape)


@contextmanager
def refusals(url: str) -> Iterator[None]:
    """Raise an error of the server for a request that lm-eval must not repeat.

    Raises:
        ServerRefusal: The server refused it.
        EvaluationError: The answer is no completion.
    """
    try:
        yield
    except RefusedRequest as refusal:
        raise ServerRefusal(refusal) from refusal
    except UnusableAnswer as answer:
        raise EvaluationError(f"{url} gave an answer that cannot be used: {answer}.") from answer
