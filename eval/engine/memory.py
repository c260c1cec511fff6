"""How much is computed at once, and what happens when that was too much."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from console.errors import EvaluationError
from console.memory import ran_out

T = TypeVar("T")

CPU_BYTES = 2 << 30
GPU_SHARE = 0.8
MOST_ROWS = {"cpu": 64, "cuda": 256}
PASS_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Tokens of prompts computed in one pass; more gain nothing."""


def tried(work: Callable[[], T], rows: int, device: Any, alone: str) -> T | None:
    """Return what `work` gives; None, with memory given back, where it does not suffice for its `rows`.

    Raises EvaluationError with the sentence `alone` where that is a single row.
    """
    try:
        return work()
    except Exception as error:  # torch raises RuntimeError or its subclasses, by device and version
        if not ran_out(error):
            raise
        if rows == 1:
            raise EvaluationError(alone) from error
    release(device)  # after the handler: its traceback holds the tensors
    return None


def release(device: Any) -> None:
    """Give memory that nothing refers to any more back to the device."""
    gc.collect()
    if str(device).startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


def cache_bytes_per_token(config: Mapping[str, Any], element: int) -> int:
    """Bytes of keys and values of one token, by a model's configuration and the bytes of a number."""
    text = config.get("text_config") or config
    heads = text.get("num_attention_heads") or text.get("n_head") or 1
    head_size = text.get("head_dim") or (text.get("hidden_size") or text.get("n_embd") or 0) // heads
    layers = text.get("num_hidden_layers") or text.get("n_layer") or 0
    return int(2 * element * layers * (text.get("num_key_value_heads") or heads) * head_size)


def rows_that_fit(config: Mapping[str, Any], element: int, length: int, available: int, kind: str) -> int:
    """Rows of `length` tokens whose keys, values and last logits fit `available` bytes: a power of two.

    At least 1; at most 64 on a CPU and 256 on a GPU, beyond which a step only gets longer.
    """
    text = config.get("text_config") or config
    row = length * cache_bytes_per_token(config, element) + 4 * (text.get("vocab_size") or 0)
    rows = max(1, min(MOST_ROWS[kind], available // max(1, row)))
    return 1 << (int(rows).bit_length() - 1)


def available_bytes(device: Any) -> int:
    """What batches may use: 2 GiB on a CPU, most of what is free on a GPU."""
    if not str(device).startswith("cuda"):
        return CPU_BYTES
    import torch

    return int(torch.cuda.mem_get_info(device)[0] * GPU_SHARE)
