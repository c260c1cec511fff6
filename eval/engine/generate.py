"""Generations by transformers' own `generate`, batch by batch: for models without a plain cache, and for beams."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from eval.engine.memory import tried
from eval.engine.stops import Stops
from eval.engine.tokens import Tokens
from eval.harness.request_types import Answered, Request


def generate_batches(
    model: Any, tokens: Tokens, requests: Sequence[Request], max_length: int, rows: int, answered: Answered
) -> None:
    """Answer in batches of equal settings, longest prompts first; half the rows where memory does not suffice."""
    prompts = {id(r): tokens.prompt(r.context, max_length - r.max_tokens) or [tokens.pad] for r in requests}
    groups: dict[str, list[Request]] = {}
    for r in requests:
        groups.setdefault(repr((r.until, r.max_tokens, r.temperature, sorted(r.options.items()))), []).append(r)
    for group in groups.values():
        waiting = sorted(group, key=lambda r: -len(prompts[id(r)]))
        while waiting:
            batch = waiting[:rows]
            inputs = [prompts[id(r)] for r in batch]
            texts = tried(
                partial(_texts, model, tokens, batch, inputs),
                len(batch),
                model.device,
                f"There is not enough memory for one sequence of {len(inputs[0])} tokens; give a shorter "
                "--max_model_len or another --device.",
            )
            if texts is None:
                rows = max(1, len(batch) // 2)
                continue
            waiting = waiting[rows:]
            for request, text in zip(batch, texts, strict=True):
                answered(request, text)


@torch.inference_mode()
def _texts(model: Any, tokens: Tokens, batch: Sequence[Request], prompts: Sequence[list[int]]) -> list[str]:
    from transformers import StoppingCriteria, StoppingCriteriaList

    first = batch[0]
    stops = Stops(tokens, first.until)
    width = max(map(len, prompts))
    ids = torch.full((len(batch), width), tokens.pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1

    class Reached(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            ended = [stops.reached(row[width:].tolist()) for row in ids]
            return torch.tensor(ended, device=ids.device)

    sampling: dict[str, Any] = {"do_sample": False}
    if first.temperature > 0:
        torch.manual_seed(first.seed)
        sampling = {"do_sample": True, "temperature": first.temperature}
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=first.max_tokens,
        pad_token_id=tokens.pad,
        stopping_criteria=StoppingCriteriaList([Reached()]),
        **sampling,
        **first.options,
    )
    return [stops.text(row[width:].tolist()) for row in out]
