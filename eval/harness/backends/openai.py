"""lm-eval's `local-completions` and `local-chat-completions` with the corrections that they need.

A server needs no tokenizer for generations; log-likelihoods need it, to know where a choice begins.
"""

from __future__ import annotations

import copy
import json
import os
from typing import TYPE_CHECKING, Any

from lm_eval.models.api_models import JsonChatStr
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from common.errors import BadInputError, EvaluationError, first_line
from common.files.bounded_reading import LimitError
from common.files.json_types import Fields
from common.processes.execution_limits import time_limit
from eval.harness.backends.answering import Arguments, LMBackend, arguments_of, settings_of
from eval.harness.backends.server_answers import (
    CHAT,
    CHUNK,
    GENERATED,
    SCORED,
    BoundedSession,
    ServerRefusal,
    check_logprobs,
    check_status,
    joined,
    parsed,
    refusals,
)
from eval.harness.corrections.encoding import CorrectedEncoding, TokenRequest, check_choice_lengths
from eval.harness.corrections.sampling import settings_without_seed
from eval.harness.server import MAX_PATH, Server
from eval.request_types import Facts, Request
from eval.settings import Settings

if TYPE_CHECKING:
    from aiohttp import ClientSession
    from lm_eval.api.instance import Instance

    from common.files.json_values import JsonObject
    from eval.harness.corrections.chat_template import Chat

Prompts = list[str] | list[list[int]] | list[JsonChatStr]

AT_ONCE = 8
RETRIES = 6
FEW_STOPS = 4
"""OpenAI's own servers take no more stop strings; the text is cut at the others here."""


class _Served:
    """Base class of served models, completions and chat."""

    base_url: str
    max_length: int
    tokenized_requests: bool
    timeout: float
    verify_certificate: bool
    header: dict[str, str]
    eos_string: str | None
    _seed: int
    create_message: Any
    _create_payload: Any
    _fewer_stops = False
    _most_stops = 0
    _last = Facts()
    _number = 0

    def arguments(self, request: Request) -> Arguments:
        """Return lm-eval's arguments of a request; equal prompts of one group share settings, and so one batch."""
        self._number = request.number
        arguments = arguments_of(request)
        if request.kind != "generate":
            return arguments
        settings = settings_of(arguments)
        self._seeds[request.context] = settings.get("seed")
        return self._prompt(request.context), settings_without_seed(settings)

    def group_of(self, request: Request) -> int:
        """Samples of one prompt differ in their seed only: each is asked in a group of its own."""
        return request.number if request.kind == "generate" and request.temperature else 0

    def _prompt(self, context: str) -> str | JsonChatStr:
        return context

    @property
    def _seeds(self) -> dict[str, int | None]:
        result: dict[str, int | None] = self.__dict__.setdefault("_seed_of", {})
        return result

    def release(self) -> None:
        """Nothing to give back."""

    def adapt(self, error: Exception) -> bool:
        """Send fewer stop strings to a server that refused a request with more.

        Raises:
            EvaluationError: The server failed again and again.
        """
        if isinstance(error, ServerRefusal):
            if error.status in (400, 422) and self._most_stops > FEW_STOPS and not self._fewer_stops:
                self._fewer_stops = True
                return True
            raise EvaluationError(f"{self.base_url} refused a request: {error}") from error
        if isinstance(error, EvaluationError):
            return False
        raise EvaluationError(
            f"The server at {self.base_url} stopped answering ({first_line(error)}); its answers are kept: run again "
            "to continue."
        ) from error

    def model_call(
        self, messages: Prompts, *, generate: bool = True, gen_kwargs: JsonObject | None = None, **options: object
    ) -> JsonObject:
        """Ask as lm-eval does for one request at a time, within limits, without a second attempt after a refusal."""
        payload = self._create_payload(
            self.create_message(messages),
            generate=generate,
            gen_kwargs=copy.deepcopy(gen_kwargs),
            seed=self._seed,
            eos=self.eos_string,
            **options,
        )
        return parsed(self._posted(payload), self._shape(generate))

    def _posted(self, payload: JsonObject) -> bytes:
        """Return the answer to a request.

        Raises:
            requests.RequestException, LimitError: Another attempt may succeed.
            RefusedRequest, UnusableAnswer: None would.
        """
        import requests

        with (
            time_limit(self.timeout, f"no complete answer within {self.timeout} s"),
            requests.post(
                self.base_url,
                json=payload,
                headers=self.header,
                verify=self.verify_certificate,
                timeout=self.timeout,
                stream=True,
                allow_redirects=False,
            ) as response,
        ):
            content = joined(response.iter_content(CHUNK))
            check_status(response.status_code, content, response.headers.get("Location"))
            response.raise_for_status()
            return content

    async def amodel_call(
        self, session: ClientSession, *arguments: object, generate: bool = True, **options: object
    ) -> list[str] | list[tuple[float, bool]] | None:
        """Ask as lm-eval does for several requests at a time, within limits, without a second attempt."""
        answers: list[str] | list[tuple[float, bool]] | None
        bounded = BoundedSession(session, self._shape(generate))
        answers = await super().amodel_call(bounded, *arguments, generate=generate, **options)  # type: ignore[misc]
        return answers

    def _shape(self, generate: bool) -> Fields:
        return GENERATED if generate else SCORED

    def _payload(self, payload: JsonObject, prompt: str) -> JsonObject:
        """Return a payload with the stop strings and the seed that this prompt gets."""
        stops = [s for s in payload.get("stop") or () if s]
        self._most_stops = max(self._most_stops, len(stops))
        payload["stop"] = stops[:FEW_STOPS] if self._fewer_stops else stops
        if not payload["stop"]:
            del payload["stop"]
        if self._seeds.get(prompt) is not None:
            payload["seed"] = self._seeds[prompt]
        return payload

    def _note(self, outputs: JsonObject | list[JsonObject]) -> None:
        """Keep the facts of an answer until lm-eval hands it to the cache hook."""
        one = outputs[0] if isinstance(outputs, list) else outputs
        choice, usage = one["choices"][0], one.get("usage") or {}
        reason = choice.get("finish_reason")
        self._last = Facts(usage.get("completion_tokens"), reason if reason in ("stop", "length") else None)


class CompletionsModel(CorrectedEncoding, _Served, LocalCompletionsAPI):  # type: ignore[misc]
    """Prompts as text, or as token ids where the tokenizer is known."""

    backend = "causal"

    def __init__(self, **arguments: object) -> None:
        super().__init__(**arguments)
        self._lengths: dict[str, int] = {}
        self._truncated: set[tuple[str, ...]] = set()
        self._is_probed = False

    def tok_encode(self, string: str | list[str], add_special_tokens: bool | None = None, **kwargs: object) -> Any:
        """Encode by the rule of the request; lm-eval's own takes no rule as none.

        A tokenizer's begin token is added unless the text brings it.
        """
        if self.tokenizer is None:
            return [string] if isinstance(string, str) else list(string)
        if not isinstance(string, str):
            ids = [self.tok_encode(text, add_special_tokens) for text in string]
            self._lengths |= {text: len(one) for text, one in zip(string, ids, strict=True)}
            return ids
        rule = self.add_bos_token if add_special_tokens is None else add_special_tokens
        begin = getattr(self.tokenizer, "bos_token", None)
        if begin and string.startswith(begin):
            rule = False
        plain = list(self.tokenizer.encode(string, add_special_tokens=False))
        if rule is False:
            return plain
        return self._without_appended(string, list(self.tokenizer.encode(string)))

    def _without_appended(self, text: str, ids: list[int]) -> list[int]:
        if self._appended is None:
            from eval.harness.corrections.encoding import appended_ids

            self._appended = appended_ids(self.tokenizer)
        return super()._without_appended(text, ids) if self._appended else ids

    def _create_payload(
        self, messages: Prompts, generate: bool = False, gen_kwargs: JsonObject | None = None, **kwargs: object
    ) -> JsonObject:
        payload: JsonObject = super()._create_payload(messages, generate=generate, gen_kwargs=gen_kwargs, **kwargs)
        if not generate:
            return payload
        prompt = messages[0] if isinstance(messages, list) else messages
        text = prompt if isinstance(prompt, str) else self._texts.get(tuple(prompt), "")
        return self._payload(payload, text)

    @property
    def _texts(self) -> dict[tuple[int, ...], str]:
        result: dict[tuple[int, ...], str] = self.__dict__.setdefault("_text_of", {})
        return result

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate as lm-eval does."""
        if self.tokenized_requests:
            most = max(r.args[1]["max_gen_toks"] for r in requests)
            for r in requests:
                ids = self.tok_encode(r.args[0])
                self._texts[tuple(ids[-(self.max_length - most) :])] = r.args[0]
        with refusals(self.base_url):
            return list(super().generate_until(requests, disable_tqdm=disable_tqdm))

    def parse_generations(self, outputs: JsonObject | list[JsonObject], **kwargs: object) -> list[str]:  # type: ignore[override]
        """Return the texts of an answer and note its facts; no text, as of an answer that is all reasoning, is ""."""
        self._note(outputs)
        return [text or "" for text in LocalCompletionsAPI.parse_generations(outputs, **kwargs)]

    def facts(self, method: str, arguments: Arguments) -> Facts:
        """Return what is known of an answer besides its text or number."""
        if method != "generate_until":
            return Facts(prompt_truncated=tuple(arguments) in self._truncated)
        length = self._lengths.get(str(arguments[0]))
        most = settings_of(arguments).get("max_gen_toks") or 0
        is_truncated = None if length is None else length + most > self.max_length
        return Facts(self._last.tokens, self._last.finish, is_truncated)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score choices. Raises EvaluationError where the tokenizer is not known."""
        if self.tokenizer is None:
            raise EvaluationError(
                f"Log-likelihoods from {self.base_url} need the model's tokenizer: give --model_args tokenizer=FOLDER, "
                "or leave out benchmarks of multiple choice."
            )
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def _loglikelihood_tokens(self, requests: list[TokenRequest], **kwargs: object) -> list[tuple[float, bool]]:
        check_choice_lengths(requests, self.max_length - 1)  # lm-eval's model needs an id before a choice
        self._truncated |= {
            tuple(key) for key, a, b in requests if key is not None and len(a) + len(b) > self.max_length
        }
        if not self._is_probed and requests:
            with refusals(self.base_url):
                self._probe([*requests[0][1], *requests[0][2]][-self.max_length :])
        with refusals(self.base_url):
            return list(super()._loglikelihood_tokens(requests, **kwargs))

    def parse_logprobs(  # type: ignore[override]
        self,
        outputs: JsonObject | list[JsonObject],
        tokens: list[list[int]] | None = None,
        ctxlens: list[int] | None = None,
        **kwargs: object,
    ) -> list[tuple[float, bool]]:
        """Return the sums of log-likelihoods, each of as many tokens as its choice has."""
        for output in outputs if isinstance(outputs, list) else [outputs]:
            choices = sorted(output["choices"], key=lambda choice: choice["index"])
            for choice, ids, start in zip(choices, tokens or [], ctxlens or [], strict=True):
                check_logprobs(choice, len(ids), start)
        return list(LocalCompletionsAPI.parse_logprobs(outputs, tokens=tokens, ctxlens=ctxlens, **kwargs))

    def _probe(self, ids: list[int]) -> None:
        """Raise EvaluationError where the server gives no log-likelihoods of prompts."""
        import requests

        body = super()._create_payload(self.create_message([ids]), generate=False)
        try:
            logprobs = parsed(self._posted(body), SCORED)["choices"][0].get("logprobs")
        except (requests.RequestException, LimitError):
            return  # lm-eval asks again
        if not logprobs or not logprobs.get("token_logprobs") or not logprobs.get("top_logprobs"):
            raise EvaluationError(
                f"The server at {self.base_url} gives no log-likelihoods of prompts (echo with logprobs): leave out "
                "benchmarks of multiple choice, or use --backend hf."
            )
        count = len(logprobs["token_logprobs"]) if isinstance(logprobs["token_logprobs"], list) else 0
        if count != len(ids) + 1:
            raise EvaluationError(
                f"The server at {self.base_url} splits a prompt into {count - 1} tokens, the tokenizer into "
                f"{len(ids)}: give that of the served model with --model_args tokenizer=FOLDER."
            )
        self._is_probed = True


class ChatModel(_Served, LocalChatCompletion):  # type: ignore[misc]
    """Chats that the server renders; it gives no log-likelihoods of them."""

    def _shape(self, generate: bool) -> Fields:
        return CHAT

    def _prompt(self, context: str) -> JsonChatStr:
        return JsonChatStr(context)

    def _create_payload(
        self, messages: Chat, generate: bool = False, gen_kwargs: JsonObject | None = None, **kwargs: object
    ) -> JsonObject:
        payload: JsonObject = super()._create_payload(
            messages, generate=generate, gen_kwargs=dict(gen_kwargs or {}), **kwargs
        )
        payload["stop"] = list((gen_kwargs or {}).get("until") or ())
        if messages[-1]["role"] == "assistant":  # the task gives the beginning of the answer
            payload |= {"continue_final_message": True, "add_generation_prompt": False}
        return self._payload(payload, messages_as_json(messages))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate as lm-eval does."""
        with refusals(self.base_url):
            return list(super().generate_until(requests, disable_tqdm=disable_tqdm))

    def parse_generations(self, outputs: JsonObject | list[JsonObject], **kwargs: object) -> list[str]:  # type: ignore[override]
        """Return the texts of an answer and note its facts; no text, as of an answer that is all reasoning, is ""."""
        self._note(outputs)
        return [text or "" for text in super().parse_generations(outputs, **kwargs)]

    def facts(self, method: str, arguments: Arguments) -> Facts:
        """Return what is known of an answer besides its text."""
        return self._last

    def loglikelihood(self, requests: list[Instance], **kwargs: object) -> list[tuple[float, bool]]:
        """Raise EvaluationError: no server gives log-likelihoods of chats."""
        raise EvaluationError(
            "Servers do not give log-likelihoods of chats: leave out --apply_chat_template, or benchmarks of multiple "
            "choice."
        )


def make(name: str, length: int, settings: Settings) -> LMBackend:
    """Return lm-eval's model of a served model.

    Args:
        name: The name that the server lists it by.
        length: Most tokens of prompt and answer.
        settings: base_url, batch_size (requests at a time) and model_args of the run.
    """
    arguments = dict(settings.model_args)
    at_once = int(arguments.pop("num_concurrent", None) or settings.rows or AT_ONCE)
    arguments = {"max_retries": RETRIES, "timeout": 600, **arguments}
    arguments.pop("add_bos_token", None)
    address = str(settings.base_url).rstrip("/")
    common = {
        "model": name,
        "batch_size": 1,
        "max_length": length,
        "seed": settings.seed,
        "num_concurrent": at_once,
    }
    lm: Any
    remarks: list[str] = []
    if settings.apply_chat_template:
        for name in ("tokenizer", "tokenizer_backend", "tokenized_requests"):  # the server renders and encodes chats
            arguments.pop(name, None)
        lm = ChatModel(base_url=f"{address}/chat/completions", **common, **arguments)
    else:
        tokenizer = arguments.pop("tokenizer", None) or _served_folder(settings, name)
        kind = arguments.pop("tokenizer_backend", None) or ("huggingface" if tokenizer else "none")
        arguments.setdefault("tokenized_requests", tokenizer is not None)
        url = f"{address}/completions"
        try:
            lm = CompletionsModel(base_url=url, tokenizer=tokenizer, tokenizer_backend=kind, **common, **arguments)
        except OSError as error:  # transformers' error for a folder or repository without a tokenizer
            raise BadInputError(
                f"--model_args tokenizer={tokenizer} could not be loaded: {first_line(error)}"
            ) from error
        if lm.tokenizer is None:
            remarks.append("Prompts go to the server as text: it adds special tokens by its own rule.")
    used = {"base_url": settings.base_url, "batch_size_used": {"requests at a time": at_once}}
    return LMBackend(lm, lambda: used, remarks)


def _served_folder(settings: Settings, name: str) -> str | None:
    """Return the folder that the server says its model is from, where it is on this machine."""
    root = (Server(str(settings.base_url)).models() or {}).get(name, {}).get("root")
    if not isinstance(root, str) or len(root) > MAX_PATH:
        return None
    return root if os.path.isfile(os.path.join(root, "tokenizer_config.json")) else None


def messages_as_json(chat: list[dict[str, str]], add_generation_prompt: bool = True) -> str:  # noqa: ARG001 - lm-eval passes it by name
    """Return a chat as the text that stands for it in requests; the server renders it."""
    return json.dumps(chat, ensure_ascii=False)
