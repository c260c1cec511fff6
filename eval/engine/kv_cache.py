"""Keys and values of running sequences, in buffers that grow by halves and are written in place.

transformers' own dynamic cache copies everything for each token. Rows are aligned at their right end; a mask says
which columns of a row hold tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

SPARE = 64
Layers = Any
"""A cache with layers of `Buffers`; transformers' own type allows many other kinds."""


class Buffers(DynamicLayer):
    """One layer's keys and values, (rows, heads, length, head size), with spare room at the end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._room: tuple[Tensor, Tensor] | None = None

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Take these as the contents."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys, self.values, self._room = keys, values, None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (rows, heads, new, head size); return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if self._room is None or new > self._room[0].shape[-2]:
            self._room = self._grown(key_states, new), self._grown(value_states, new)
            if self.keys is not None and self.values is not None and old:
                self._room[0][:, :, :old], self._room[1][:, :, :old] = self.keys, self.values
        self._room[0][:, :, old:new], self._room[1][:, :, old:new] = key_states, value_states
        self.keys, self.values = self._room[0][:, :, :new], self._room[1][:, :, :new]
        return self.keys, self.values

    @staticmethod
    def _grown(like: Tensor, length: int) -> Tensor:
        rows, heads, _, size = like.shape
        return like.new_empty(rows, heads, length + max(SPARE, length // 2), size)


def new_cache() -> Layers:
    """An empty cache of such layers."""
    return Cache(layer_class_to_replicate=Buffers)


def supports(model: Any) -> bool:
    """Whether a model keeps plain keys and values per layer, so that rows can be joined and taken out."""
    from transformers import DynamicCache

    if getattr(model.config, "is_encoder_decoder", False) or getattr(model, "_is_stateful", False):
        return False
    if not all(hasattr(model, name) for name in ("forward", "config")):
        return False
    check = getattr(model, "_supports_default_dynamic_cache", None)
    if check is not None and not check():
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def repeated(prefix: Layers, rows: int) -> Layers:
    """The cache of one sequence as the cache of `rows` equal ones (views, copied when the next token comes)."""
    cache = new_cache()
    for layer in prefix.layers:
        copy = Buffers()
        copy.hold(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1))
        cache.layers.append(copy)
    return cache


def joined(
    first: Layers | None, first_mask: Tensor | None, second: Layers, second_mask: Tensor
) -> tuple[Layers, Tensor]:
    """Put the rows of two caches into one, right ends aligned, without columns that no row uses.

    Masks are (rows, length) with 1 where a column holds a token. Returns the cache and its mask.
    """
    pairs = ((first, first_mask), (second, second_mask))
    parts = [(c, m, _used(m)) for c, m in pairs if c is not None and m is not None]
    width = max(used for _, _, used in parts)
    rows = sum(m.shape[0] for _, m, _ in parts)
    mask = second_mask.new_zeros(rows, width)
    start = 0
    for _, m, used in parts:
        mask[start : start + m.shape[0], width - used :] = m[:, m.shape[1] - used :]
        start += m.shape[0]
    cache = new_cache()
    for index in range(len(second.layers)):
        layer = Buffers()
        keys = _stacked([(c.layers[index].keys, used) for c, _, used in parts], rows, width)
        layer.hold(keys, _stacked([(c.layers[index].values, used) for c, _, used in parts], rows, width))
        cache.layers.append(layer)
    return cache, mask


def kept(cache: Layers, mask: Tensor, rows: list[int]) -> tuple[Layers, Tensor]:
    """Only these rows, without columns that none of them uses."""
    index = torch.tensor(rows, device=mask.device)
    mask = mask.index_select(0, index)
    used = _used(mask)
    smaller = new_cache()
    for layer in cache.layers:
        at = index.to(layer.keys.device)
        copy = Buffers()
        copy.hold(*(t[:, :, t.shape[2] - used :].index_select(0, at) for t in (layer.keys, layer.values)))
        smaller.layers.append(copy)
    return smaller, mask[:, mask.shape[1] - used :]


def _used(mask: Tensor) -> int:
    """The number of columns from the first one that holds a token of any row."""
    columns = mask.any(dim=0).nonzero()
    return int(mask.shape[1] - columns[0]) if len(columns) else 0


def _stacked(parts: list[tuple[Tensor, int]], rows: int, width: int) -> Tensor:
    first = parts[0][0]
    whole = first.new_zeros(rows, first.shape[1], width, first.shape[3])
    start = 0
    for tensor, used in parts:
        whole[start : start + tensor.shape[0], :, width - used :] = tensor[:, :, tensor.shape[2] - used :]
        start += tensor.shape[0]
    return whole
