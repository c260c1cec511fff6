"""lm-eval's own models behind our requests: vLLM, and transformers' encoder-decoder models.

They answer in chunks, so that what a stopped run had is kept. No test of ours runs vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.engine.seeds import seed_of
from eval.harness.models import Subject, show_only
from eval.harness.request_types import Answered, Request
from eval.harness.settings import Settings

CHUNK = {"vllm": 512, "hf": 64}
"""Requests between two writes to the journal: vLLM fills its batches from within a chunk."""
METHODS = {"generate": "generate_until", "score": "loglikelihood", "rolling": "loglikelihood_rolling"}


class AdaptedEngine:
    """One of lm-eval's models; `chunk` requests are given to it at a time, the longest prompts first."""

    def __init__(self, lm: Any, chunk: int, dtype: str, seeds: bool) -> None:
        self.lm, self._chunk, self._dtype, self._seeds = lm, chunk, dtype, seeds

    def answer(self, requests: Sequence[Request], answered: Answered) -> None:
        """Answer chunk by chunk, each kind of request for itself."""
        from lm_eval.api.instance import Instance

        for kind, method in METHODS.items():
            chosen = sorted((r for r in requests if r.kind == kind), key=lambda r: -len(r.context))
            for start in range(0, len(chosen), self._chunk):
                chunk = chosen[start : start + self._chunk]
                instances = [Instance(method, {}, self._arguments(r), r.number) for r in chunk]
                for request, answer in zip(chunk, getattr(self.lm, method)(instances), strict=True):
                    answered(request, answer)

    def _arguments(self, request: Request) -> tuple[Any, ...]:
        if request.kind == "rolling":
            return (request.context,)
        if request.kind == "score":
            return request.context, request.continuation
        settings: dict[str, Any] = {"until": list(request.until), "max_gen_toks": request.max_tokens}
        settings |= {"do_sample": request.temperature > 0, "temperature": request.temperature, **request.options}
        if request.temperature > 0 and self._seeds:
            settings["seed"] = seed_of(request)
        return request.context, settings

    def used(self) -> Mapping[str, Any]:
        """The dtype of the weights and how many requests were given at a time."""
        return {"dtype_used": self._dtype, "batch_size_used": {"requests at a time": self._chunk}}


def adapted(subject: Subject, settings: Settings) -> AdaptedEngine:
    """Load vLLM, or an encoder-decoder model with transformers."""
    if settings.backend == "vllm":
        return AdaptedEngine(_vllm(subject, settings), CHUNK["vllm"], str(settings.dtype), seeds=True)
    from lm_eval.models.huggingface import HFLM

    rows = 8 if settings.batch_size == "auto" else int(settings.batch_size)
    common = {"tokenizer": subject.tokenizer, "max_length": subject.length, "batch_size": rows}
    if subject.folder is None:
        lm = HFLM(subject.model, backend="seq2seq", **common)
    else:
        where = {"device": settings.device, "dtype": settings.dtype}
        lm = HFLM(str(subject.folder), backend="seq2seq", **where, **common)
    return AdaptedEngine(lm, CHUNK["hf"], str(lm.model.dtype).removeprefix("torch."), seeds=False)


def _vllm(subject: Subject, settings: Settings) -> Any:
    """vLLM on the GPUs that --n_gpu says: --data_parallel copies, each tensor-parallel over its share."""
    from lm_eval.models.vllm_causallms import VLLM

    show_only(settings)
    return VLLM(
        pretrained=str(subject.folder),
        dtype=settings.dtype,
        tensor_parallel_size=(settings.n_gpu or 1) // settings.data_parallel,
        data_parallel_size=settings.data_parallel,
        max_model_len=subject.length,
        batch_size="auto" if settings.batch_size == "auto" else int(settings.batch_size),
        seed=settings.seed,
    )
