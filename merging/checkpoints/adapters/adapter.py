"""LoRA adapters, added to a base tensor by tensor as it is read. Hu et al. 2021, arXiv:2106.09685.

    theta = theta_0 + scaling * B A        B (out, r), A (r, in)
    scaling = alpha / r, or alpha / sqrt(r) with use_rslora (Kalajdzievski 2023, arXiv:2312.03732)

DoRA, biases of B, trained rows of single tokens and factors of fused experts are computed as PEFT merges them. No
second checkpoint is made, in memory or on disk. Other settings of PEFT's adapter_config.json are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import CheckpointError
from merging.checkpoints.adapters.adapter_config import pattern_value
from merging.checkpoints.adapters.adapter_keys import AdapterKeys, Pair, find_stored
from merging.checkpoints.adapters.expert_factors import (
    FusedParameter,
    expert_factors,
    fused_parameter,
    runs_over_axis_1,
)
from merging.checkpoints.model_config import text_config_of
from merging.checkpoints.orientation import transposed_names
from merging.checkpoints.storage import FLOATS, TensorInfo, Weights
from merging.checkpoints.tensor_names import main_embedding, role_of

if TYPE_CHECKING:
    from merging.checkpoints.row_source import Rows


@dataclass(frozen=True)
class Product:
    """What is added to one tensor: the adapter's A and B, and whether the tensor is stored (in, out)."""

    pair: Pair
    scaling: float
    transposed: bool


@dataclass(frozen=True)
class Change:
    """Change of one tensor by an adapter, other than an added product.

    kind: its name in messages; apply: from the tensor's rows so far and the adapter's weights to its rows.
    """

    kind: str
    apply: Callable[[Rows, Weights], Rows]


class AdaptedWeights:
    """A base's tensors with an adapter's products added and its whole tensors in their place.

    products, whole: {name of the result's tensor: the adapter's factors, or the key of its tensor}; changes: {name:
    DoRA, factors of fused experts, biases, trained rows}; heads: {output head that the base ties: its input embedding},
    for adapters that untie it; trained_on: the base that its config names.
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
        changes: Mapping[str, Change] | None = None,
    ) -> None:
        self.base, self.adapter, self.config_file, self.trained_on = base, adapter, config_file, trained_on
        self.products, self.whole, self.heads, self.changes = products, whole, heads, changes or {}
        stored = dict(base.tensors) | {head: base.tensors[embedding] for head, embedding in heads.items()}
        stored |= {name: adapter.tensors[key] for name, key in whole.items()}
        computed = {*products, *self.changes}
        stored |= {
            name: TensorInfo(stored[name].shape, "float32", stored[name].file, is_calculated=True) for name in computed
        }
        self.tensors: Mapping[str, TensorInfo] = stored

    @property
    def files(self) -> tuple[Path, ...]:
        """The base's files and the adapter's, with its config, which holds the scaling."""
        return tuple(sorted({*self.base.files, *self.adapter.files, self.config_file}))

    @property
    def config_changes(self) -> dict[str, Any]:
        """Changes to the base's config: a head that is tied no longer, another number of tokens."""
        replaced = [name for name in self.whole if role_of(name) == "input"]
        rows = {"vocab_size": self.tensors[replaced[0]].shape[0]} if replaced else {}
        return {**rows, **({"tie_word_embeddings": False} if self.heads else {})}

    def rows(self, name: str) -> Rows:
        """Return a tensor of the adapted model. Raises CheckpointError where a file cannot be read."""
        from merging.checkpoints.adapters.adapter_rows import LowRankRows

        key = self.whole.get(name)
        rows = self.base.rows(self.heads.get(name, name)) if key is None else self.adapter.rows(key)
        product = self.products.get(name)
        if product is not None:
            a, b = (self.adapter.rows(key)[slice(None)] for key in (product.pair.a, product.pair.b))
            left, right = (a.T, b.T) if product.transposed else (b, a)
            rows = LowRankRows(rows, left, right, product.scaling)
        change = self.changes.get(name)
        return rows if change is None else change.apply(rows, self.adapter)

    def close(self) -> None:
        """Let go of both."""
        self.base.close()
        self.adapter.close()


def adapt(
    names: tuple[str, str],
    base: Weights,
    ties: bool,
    adapter: Weights,
    config: Mapping[str, Any],
    config_file: Path,
    base_config: Mapping[str, Any],
) -> AdaptedWeights:
    """Lay an adapter over a base. names: of the two, for messages; ties: whether the base ties its output head.

    config: adapter_config.json; base_config: config.json. Raises CheckpointError for keys that are not understood, and
    where names or shapes do not fit the base.
    """
    keys = AdapterKeys.sort(names[1], adapter.tensors)
    fit = _Fit(base, adapter, ties, config, names[1])
    whole = fit.whole(keys.whole)
    fused = fit.fused(keys.pairs, base_config)
    products = fit.products({name: pair for name, pair in keys.pairs.items() if pair not in fit.fused_pairs})
    changes = {**fused, **fit.dora(keys.magnitudes, products), **fit.biases(keys.biases, products)}
    tokens = fit.tokens(keys.tokens)
    fit.check_tied({*whole, *products, *changes}, {*tokens})
    changes |= tokens
    trained = config.get("base_model_name_or_path")
    if fit.problems:
        more = f" (and {len(fit.problems) - 1} more)" if len(fit.problems) > 1 else ""
        said = f"; it was trained on {trained}" if trained else ""
        raise CheckpointError(f"Adapter {names[1]} does not fit {names[0]}: {fit.problems[0]}{more}{said}.")
    if not (products or whole or changes):
        raise CheckpointError(
            f"Adapter {names[1]} changes no tensor of {names[0]}: its weights file holds no factors, biases or whole "
            "tensors; save it again after training."
        )
    return AdaptedWeights(base, adapter, products, whole, fit.heads, config_file, trained, changes)


class _Fit:
    """Finds the base's tensors that an adapter's belong to, and collects what does not fit."""

    def __init__(self, base: Weights, adapter: Weights, ties: bool, config: Mapping[str, Any], label: str) -> None:
        self._base, self._adapter, self._ties, self._config, self._label = base, adapter, ties, config, label
        self._embedding = main_embedding(base.tensors)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.heads: dict[str, str] = {}
        self.fused_pairs: list[Pair] = []
        self.problems: list[str] = []

    def whole(self, keys: Mapping[str, str]) -> dict[str, str]:
        """Return {stored name: key} of the tensors that replace the base's. A vocabulary may have other rows.

        A base that ties its head has one table for both: where an adapter has the head that it was trained on and no
        embedding, the embedding takes its rows, so that new tokens have one.
        """
        replaced = {}
        for name, key in keys.items():
            stored, theirs = self._target(name), self._adapter.tensors[key].shape
            if stored is None:
                continue
            ours = self._shapes[stored]
            grown = role_of(stored) is not None and ours[1:] == theirs[1:]
            if ours != theirs and not grown:
                self.problems.append(f"{stored} is {list(ours)} in the base and {list(theirs)} in the adapter")
            self._shapes[stored] = theirs
            replaced[stored] = key
        head, table = next((n for n in self.heads if ".base_layer." in replaced.get(n, "")), None), self._embedding
        if head is not None and table is not None and table not in replaced:
            grown = self._base.tensors[table].shape != self._shapes[head]
            replaced |= {table: replaced[head]} if grown else {}
            self._shapes[table] = self._shapes[head]
        return replaced

    def products(self, pairs: Mapping[str, Pair]) -> dict[str, Product]:
        """Return {stored name: the product that is added to it}."""
        targets = {stored: pair for name, pair in pairs.items() if (stored := self._target(name))}
        ways = {stored: self._ways(stored, pair) for stored, pair in targets.items()}
        turned = self._config.get("fan_in_fan_out") or any(
            way == {True} and not targets[n].embedding for n, way in ways.items()
        )
        stored_turned = transposed_names({name: info.shape for name, info in self._base.tensors.items()})
        products = {}
        for stored, pair in targets.items():
            scaling = self._scaling(pair.module, self._adapter.tensors[pair.a].shape[0])
            either = len(ways[stored]) == 2 and (turned or stored in stored_turned)  # a square matrix does not tell
            products[stored] = Product(pair, scaling, ways[stored] == {True} or bool(either))
        return products

    def dora(self, magnitudes: Mapping[str, str], products: Mapping[str, Product]) -> dict[str, Change]:
        """Return {stored name: its rescaling} of DoRA."""
        from merging.checkpoints.adapters.adapter_rows import DoraRows, LowRankRows

        changes = {}
        if bool(magnitudes) != bool(self._config.get("use_dora")):
            what = "has magnitude vectors" if magnitudes else "has no magnitude vectors"
            self.problems.append(
                f"adapter_config.json states use_dora {bool(self._config.get('use_dora'))} and it {what}"
            )
        for name, key in magnitudes.items():
            stored = self._target(name)
            if stored is None:
                continue
            if stored not in products:
                self.problems.append(f"{key} has no factors A and B beside it")
                continue
            by_column, shape = products[stored].transposed, self._shapes[stored]
            if self._adapter.tensors[key].shape != (shape[1 if by_column else 0],):
                theirs = list(self._adapter.tensors[key].shape)
                self.problems.append(f"{key} is {theirs} and {stored} is {list(shape)}")

            def rescaled(rows: Rows, adapter: Weights, key: str = key, by_column: bool = by_column) -> Rows:
                assert isinstance(rows, LowRankRows)
                return DoraRows(rows, rows, adapter.rows(key)[slice(None)], by_column)

            changes[stored] = Change("DoRA", rescaled)
        return changes

    def biases(self, biases: Mapping[str, str], products: Mapping[str, Product]) -> dict[str, Change]:
        """Return {stored name of a bias: what lora_bias adds to it}."""
        from merging.checkpoints.adapters.adapter_rows import BiasRows

        changes = {}
        for name, key in biases.items():
            weight = find_stored(f"{name.removesuffix('bias')}weight", self._base.tensors)
            stored = find_stored(name, self._base.tensors)
            if stored is None or weight is None or weight not in products:
                self.problems.append(f"{key} is the bias of a module that has none in the base (lora_bias)")
                continue
            if self._base.tensors[stored].shape != self._adapter.tensors[key].shape:
                self.problems.append(f"{key} has another length than {stored}")
            scaling = products[weight].scaling

            def added(rows: Rows, adapter: Weights, key: str = key, scaling: float = scaling) -> Rows:
                return BiasRows(rows, adapter.rows(key)[slice(None)], scaling)

            changes[stored] = Change("a bias of B (lora_bias)", added)
        return changes

    def tokens(self, tokens: Mapping[str, str]) -> dict[str, Change]:
        """Return {stored name of a table: the rows that trainable_token_indices replaces}; a tied head follows it."""
        from merging.checkpoints.adapters.adapter_rows import TokenRows

        stated = self._config.get("trainable_token_indices")
        changes = {}
        for name, key in tokens.items():
            stored = self._target(name)
            if stored is None:
                continue
            by_module = stated if isinstance(stated, Mapping) else {"": stated}
            indices = next((by_module[m] for m in by_module if not m or f".{name}".endswith(f".{m}.weight")), None)
            shape, rows = self._shape(key), self._shapes[stored][0]
            numbers = [i for i in indices if isinstance(i, int)] if isinstance(indices, list) else []
            if (len(numbers), *self._shapes[stored][1:]) != shape or numbers != indices:
                self.problems.append(f"trainable_token_indices does not name the {shape[0]} rows of {key}")
                continue
            outside = [i for i in numbers if not 0 <= i < rows]
            if outside:
                self.problems.append(f"trainable_token_indices has {outside[0]}, {stored} {rows} rows")
            replaced = {row: at for at, row in enumerate(numbers)}

            def filled(rows: Rows, adapter: Weights, key: str = key, replaced: dict[int, int] = replaced) -> Rows:
                return TokenRows(rows, adapter.rows(key)[slice(None)], replaced)

            changes[stored] = Change("trained rows of single tokens", filled)
        return changes

    def fused(self, pairs: Mapping[str, Pair], base_config: Mapping[str, Any]) -> dict[str, Change]:
        """Return {stored name: what factors of fused experts (target_parameters) add to it}."""
        stated = [t.rpartition(".") for t in self._config.get("target_parameters") or () if isinstance(t, str)]
        targets = [(owner, leaf) for owner, _, leaf in stated if leaf != "weight"]
        modules: dict[str, list[Pair]] = {}
        for pair in pairs.values():
            module = pair.module.replace(".base_layer", "")
            if any(f".{module}".endswith(f".{owner}") for owner, _ in targets):
                modules.setdefault(module, []).append(pair)
        changes: dict[str, Change] = {}
        for module, listed in modules.items():
            self.fused_pairs += listed
            leaves = sorted({leaf for owner, leaf in targets if f".{module}".endswith(f".{owner}")})
            for pair, parameter, way in self._assigned(module, listed, leaves, base_config):
                changes |= self._fused_changes(pair, parameter, way)
        return changes

    def _assigned(
        self, module: str, pairs: list[Pair], leaves: list[str], base_config: Mapping[str, Any]
    ) -> list[tuple[Pair, FusedParameter, bool]]:
        """Return which pair belongs to which parameter of a module, by shapes; empty, with a problem, where unclear."""
        shapes = {name: info.shape for name, info in self._base.tensors.items()}
        parameters = [fused_parameter(f"{module}.{leaf}", shapes, base_config) for leaf in leaves]
        known = [parameter for parameter in parameters if parameter is not None]
        if len(known) != len(leaves) or len(pairs) != len(leaves):
            lacking = [f"{module}.{leaf}" for leaf, one in zip(leaves, parameters, strict=True) if one is None]
            self.problems.append(f"the base has no stacked experts {', '.join(lacking) or module}")
            return []
        version = self._config.get("peft_version")
        inputs_first = _inputs_first(known, text_config_of(base_config).get("hidden_size"))
        choices = []
        for order in permutations(pairs):
            ways = [
                runs_over_axis_1(parameter, self._shape(pair.a), self._shape(pair.b), version, inputs_first)
                for pair, parameter in zip(order, known, strict=True)
            ]
            if None not in ways:
                choices.append(list(zip(order, known, [bool(way) for way in ways], strict=True)))
        if len(choices) != 1:
            what = "fit it in no way" if not choices else "fit it in several ways"
            self.problems.append(f"the factors of {module} (target_parameters {', '.join(leaves)}) {what}")
            return []
        return choices[0]

    def _fused_changes(self, pair: Pair, parameter: FusedParameter, over_axis_1: bool) -> dict[str, Change]:
        from merging.checkpoints.adapters.adapter_rows import ExpertRows, LowRankRows

        experts = parameter.shape[0]
        scaling = self._scaling(pair.module.replace(".base_layer", ""), self._shape(pair.a)[0] // experts)
        changes = {}
        for stored, (expert, first, last) in parameter.stored.items():
            self._shapes[stored] = self._base.tensors[stored].shape

            def added(
                rows: Rows, adapter: Weights, expert: int | None = expert, first: int = first, last: int = last
            ) -> Rows:
                a, b = (adapter.rows(key)[slice(None)] for key in (pair.a, pair.b))
                left, right = expert_factors(a, b, experts, over_axis_1)
                if expert is None:
                    return ExpertRows(rows, left, right, scaling)
                return LowRankRows(rows, left[expert, first:last], right[expert], scaling)

            changes[stored] = Change("factors of fused experts (target_parameters)", added)
        return changes

    def check_tied(self, changed: set[str], tokens: set[str]) -> None:
        """Refuse a change of a tied table in one of its two places alone; trained rows of tokens change both."""
        if self._ties and self._embedding in changed and not self.heads:
            self.problems.append(f"it changes {self._embedding}, which the base has for its output head too")
        if self.heads and self._embedding in tokens:
            self.problems.append(f"it trains single rows of {self._embedding} and unties the output head")

    def _shape(self, key: str) -> tuple[int, ...]:
        return self._adapter.tensors[key].shape

    def _scaling(self, module: str, stored_rank: int) -> float:
        """Return alpha / r of a module; a rank other than that of its tensors is a problem."""
        rank = pattern_value(self._label, self._config, "rank_pattern", module, self._config["r"])
        alpha = pattern_value(self._label, self._config, "alpha_pattern", module, self._config["lora_alpha"])
        if rank != stored_rank:
            self.problems.append(f"its config gives {module} rank {rank} and its tensors have {stored_rank}")
        return float(alpha / math.sqrt(rank) if self._config.get("use_rslora") else alpha / rank)

    def _target(self, name: str) -> str | None:
        """Return the stored name of a tensor of the model; for an output head that the base ties, its own name."""
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
        """Return how B A fits a tensor: as it is (False), turned (True: stored (in, out), or an embedding), or both."""
        a, b = self._shape(pair.a), self._shape(pair.b)
        shape = self._shapes[stored]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            self.problems.append(f"{pair.a} {list(a)} and {pair.b} {list(b)} are not the two factors of a matrix")
            return set()
        ways = {way for way, product in ((False, (b[0], a[1])), (True, (a[1], b[0]))) if product == shape}
        ways &= {True} if pair.embedding else {False, True}
        if not ways:
            self.problems.append(f"{stored} is {list(shape)} in the base and B A of the adapter {[b[0], a[1]]}")
        return ways


def _inputs_first(parameters: list[FusedParameter], hidden_size: object) -> bool | None:
    """Return whether fused experts are stored (experts, in, out): by the gate's side of the hidden size."""
    if any(expert is not None for parameter in parameters for expert, _, _ in parameter.stored.values()):
        return False  # transformers stacks experts that are stored apart as (experts, out, in)
    for parameter in parameters:
        sides = parameter.shape[1:]
        if "gate" in parameter.name.rpartition(".")[2] and hidden_size in sides and sides[0] != sides[1]:
            return bool(sides[0] == hidden_size)
    return None
