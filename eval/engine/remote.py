"""Requests to an OpenAI-compatible server: completions, chats, and the log-likelihoods that it echoes with a prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from console.errors import EvaluationError
from eval.engine.seeds import seed_of
from eval.harness.request_types import Answer, Answered, Request
from eval.harness.server import RefusedError, Server

AT_ONCE = 8
FEW_STOPS = 4
"""OpenAI's own servers take no more stop strings; what they leave is cut off here."""
_BLANK = re.compile(r"[\s\u2581\u0120]")


class RemoteEngine:
    """A served model. `at_once` requests are under way together; with `chat`, contexts are messages as JSON."""

    def __init__(self, server: Server, model: str, at_once: int, chat: bool) -> None:
        self.server, self.model, self.at_once, self.chat = server, model, at_once, chat
        self._most_stops: int | None = None

    def answer(self, requests: Sequence[Request], answered: Answered) -> None:
        """Ask, several at a time, the longest prompts first; the journal is written by this thread alone."""
        waiting = sorted(requests, key=lambda r: len(r.context))
        with ThreadPoolExecutor(self.at_once) as pool:
            running: dict[Future[Answer], Request] = {}
            try:
                while waiting or running:
                    while waiting and len(running) < 2 * self.at_once:
                        request = waiting.pop()
                        running[pool.submit(self._ask, request)] = request
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        request = running.pop(future)
                        answered(request, future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def used(self) -> Mapping[str, Any]:
        """Where the model was, and how many requests were under way together."""
        return {"base_url": self.server.base_url, "batch_size_used": {"requests at a time": self.at_once}}

    def _ask(self, request: Request) -> Answer:
        if request.kind == "generate":
            return self._generate(request)
        if self.chat:
            raise EvaluationError(
                f"{request.task} needs log-likelihoods, which servers do not give of chats: leave out "
                "--apply_chat_template, or the benchmark."
            )
        if request.kind == "score":
            return self._score(request)
        tokens, likelihoods, _ = self._echo(request.context, request.task)
        return float(sum(x for x in likelihoods[: len(tokens)] if x is not None))

    def _generate(self, request: Request) -> str:
        body: dict[str, Any] = {"model": self.model, "max_tokens": request.max_tokens, **request.options}
        body["temperature"] = request.temperature
        body["seed"] = seed_of(request) if request.temperature else request.seed
        path = "completions"
        if self.chat:
            messages = json.loads(request.context)
            path, body["messages"] = "chat/completions", messages
            if messages[-1]["role"] == "assistant":  # the beginning of the answer is given
                body |= {"continue_final_message": True, "add_generation_prompt": False}
        else:
            body["prompt"] = request.context
        choice = self._post_with_stops(path, body, list(request.until))["choices"][0]
        text = choice["message"]["content"] if self.chat else choice["text"]
        return _cut(text or "", request.until)

    def _post_with_stops(self, path: str, body: Mapping[str, Any], stops: list[str]) -> Any:
        most = self._most_stops
        try:
            return self.server.post(path, {**body, "stop": stops[:most]} if stops else body)
        except RefusedError as error:
            if "stop" not in error.said or most is not None or len(stops) <= FEW_STOPS:
                raise
            self._most_stops = FEW_STOPS
            return self.server.post(path, {**body, "stop": stops[:FEW_STOPS]})

    def _score(self, request: Request) -> tuple[float, bool]:
        tokens, likelihoods, best = self._echo(request.context + request.continuation, request.task)
        count = _spelling(tokens, request.continuation)
        if count is None:
            raise EvaluationError(
                f"The tokens that {self.server.base_url} gives do not spell the end of its prompt "
                f"({''.join(tokens[-4:])!r} for {request.continuation!r}); score log-likelihoods with --backend hf."
            )
        start = len(tokens) - count
        found = [float(x or 0.0) for x in likelihoods[start : len(tokens)]]
        tops = best[start : len(tokens)]
        greedy = len(tops) == len(found) and all(a >= b - 1e-9 for a, b in zip(found, tops, strict=True))
        return sum(found), greedy

    def _echo(self, prompt: str, task: str) -> tuple[list[str], list[float | None], list[float]]:
        """The prompt's tokens, their log-likelihoods, and those of the likeliest token in each place."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": 1, "temperature": 0.0, "logprobs": 1, "echo": True}
        answer = self.server.post("completions", body)
        found = answer["choices"][0].get("logprobs")
        if not found or not found.get("tokens") or len(found["tokens"]) < 2:
            raise EvaluationError(
                f"{task} needs the log-likelihoods of prompts (echo with logprobs), which the server at "
                f"{self.server.base_url} does not give: leave the benchmark out, or use --backend hf."
            )
        length = (answer.get("usage") or {}).get("prompt_tokens") or len(found["tokens"]) - 1
        tops = [max(top.values()) if top else float("-inf") for top in found.get("top_logprobs") or []]
        return found["tokens"][:length], found["token_logprobs"][:length], tops[:length]


def _spelling(tokens: Sequence[str], continuation: str) -> int | None:
    """How many of the last tokens spell a continuation; None where they do not.

    Servers write a token's leading blank as it is, as a sign, or not at all: blanks are compared only where a token is
    nothing but blanks.
    """
    wanted = _BLANK.sub("", continuation)
    count = 0
    while len(_BLANK.sub("", "".join(tokens[len(tokens) - count :]))) < len(wanted) and count < len(tokens):
        count += 1
    if not _BLANK.sub("", "".join(tokens[len(tokens) - count :])).endswith(wanted):
        return None
    blanks = len(continuation) - len(continuation.lstrip())
    while blanks and count < len(tokens) and tokens[-count - 1] and not _BLANK.sub("", tokens[-count - 1]):
        if len("".join(tokens[len(tokens) - count :])) >= len(continuation):
            break
        count += 1
    return count if 0 < count < len(tokens) else None


def _cut(text: str, stops: Sequence[str]) -> str:
    return text[: min((at for s in stops if s and (at := text.find(s)) >= 0), default=len(text))]


def messages_as_json(chat: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """A chat as the text that stands for it in requests; the server renders it."""
    return json.dumps(chat, ensure_ascii=False)
