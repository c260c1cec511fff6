"""Rows per batch: a fixed number, or as many as memory is estimated to hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from common.files.json_values import JsonObject

CPU_BYTES = 2 << 30
GPU_SHARE = 0.8
MOST_ROWS = {"cpu": 64, "cuda": 256, "mps": 64}
LOGITS_COPIES = 3
"""lm-eval's scoring holds logits of a whole batch, their logarithms in float32, and what the softmax needs."""


def cache_bytes_per_token(config: JsonObject, element: int) -> int:
    """Return the bytes of keys and values of one token, by a model's configuration and the bytes of a number."""
    text = config.get("text_config") or config
    heads = text.get("num_attention_heads") or text.get("n_head") or 1
    head_size = text.get("head_dim") or (text.get("hidden_size") or text.get("n_embd") or 0) // heads
    layers = text.get("num_hidden_layers") or text.get("n_layer") or 0
    return int(2 * element * layers * (text.get("num_key_value_heads") or heads) * head_size)


def generation_rows(config: JsonObject, element: int, length: int, available: int, kind: str) -> int:
    """Return the rows of `length` tokens whose keys, values and last logits fit `available` bytes: a power of two.

    At least 1; at most 64 on a CPU and 256 on a GPU, beyond which a step only gets longer.
    """
    row = length * cache_bytes_per_token(config, element) + 4 * vocabulary(config)
    return _power_of_two(available // max(1, row), MOST_ROWS[kind])


def scoring_rows(config: JsonObject, length: int, available: int, kind: str) -> int:
    """Return the rows of `length` tokens whose logits fit `available` bytes: a power of two, at least 1."""
    return _power_of_two(available // max(1, 4 * LOGITS_COPIES * length * vocabulary(config)), MOST_ROWS[kind])


def vocabulary(config: JsonObject) -> int:
    """Return the number of logits of a position."""
    text = config.get("text_config") or config
    return int(text.get("vocab_size") or 0)


def padding_id(tokenizer: PreTrainedTokenizerBase, size: int) -> int:
    """Return an id for padded places that a model of `size` token embeddings has.

    Tokenizers hold padding tokens that were added without a row in the model; what stands in padded places is masked.
    """
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    return next((i for i in ids if i is not None and (not size or i < size)), 0)


def _power_of_two(rows: int, most: int) -> int:
    return 1 << (max(1, min(most, rows)).bit_length() - 1)


def available_bytes(device: torch.device) -> int:
    """Return what batches may use: 2 GiB on a CPU, most of what is free on a GPU."""
    if not str(device).startswith("cuda"):
        return CPU_BYTES
    import torch

    return int(torch.cuda.mem_get_info(device)[0] * GPU_SHARE)


def batch_sizes(lengths: Sequence[int], rows_of: Callable[[int], int], equal_lengths: bool) -> list[int]:
    """Return for each row, longest first, the size of the batch it belongs to.

    Args:
        lengths: Tokens of each row, in the order of the batches.
        rows_of: Called with the tokens of a batch's first row; returns the most rows of the batch.
        equal_lengths: Rows of a batch have the same number of tokens.
    """
    sizes: list[int] = []
    while len(sizes) < len(lengths):
        start = len(sizes)
        limit = max(1, rows_of(lengths[start]))
        end = start
        while end < len(lengths) and end - start < limit and (not equal_lengths or lengths[end] == lengths[start]):
            end += 1
        sizes += [end - start] * (end - start)
    return sizes
