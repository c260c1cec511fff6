"""Probe of batch invariance: a row must get the same logits alone and beside a longer row.

Recurrent models that ignore the attention mask, attention biases computed without it and RoPE scaling that switches by
the longest row of a batch give other answers in other batches. The probe finds them at load, for scoring (padded on the
right) and for generation (padded on the left) apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eval.harness.corrections.logits import check_logits

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SHORT, LONG, STEPS = 7, 24, 2
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Root mean square of the logits' change over that of the logits, by dtype of the weights, that rounding explains."""


@dataclass(frozen=True)
class Change:
    """Relative change of a short row's logits beside a longer row, and beside one of its own length.

    The latter is measured only where the former is beyond `tolerance`.
    """

    padded: float = 0.0
    equal_length: float = 0.0
    tolerance: float = 0.0

    @property
    def any_batch(self) -> bool:
        """True where rows of any lengths may share a batch."""
        return self.padded <= self.tolerance

    @property
    def one_row(self) -> bool:
        """True where no rows may share a batch."""
        return not self.any_batch and not self.equal_length <= self.tolerance

    def sentence(self, what: str) -> str | None:
        """Report of a model whose `what` (scores, generations) depend on the batch; None for others."""
        if self.any_batch:
            return None
        rule = "each row is computed alone" if self.one_row else "only rows of equal length share a batch"
        size = 100 * (self.equal_length if self.one_row else self.padded)
        beside = "another row" if self.one_row else "a longer row"
        return f"{what}: this model's logits change by {size:.2g} % beside {beside}, so {rule}."


@dataclass(frozen=True)
class Invariance:
    """Changes of scoring and of generation by the batch."""

    scoring: Change = Change()
    generation: Change = Change()

    def sentences(self) -> list[str]:
        """Reports of what depends on the batch."""
        parts = self.scoring.sentence("Scores"), self.generation.sentence("Generations")
        return [part for part in parts if part]


def probe(model: PreTrainedModel, vocabulary: int, pad: int, max_length: int) -> Invariance:
    """Compare a short row alone with the same row beside a longer one.

    Args:
        model: A causal language model in eval mode.
        vocabulary: Number of token ids to choose probe rows from.
        pad: Id that fills padded places of generation batches; scoring batches are filled with 0, as lm-eval does.
        max_length: Most tokens of a row in this evaluation.

    Raises:
        EvaluationError: The model's logits are NaN or infinite.
    """
    long = min(_long_row(model.config, max_length), max_length - STEPS)
    short = min(SHORT, max(1, long - 1))
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(1, max(2, vocabulary), (2, long), generator=draw)
    one, other = rows[0, :short].to(model.device), rows[1].to(model.device)
    tolerance = TOLERANCE.get(model.dtype, 1e-1)
    if long <= short:
        return Invariance()

    def change(of: Callable[[Tensor], float]) -> Change:
        padded = of(other)
        return Change(padded, 0.0 if padded <= tolerance else of(other[:short]), tolerance)

    with torch.inference_mode():
        return Invariance(
            change(lambda beside: _scoring(model, one, beside)),
            change(lambda beside: _generation(model, one, beside, pad)),
        )


def _long_row(config: PreTrainedConfig, max_length: int) -> int:
    """Length of the longer row: beyond the point where a RoPE scaling switches, if a row can get there."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [s for s in (scaling, *scaling.values()) if isinstance(s, dict)]
    if any((s.get("rope_type") or s.get("type")) in ("longrope", "su", "dynamic", "yarn_dynamic") for s in kinds):
        length = next(
            (s["original_max_position_embeddings"] for s in kinds if s.get("original_max_position_embeddings")), 0
        )
        length = length or getattr(text, "original_max_position_embeddings", 0) or text.max_position_embeddings
        if length + STEPS < max_length:
            return int(length) + 1
    return LONG


def _scoring(model: PreTrainedModel, one: Tensor, other: Tensor) -> float:
    """Change of the short row's logits at each of its positions, padded with 0 on the right and without a mask."""
    batch = torch.zeros(2, len(other), dtype=torch.long, device=one.device)
    batch[0, : len(one)], batch[1] = one, other
    return _change(model(one[None]).logits[0], model(batch).logits[0, : len(one)])


def _generation(model: PreTrainedModel, one: Tensor, other: Tensor, pad: int) -> float:
    """Change of the short row's logits over some generated tokens, padded on the left with a mask."""
    batch = torch.full((2, len(other)), pad, dtype=torch.long, device=one.device)
    mask = torch.zeros_like(batch)
    batch[0, len(other) - len(one) :], batch[1] = one, other
    mask[0, len(other) - len(one) :], mask[1] = 1, 1
    alone = _generated(model, one[None], torch.ones_like(one[None]), pad)
    beside = _generated(model, batch, mask, pad)
    change = _change(alone[0][0], beside[0][0])
    for step in range(1, STEPS):
        if alone[step - 1][0].argmax() != beside[step - 1][0].argmax():
            break  # the rows went on with different tokens, by rounding or by the change found already
        change = max(change, _change(alone[step][0], beside[step][0]))
    return change


def _generated(model: PreTrainedModel, ids: Tensor, mask: Tensor, pad: int) -> tuple[Tensor, ...]:
    """Logits of each generated token, shape (rows, vocabulary); ids that would end a row do not."""
    out = model.generate(  # type: ignore[operator] # of GenerationMixin, which PreTrainedModel does not name
        input_ids=ids, attention_mask=mask, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, num_beams=1,
        pad_token_id=pad, eos_token_id=None, use_cache=True, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return tuple(out.logits)


def _change(alone: Tensor, beside: Tensor) -> float:
    """Root mean square of the difference over that of the centered logits; entries masked in both do not count."""
    for logits in (alone, beside):
        check_logits(logits, logits.dtype)
    is_used = torch.isfinite(alone) | torch.isfinite(beside)
    count = is_used.sum(dim=-1, keepdim=True)
    alone, beside = (torch.where(is_used, logits.float(), 0.0) for logits in (alone, beside))
    centered = torch.where(is_used, alone - alone.sum(dim=-1, keepdim=True) / count, 0.0)
    size = (centered.pow(2).sum() / count.sum()).sqrt()
    return float(((beside - alone).pow(2).sum() / count.sum()).sqrt() / size.clamp(min=1e-12))
