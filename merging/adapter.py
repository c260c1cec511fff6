"""LoRA adapters, added to a base tensor by tensor as it is read. Hu et al. 2021, arXiv:2106.09685.

    theta = theta_0 + scaling * B A        B (out, r), A (r, in)
    scaling = alpha / r, or alpha / sqrt(r) with use_rslora (Kalajdzievski 2023, arXiv:2312.03732)

No second checkpoint is made, in memory or on disk. What PEFT's adapter_config.json asks for beyond this is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console.errors import CheckpointError
from merging.adapter_config import pattern_value
from merging.adapter_keys import AdapterKeys, Pair, find_stored
from merging.names import role_of
from merging.orientation import transposed_names
from merging.stored import FLOATS, TensorInfo, Weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from merging.rows import Rows

BLOCK_ELEMENTS = 1 << 20
"""Elements whose product is held in fp64 at a time. No result depends on it."""


@dataclass(frozen=True)
class Product:
    """What is added to one tensor: the adapter's A and B, and whether the tensor is stored (in, out)."""

    pair: Pair
    scaling: float
    transposed: bool


@dataclass(frozen=True)
class AdaptedRows:
    """theta_0 + scaling * left @ right, in fp32: left (rows, r), right (r, columns); rows are computed when read."""

    own: Rows
    left: Tensor
    right: Tensor
    scaling: float

    @property
    def shape(self) -> torch.Size:
        """The base tensor's shape."""
        return self.own.shape

    @property
    def dtype(self) -> torch.dtype:
        """fp32, whatever the base is stored in."""
        import torch

        return torch.float32

    def __getitem__(self, rows: slice) -> Tensor:
        """Return rows start:stop, rounded once to fp32.

        The product is added up rank by rank in fp64, where the product of two fp32 numbers is exact: no element depends
        on the rows beside it, on threads, or on how a matrix product would be cut.
        """
        import torch

        start, stop, _ = rows.indices(self.shape[0])
        right = self.right.double()
        out = torch.empty(max(0, stop - start), right.shape[1])
        step = max(1, BLOCK_ELEMENTS // max(1, right.shape[1]))
        for first in range(start, stop, step):
            last = min(stop, first + step)
            left = self.left[first:last].double()
            total = torch.zeros(last - first, right.shape[1], dtype=torch.float64)
            for rank in range(len(right)):
                total.addr_(left[:, rank], right[rank])
            out[first - start : last - start] = total.mul_(self.scaling).add_(self.own[first:last])
        return out


class AdaptedWeights:
    """A base's tensors with an adapter's products added and its whole tensors in their place.

    products, whole: {name of the result's tensor: what the adapter has for it}; heads: {output head that the base ties:
    its input embedding}, for adapters that untie it; trained_on: the base that its config names.
    """

    def __init__(
        self,
        base: Weights,
        adapter: Weights,
        products: Mapping[str, Product],
        whole: Mapping[str, str],
        heads: Mapping[str, str],
        config_file: Path,
        trained_on: str | None = None,
    ) -> None:
        self.base, self.adapter, self.config_file, self.trained_on = base, adapter, config_file, trained_on
        self.products, self.whole, self.heads = products, whole, heads
        stored = dict(base.tensors) | {head: base.tensors[embedding] for head, embedding in heads.items()}
        stored |= {name: adapter.tensors[key] for name, key in whole.items()}
        stored |= {name: TensorInfo(stored[name].shape, "float32", stored[name].file) for name in products}
        self.tensors: Mapping[str, TensorInfo] = stored

    @property
    def files(self) -> tuple[Path, ...]:
        """The base's files and the adapter's, with its config, which holds the scaling."""
        return tuple(sorted({*self.base.files, *self.adapter.files, self.config_file}))

    @property
    def config_changes(self) -> dict[str, Any]:
        """What the base's config has to say otherwise: a head that is tied no longer, another number of tokens."""
        replaced = [name for name in self.whole if role_of(name) == "input"]
        rows = {"vocab_size": self.tensors[replaced[0]].shape[0]} if replaced else {}
        return {**rows, **({"tie_word_embeddings": False} if self.heads else {})}

    def rows(self, name: str) -> Rows:
        """Return a tensor of the adapted model. Raises CheckpointError where a file cannot be read."""
        key = self.whole.get(name)
        own = self.base.rows(self.heads.get(name, name)) if key is None else self.adapter.rows(key)
        product = self.products.get(name)
        if product is None:
            return own
        a, b = (self.adapter.rows(key)[slice(None)] for key in (product.pair.a, product.pair.b))
        left, right = (a.T, b.T) if product.transposed else (b, a)
        return AdaptedRows(own, left, right, product.scaling)

    def close(self) -> None:
        """Let go of both."""
        self.base.close()
        self.adapter.close()


def adapt(
    names: tuple[str, str], base: Weights, ties: bool, adapter: Weights, config: Mapping[str, Any], config_file: Path
) -> AdaptedWeights:
    """Lay an adapter over a base. names: of the two, for messages; ties: whether the base ties its output head.

    Raises CheckpointError for keys that are not understood, and where names or shapes do not fit the base.
    """
    keys = AdapterKeys.sort(names[1], adapter.tensors)
    fit = _Fit(base, adapter, ties)
    whole = fit.whole(keys.whole)
    products = fit.products(keys.pairs, config, names[1])
    fit.check_tied({*whole, *products})
    trained = config.get("base_model_name_or_path")
    if fit.problems:
        more = f" (and {len(fit.problems) - 1} more)" if len(fit.problems) > 1 else ""
        said = f"; it was trained on {trained}" if trained else ""
        raise CheckpointError(f"Adapter {names[1]} does not fit {names[0]}: {fit.problems[0]}{more}{said}.")
    return AdaptedWeights(base, adapter, products, whole, fit.heads, config_file, trained)


class _Fit:
    """Finds the base's tensors that an adapter's belong to, and collects what does not fit."""

    def __init__(self, base: Weights, adapter: Weights, ties: bool) -> None:
        self._base, self._adapter, self._ties = base, adapter, ties
        self._embedding = next((name for name in base.tensors if role_of(name) == "input"), None)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.heads: dict[str, str] = {}
        self.problems: list[str] = []

    def whole(self, keys: Mapping[str, str]) -> dict[str, str]:
        """{stored name: key} of the tensors that take the place of the base's. A vocabulary may have other rows."""
        found = {}
        for name, key in keys.items():
            stored, theirs = self._target(name), self._adapter.tensors[key].shape
            if stored is None:
                continue
            ours = self._shapes[stored]
            grown = role_of(stored) is not None and ours[1:] == theirs[1:]
            if ours != theirs and not grown:
                self.problems.append(f"{stored} is {list(ours)} in the base and {list(theirs)} in the adapter")
            self._shapes[stored] = theirs
            found[stored] = key
        return found

    def products(self, pairs: Mapping[str, Pair], config: Mapping[str, Any], label: str) -> dict[str, Product]:
        """{stored name: what is added to it}."""
        targets = {stored: pair for name, pair in pairs.items() if (stored := self._target(name))}
        ways = {stored: self._ways(stored, pair) for stored, pair in targets.items()}
        turned = config.get("fan_in_fan_out") or any(
            way == {True} and not targets[n].embedding for n, way in ways.items()
        )
        stored_turned = transposed_names({name: info.shape for name, info in self._base.tensors.items()})
        found = {}
        for stored, pair in targets.items():
            rank = pattern_value(label, config, "rank_pattern", pair.module, config["r"])
            alpha = pattern_value(label, config, "alpha_pattern", pair.module, config["lora_alpha"])
            if rank != self._adapter.tensors[pair.a].shape[0]:
                kept = self._adapter.tensors[pair.a].shape[0]
                self.problems.append(f"its config gives {pair.module} rank {rank} and its tensors have {kept}")
            scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
            either = len(ways[stored]) == 2 and (turned or stored in stored_turned)  # a square matrix does not tell
            found[stored] = Product(pair, scaling, ways[stored] == {True} or bool(either))
        return found

    def check_tied(self, changed: set[str]) -> None:
        """An embedding that is also the output head cannot change in one of the two places alone."""
        if self._ties and self._embedding in changed and not self.heads:
            self.problems.append(f"it changes {self._embedding}, which the base has for its output head too")

    def _target(self, name: str) -> str | None:
        """The stored name of a tensor of the model; for an output head that the base ties, its own name."""
        stored = find_stored(name, self._base.tensors)
        if stored is None and role_of(name) == "head" and self._ties and self._embedding is not None:
            self.heads[name] = self._embedding
            stored = name
        if stored is None:
            self.problems.append(f"the base has no tensor {name}")
        elif stored not in self._shapes:
            info = self._base.tensors[self.heads.get(stored, stored)]
            if info.dtype not in FLOATS:
                self.problems.append(f"{stored} is stored as {info.dtype}")
            self._shapes[stored] = info.shape
        return stored

    def _ways(self, stored: str, pair: Pair) -> set[bool]:
        """How B A fits a tensor: as it is (False), turned (True: stored as (in, out), or an embedding), both or not."""
        a, b = self._adapter.tensors[pair.a].shape, self._adapter.tensors[pair.b].shape
        shape = self._shapes[stored]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            self.problems.append(f"{pair.a} {list(a)} and {pair.b} {list(b)} are not the two factors of a matrix")
            return set()
        ways = {way for way, product in ((False, (b[0], a[1])), (True, (a[1], b[0]))) if product == shape}
        ways &= {True} if pair.embedding else {False, True}
        if not ways:
            self.problems.append(f"{stored} is {list(shape)} in the base and B A of the adapter {[b[0], a[1]]}")
        return ways
