"""One rule for generation_config.json: only token ids come from it, for every model.

transformers applies whatever the file holds (repetition_penalty, suppress_tokens, top_k, ...) to greedy decoding as
well, so that two models are decoded by different rules; vLLM under lm-eval applies none of it. What is left out is
reported, and `--gen_kwargs` asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

    from common.files.json_values import JsonObject

IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")
IMPLEMENTATION = ("cache_implementation", "cache_config", "use_cache", "transformers_version", "_from_model_config")
LENGTHS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens")


def left_out(generation_config: GenerationConfig | None) -> JsonObject:
    """Return the settings of a model's generation config that are not applied, lengths excepted."""
    if generation_config is None:
        return {}
    from transformers import GenerationConfig

    neutral = GenerationConfig()
    data = generation_config.to_dict()
    dropped = {k: v for k, v in data.items() if k not in (*IDS, *IMPLEMENTATION, "max_length", "max_new_tokens")}
    silent: tuple[object, ...] = (None, False, [], {})
    return {
        k: v
        for k, v in dropped.items()
        if v not in silent and v != getattr(neutral, k, None) and not k.startswith(("output_", "return_dict", "_"))
    }


@contextmanager
def neutral_config(model: PreTrainedModel) -> Iterator[None]:
    """While open, the model's generation config holds token ids only."""
    from transformers import GenerationConfig

    original = model.generation_config
    model.generation_config = GenerationConfig(
        **{
            k: v
            for k in (*IDS, "cache_implementation", "cache_config")
            if (v := getattr(original, k, None)) is not None
        }
    )
    try:
        yield
    finally:
        model.generation_config = original


def sentence(settings: JsonObject) -> str | None:
    """Report of what is not applied; None where there is nothing."""
    if not settings:
        return None
    listed = ", ".join(f"{name}={value}" for name, value in sorted(settings.items()))
    return f"generation_config.json: {listed[:200]} not applied (--gen_kwargs asks for it)."
