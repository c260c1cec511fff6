"""Servers that answer with odd types, without end, slowly, or by leading elsewhere: one sentence, no key sent."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO

import pytest

from common.errors import BadInputError, EvaluationError
from eval.harness import server
from eval.harness.server import Server
from eval.request_types import Request
from eval.settings import Settings

ANSI = "\x1b[31m\u202e" + "x" * 5000
GOOD = {"index": 0, "text": "fine", "finish_reason": "stop"}


@dataclass
class Hostile:
    """A server that sends what it is state to.

    status, headers: of every answer; body: the content, or a function that writes it; requests: paths and headers of
    all requests so far.
    """

    url: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | Callable[[BinaryIO], None] = b""
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def sends(self, body: object, status: int = 200, **headers: str) -> None:
        """Set the answer: JSON, bytes as they are, or a function that writes; forget earlier requests."""
        is_raw = isinstance(body, bytes) or callable(body)
        self.body = body if is_raw else json.dumps(body).encode()  # type: ignore[assignment]
        self.status, self.headers = status, headers
        self.requests.clear()


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    """A hostile server on the loopback."""
    state = Hostile()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            """Print nothing."""

        def do_GET(self) -> None:
            state.requests.append((self.path, dict(self.headers)))
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(state.status)
            self.send_header("Content-Type", "application/json")
            for name, value in state.headers.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(OSError):  # the client has had enough
                state.body(self.wfile) if callable(state.body) else self.wfile.write(state.body)  # type: ignore[arg-type]

        def do_POST(self) -> None:
            self.do_GET()

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    state.url = f"http://127.0.0.1:{running.server_port}/v1"
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield state
    running.shutdown()
    running.server_close()


def without_end(stream: BinaryIO) -> None:
    """Write without end."""
    while True:
        stream.write(b" " * 65536)


def slowly(stream: BinaryIO) -> None:
    """Write a byte now and then."""
    for _ in range(200):
        stream.write(b" ")
        stream.flush()
        time.sleep(0.1)


def check_sentence(text: str) -> None:
    assert text.isprintable()
    assert len(text) < 800


# listings


@pytest.mark.parametrize("body", [b"", b"\xff", b"[" * 100_000, b"{" * 100, b'{"data": 1e999'])
def test_a_listing_that_is_no_json_is_refused(hostile: Hostile, body: bytes) -> None:
    """What is no JSON is one sentence that names the address."""
    hostile.sends(body)
    with pytest.raises(BadInputError, match=r"^There is no server at --base_url http") as refused:
        Server(hostile.url).check("m")
    check_sentence(str(refused.value))


@pytest.mark.parametrize("listing", [None, 3, [], {}, {"data": {}}, {"data": "m"}, {"data": None}])
def test_a_server_without_a_list_serves_any_name(hostile: Hostile, listing: object) -> None:
    """JSON without a list of models counts as a server that lists none."""
    hostile.sends(listing)
    assert Server(hostile.url).check("m") == {}


def test_entries_of_odd_types_do_not_count(hostile: Hostile) -> None:
    """Entries without a name, with one of another type or without end are left out; odd roots and times are no part of
    the identity; what is listed is named without control characters."""
    odd = [None, 3, [], {}, {"id": None}, {"id": 3}, {"id": ["m"]}, {"id": ""}, {"id": "m" * 1_000_000}]
    hostile.sends({"data": [*odd, {"id": "m", "root": {"a": [1]}, "created": "yesterday", "max_model_len": True}]})
    assert set(Server(hostile.url).models() or {}) == {"m"}
    assert Server(hostile.url).identity("m") == f"server:m@{hostile.url}"
    hostile.sends({"data": [{"id": ANSI[:200]}]})
    with pytest.raises(BadInputError, match="does not serve 'm' but ") as refused:
        Server(hostile.url).check("m")
    check_sentence(str(refused.value))


def test_a_listing_is_bounded(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing without end is left at its limit of bytes, one that comes slowly at its limit of time."""
    monkeypatch.setattr(server, "MAX_CONFIG", 1 << 20)
    hostile.sends(without_end)
    with pytest.raises(BadInputError, match="more than 1048576 bytes"):
        Server(hostile.url).check("m")
    monkeypatch.setattr(server, "TOTAL_SECONDS", 0.5)
    for status in (200, 500):
        hostile.sends(slowly, status)
        started = time.monotonic()
        with pytest.raises(BadInputError, match="no complete answer within"):
            Server(hostile.url).check("m")
        assert time.monotonic() - started < 10


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirection_gets_no_key(hostile: Hostile, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """A redirection is named and not followed: the key of one server is not another's."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    hostile.sends(b"", status, Location=f"{hostile.url}/elsewhere\t\x9b")
    with pytest.raises(BadInputError, match=r"leads elsewhere \(http.*elsewhere") as refused:
        Server(hostile.url).check("m")
    check_sentence(str(refused.value))
    assert [path for path, _ in hostile.requests] == ["/v1/models"]


def test_words_of_a_refusal_are_escaped(hostile: Hostile) -> None:
    """A server that wants a key may say so in any words."""
    hostile.sends(ANSI.encode(), 403)
    with pytest.raises(BadInputError, match="OPENAI_API_KEY"):
        Server(hostile.url).check("m")


# completions


def answer(
    hostile: Hostile, at_once: int, is_chat: bool = False, is_scored: bool = False, **arguments: object
) -> object:
    """Ask one question through lm-eval's model, which repeats what may pass once."""
    from eval.harness.backends.openai import make

    options = {"num_concurrent": at_once, "max_retries": 2, "timeout": 5, **arguments}
    body, status, headers = hostile.body, hostile.status, hostile.headers
    hostile.sends({})  # it lists no models
    backend = make("m", 512, Settings(base_url=hostile.url, model_args=options, apply_chat_template=is_chat))
    hostile.sends(body, status, **headers)
    context = '[{"role": "user", "content": "question"}]' if is_chat else "question"
    if is_scored:
        request = Request("k", "t", 0, 0, "score", context, " answer")
    else:
        request = Request("k", "t", 0, 0, "generate", context, max_tokens=8)
    answers: list[object] = []
    backend.answer([request], lambda request, text, facts: answers.append(text))
    return answers[0]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let lm-eval repeat requests at once."""
    from lm_eval.models import api_models
    from tenacity import wait_none

    monkeypatch.setattr(api_models, "wait_exponential", lambda **_: wait_none())


ODD = (
    b"", b"\xff", b"[" * 100_000, [], None, 3, {}, {"choices": None}, {"choices": []}, {"choices": {"0": GOOD}},
    {"choices": [3]}, {"choices": [{"text": "x"}]}, {"choices": [GOOD | {"index": "0"}]},
    {"choices": [GOOD | {"index": -1}]}, {"choices": [GOOD | {"index": 7}]}, {"choices": [GOOD, GOOD]},
    {"choices": [GOOD | {"index": True}]}, {"choices": [GOOD], "usage": [1]},
    {"choices": [GOOD], "usage": {"completion_tokens": "8"}},
    {"choices": [GOOD], ANSI: 1, "usage": {"completion_tokens": -1}},
)  # fmt: skip
ODD_TEXTS = ({"choices": [{"index": 0}]}, {"choices": [GOOD | {"text": 3}]}, {"choices": [GOOD | {"text": [ANSI]}]})
ODD_MESSAGES = ({"choices": [{"index": 0, "message": {"content": 3}}]}, {"choices": [{"index": 0, "message": "x"}]})


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("is_chat", [False, True])
def test_answers_of_odd_types_are_refused_at_once(hostile: Hostile, at_once: int, is_chat: bool) -> None:
    """What is no completion is one sentence after one request: another attempt would get it again."""
    for body in (*ODD, *(ODD_MESSAGES if is_chat else ODD_TEXTS)):
        hostile.sends(body)
        with pytest.raises(EvaluationError, match=r"gave an answer that cannot be used: ") as refused:
            answer(hostile, at_once, is_chat)
        check_sentence(str(refused.value))
        assert len(hostile.requests) == 1


@pytest.mark.parametrize("at_once", [1, 4])
def test_the_answer_that_odd_ones_change_is_accepted(hostile: Hostile, at_once: int) -> None:
    """The completion without a change is an answer; so is one with halves of surrogates, which a model may write."""
    hostile.sends({"choices": [GOOD], "usage": {"completion_tokens": 8}})
    assert answer(hostile, at_once) == "fine"
    hostile.sends({"choices": [GOOD | {"text": "\ud800"}], "usage": None})
    assert answer(hostile, at_once) == "\ud800"
    hostile.sends({"choices": [{"index": 0, "message": {"content": "fine"}}]})
    assert answer(hostile, at_once, is_chat=True) == "fine"


@pytest.mark.parametrize("at_once", [1, 4])
def test_an_answer_is_bounded(hostile: Hostile, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """An answer without end is left at its limit of bytes, one that comes slowly at its limit of time."""
    from eval.harness.backends import server_answers

    monkeypatch.setattr(server_answers, "MAX_ANSWER", 1 << 20)
    hostile.sends(without_end)
    with pytest.raises(EvaluationError, match="it has more than 1048576 bytes"):
        answer(hostile, at_once)
    assert len(hostile.requests) == 1
    hostile.sends(slowly)
    started = time.monotonic()
    with pytest.raises(EvaluationError, match="stopped answering"):
        answer(hostile, at_once, timeout=1)
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_redirected_request_goes_nowhere(hostile: Hostile, at_once: int) -> None:
    """A redirection of a request is named and not followed; refusals are quoted without control characters."""
    hostile.sends(b"", 307, Location=f"{hostile.url}/elsewhere")
    with pytest.raises(EvaluationError, match=r"it leads to http.*/elsewhere; give that address"):
        answer(hostile, at_once)
    assert len(hostile.requests) == 1
    hostile.sends(ANSI.encode(), 400)
    with pytest.raises(EvaluationError, match="refused a request: 400") as refused:
        answer(hostile, at_once)
    check_sentence(str(refused.value))


@pytest.mark.parametrize("at_once", [1, 4])
def test_log_likelihoods_of_odd_types_are_refused(hostile: Hostile, checkpoint: Path, at_once: int) -> None:
    """Log-likelihoods that are no numbers, or not one for each token, would be summed to a wrong score: refused."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    count = len(tokenizer.encode("question")) + len(tokenizer.encode(" answer", add_special_tokens=False)) + 1
    values, best = [None, *[-1.0] * (count - 1)], [None, *[{"a": -1.0}] * (count - 1)]
    good = {"token_logprobs": values, "top_logprobs": best}

    def score_of(logprobs: object) -> object:
        hostile.sends({"choices": [{"index": 0, "text": "", "logprobs": logprobs}]})
        return answer(hostile, at_once, is_scored=True, tokenizer=str(checkpoint))

    total = score_of(good)
    assert isinstance(total, tuple)
    assert total[1] is True
    for odd in (
        {"token_logprobs": values[:-1]}, {"top_logprobs": best[:-1]}, {"token_logprobs": [None] * count},
        {"token_logprobs": ["x"] * count}, {"token_logprobs": [float("nan")] * count}, {"top_logprobs": [{}] * count},
        {"top_logprobs": [{"a": "x"}] * count}, {"top_logprobs": [3] * count}, {"token_logprobs": {"a": 1}},
        {"top_logprobs": "x" * count},
    ):  # fmt: skip
        with pytest.raises(EvaluationError, match=r"cannot be used|splits a prompt") as refused:
            score_of(good | odd)
        check_sentence(str(refused.value))
