"""Requests to one of lm-eval's models, and each answer handed over when its batch ends.

lm-eval's models call `cache_hook.add_partial(method, arguments, answer)` for each answer of a finished batch; the
journal gets answers there, so that a run that stops loses one batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

from common.errors import EvaluationError
from eval.harness.corrections.logits import check_log_likelihood
from eval.harness.corrections.sampling import seed_of
from eval.harness.corrections.stop_strings import cut
from eval.request_types import Answer, Answered, Facts, Request

if TYPE_CHECKING:
    import torch

    from common.files.json_values import JsonObject

METHODS = {"score": "loglikelihood", "rolling": "loglikelihood_rolling", "generate": "generate_until"}
Arguments = tuple["str | JsonObject", ...]
"""lm-eval's arguments of a request: a text, a context and a continuation, or a context and generation settings."""


class AnsweringModel(Protocol):
    """One of lm-eval's models with the methods that the backends of this package add."""

    add_bos_token: bool | None

    def arguments(self, request: Request) -> Arguments:
        """Return lm-eval's arguments of a request."""

    def facts(self, method: str, arguments: Arguments) -> Facts:
        """Return the known facts of an answer: number of generated tokens, finish reason, truncation."""

    def group_of(self, request: Request) -> int:
        """Return a number; requests of one kind and number may be asked together."""

    def adapt(self, error: Exception) -> bool:
        """Return True where batches were changed after an error, so that it is worth asking again."""

    def release(self) -> None:
        """Give unused memory back to the device."""

    def set_cache_hook(self, cache_hook: AnswerHook) -> None:
        """Set the hook that gets the answers of finished batches."""


class AnswerHook:
    """lm-eval's cache hook: matches answers with the requests they are of and hands them over.

    `lm.facts` is called with the hook's arguments and returns what the model knows of the answer: number of generated
    tokens, finish reason, truncation of the prompt.
    """

    def __init__(self, requests: Sequence[Request], lm: AnsweringModel, answered: Answered) -> None:
        self._facts = lm.facts
        self._answered = answered
        self._dtype = getattr(getattr(lm, "model", None), "dtype", "the served dtype")
        self.waiting: dict[str, Request] = {r.key: r for r in requests}
        self._keys: dict[tuple[str | None, ...], list[tuple[str, str | JsonObject]]] = defaultdict(list)
        for r in requests:
            arguments = lm.arguments(r)
            self._keys[_identity(METHODS[r.kind], arguments)].append((r.key, arguments[-1]))

    def add_partial(self, attr: str, req: Arguments | None, res: Answer) -> None:
        """Hand over the answer to all requests with these arguments; windows of a longer text have none."""
        if req is None:
            return
        facts = self._facts(attr, req)
        matches = self._keys.get(_identity(attr, req), [])
        exact = [key for key, last in matches if last == req[-1]]
        if not exact and all(last == matches[0][1] for _, last in matches):  # settings that the model has completed
            exact = [key for key, _ in matches]
        for key in exact:
            self.hand_over(key, res, facts)

    def hand_over(self, key: str, answer: Answer, facts: Facts | None = None) -> None:
        """Hand over one answer, once."""
        request = self.waiting.get(key)
        if request is None:
            return
        checked = _checked(request, answer, self._dtype)
        facts = facts or Facts()
        if isinstance(checked, str) and isinstance(answer, str) and len(checked) < len(answer):
            facts = replace(facts, finish="stop")
        del self.waiting[key]
        self._answered(request, checked, facts)


class LMBackend:
    """An lm-eval model that answers an evaluation's requests.

    Args:
        lm: The model.
        used: What the results file records of it.
        remarks: Sentences to report.
    """

    def __init__(self, lm: AnsweringModel, used: Callable[[], JsonObject], remarks: Iterable[str] = ()) -> None:
        self.lm, self.used, self.remarks = lm, used, list(remarks)

    def answer(self, requests: Sequence[Request], answered: Answered) -> None:
        """Answer every request; `answered(request, answer, facts)` when its batch has ended."""

        def group(request: Request) -> tuple[int, str, int]:
            order = ("score", "rolling", "generate").index(request.kind)
            return order, str(request.special_tokens), self.lm.group_of(request)

        for _, items in groupby(sorted(requests, key=group), key=group):
            self._ask(list(items), answered)

    def _ask(self, requests: list[Request], answered: Answered) -> None:
        """Ask for requests of one kind, again for the rest where the model could adapt to an error."""
        hook = AnswerHook(requests, self.lm, answered)
        self.lm.set_cache_hook(hook)
        self.lm.add_bos_token = requests[0].special_tokens
        while hook.waiting:
            rest = list(hook.waiting.values())
            try:
                answers = self._call(rest)
            except Exception as error:
                if not self.lm.adapt(error):
                    raise
                del error  # its traceback holds the tensors of the failed batch
                self.lm.release()
                continue
            for request, answer in zip(rest, answers, strict=True):
                hook.hand_over(request.key, answer)

    def _call(self, requests: Sequence[Request]) -> list[Answer]:
        from lm_eval.api.instance import Instance

        method = METHODS[requests[0].kind]
        instances = [Instance(method, {}, self.lm.arguments(r), r.number) for r in requests]
        ask = getattr(self.lm, method)
        answers = ask(instances) if method == "loglikelihood_rolling" else ask(instances, disable_tqdm=True)
        return list(answers)


def arguments_of(request: Request) -> Arguments:
    """Return lm-eval's arguments of a request; the seed of a sample is one of its generation settings."""
    if request.kind == "rolling":
        return (request.context,)
    if request.kind == "score":
        return request.context, request.continuation
    settings: JsonObject = {**request.options, "until": list(request.until), "max_gen_toks": request.max_tokens}
    settings |= {"do_sample": request.temperature > 0, "temperature": request.temperature}
    if request.temperature > 0:
        settings["seed"] = seed_of(request.seed, request.context, request.number)
    return request.context, settings


def settings_of(arguments: Arguments) -> JsonObject:
    """Return the generation settings among lm-eval's arguments."""
    settings = arguments[1]
    assert isinstance(settings, dict)
    return settings


def _identity(method: str, arguments: Arguments) -> tuple[str | None, ...]:
    """Arguments by which an answer is matched; of the generation settings, which models change, the seed."""
    if method == "generate_until":
        return method, str(getattr(arguments[0], "prompt", arguments[0])), settings_of(arguments).get("seed")
    return method, *map(str, arguments)


def _checked(request: Request, answer: Answer, dtype: object) -> Answer:
    if request.kind == "generate":  # servers leave text behind a stop string, or cannot take all of them
        assert isinstance(answer, str)
        return cut(answer, request.until)
    if request.kind == "rolling":
        assert not isinstance(answer, str | tuple)
        check_log_likelihood(float(answer), dtype)
        return float(answer)
    assert isinstance(answer, tuple)
    likelihood, is_greedy = float(answer[0]), bool(answer[1])
    check_log_likelihood(likelihood, dtype)
    return likelihood, is_greedy


def not_enough_memory(tokens: int, device: torch.device) -> EvaluationError:
    """The error for one row that memory does not hold."""
    return EvaluationError(
        f"There is not enough memory for one row of {tokens} tokens on {device}; give a shorter --max_model_len, a "
        "smaller --dtype or another --device."
    )
