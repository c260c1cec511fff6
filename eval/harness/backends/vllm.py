"""lm-eval's `vllm` model with the corrections that it needs; vLLM decodes continuations after their prompt itself."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from lm_eval.models.vllm_causallms import VLLM

from eval.harness.backends.answering import Arguments, arguments_of, settings_of
from eval.harness.corrections.encoding import CorrectedEncoding, TokenRequest, check_choice_lengths
from eval.request_types import Facts, Request

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

AT_ONCE = 512
"""Requests between two writes to the journal: vLLM fills its batches from within them."""


class VLLMModel(CorrectedEncoding, VLLM):  # type: ignore[misc]
    """vLLM on the GPUs that --n_gpu gives."""

    def __init__(self, *, rows: int | None, **arguments: object) -> None:
        super().__init__(batch_size=rows or AT_ONCE, **arguments)
        self._outputs: deque[Facts] = deque()
        self._lengths: dict[str, int] = {}
        self._truncated: set[tuple[str, ...]] = set()
        self.remarks: list[str] = []

    def arguments(self, request: Request) -> Arguments:
        """Return lm-eval's arguments of a request."""
        return arguments_of(request)

    def group_of(self, request: Request) -> int:
        """All requests of a kind may be asked together."""
        return 0

    def adapt(self, error: Exception) -> bool:
        """vLLM plans its memory itself."""
        return False

    def release(self) -> None:
        """Nothing to give back."""

    def facts(self, method: str, arguments: Arguments) -> Facts:
        """Return what is known of an answer besides its text or number."""
        if method != "generate_until":
            return Facts(prompt_truncated=tuple(arguments) in self._truncated)
        facts = self._outputs.popleft() if self._outputs else Facts()
        most = settings_of(arguments).get("max_gen_toks") or 0
        return Facts(facts.tokens, facts.finish, self._lengths.get(str(arguments[0]), 0) + most > self.max_length)

    def tok_encode(self, string: str | list[str], add_special_tokens: bool | None = None, **kwargs: object) -> Any:
        """Encode, and remember the length of each prompt of a list."""
        ids = super().tok_encode(string, add_special_tokens=add_special_tokens, **kwargs)
        if not isinstance(string, str):
            self._lengths |= {text: len(one) for text, one in zip(string, ids, strict=True)}
        return ids

    def _model_generate(
        self, requests: list[list[int]], generate: bool = False, sampling_params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        outputs: list[RequestOutput] = super()._model_generate(
            requests, generate=generate, sampling_params=sampling_params
        )
        if generate:
            completions = [o.outputs[0] for o in outputs]
            self._outputs.extend(Facts(len(o.token_ids), o.finish_reason or "length", False) for o in completions)
        return outputs

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        most = self.max_length - 1
        check_choice_lengths(requests, most)
        self._truncated |= {tuple(key) for key, a, b in requests if key is not None and len(a) + len(b) > most}
        return list(super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm))
