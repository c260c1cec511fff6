"""LoRA adapters, added to the base's tensors while they are read. Hu et al. 2021, arXiv:2106.09685.

    theta = theta_0 + scaling * B A        B (out, r), A (r, in)
    scaling = alpha / r, or alpha / sqrt(r) with use_rslora (Kalajdzievski 2023, arXiv:2312.03732)

DoRA, lora_bias, trainable_token_indices and target_parameters (fused experts) are computed as PEFT merges them. No
second checkpoint is written to memory or disk. Other settings of PEFT's adapter_config.json are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import CheckpointError
from common.files.json_values import JsonObject, JsonValue
from merging.checkpoints.adapters.adapter_config import pattern_value
from merging.checkpoints.adapters.adapter_keys import AdapterKeys, Pair, find_stored
from merging.checkpoints.adapters.expert_factors import (
    FusedParameter,
    expert_factors,
    fused_parameter,
    runs_over_axis_1,
)
from merging.checkpoints.model_config import text_config_of
from merging.checkpoints.storage import FLOATS, TensorInfo, Weights
from merging.checkpoints.tensor_names import main_embedding, role_of, transposed_names

if TYPE_CHECKING:
    from merging.checkpoints.storage import Rows


@dataclass(frozen=True)
class Product:
    """LoRA product that is added to one tensor.

    Attributes:
        pair: The adapter's A and B.
        scaling: Factor of B A.
        transposed: The tensor is stored (in, out).
    """

    pair: Pair
    scaling: float
    transposed: bool


@dataclass(frozen=True)
class Change:
    """Change of one tensor by an adapter, other than an added product.

    Attributes:
        kind: Name of the change in messages.
        apply: Function of the tensor's rows so far and the adapter's weights; returns the changed rows.
    """

    kind: str
    apply: Callable[[Rows, Weights], Rows]


class AdaptedWeights:
    """Tensors of a base with an adapter applied.

    Attributes:
        base, adapter: Weights of the two.
        products: {tensor name: LoRA product}.
        whole: {tensor name: key of the adapter's tensor that replaces it}.
        changes: {tensor name: DoRA, factors of fused experts, bias, or trained rows}.
        heads: {output head that the base ties: its input embedding}, for adapters that untie it.
        config_file: The adapter's adapter_config.json.
        trained_on: The base that the adapter's config names.
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
        """Files of the base and the adapter, and the adapter's config, which holds the scaling."""
        return tuple(sorted({*self.base.files, *self.adapter.files, self.config_file}))

    @property
    def config_changes(self) -> JsonObject:
        """Changes of the base's config: an untied head, another vocab_size."""
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
            left_factor, right_factor = (a.T, b.T) if product.transposed else (b, a)
            rows = LowRankRows(rows, left_factor, right_factor, product.scaling)
        change = self.changes.get(name)
        return rows if change is None else change.apply(rows, self.adapter)

    def close(self) -> None:
        """Release open files and memory of both."""
        self.base.close()
        self.adapter.close()


def adapt(
    names: tuple[str, str],
    base: Weights,
    ties: bool,
    adapter: Weights,
    config: Mapping[str, JsonValue],
    config_file: Path,
    base_config: Mapping[str, JsonValue],
) -> AdaptedWeights:
    """Return the weights of a base with an adapter applied.

    Args:
        names: Names of base and adapter in messages.
        base: The base's weights.
        ties: True where the base ties its output head to the input embedding.
        adapter: The adapter's weights.
        config: Content of adapter_config.json.
        config_file: Path of adapter_config.json.
        base_config: Content of the base's config.json.

    Raises:
        CheckpointError: A key of the adapter is unknown, or its names or shapes do not fit the base.
    """
    keys = AdapterKeys.sort(names[1], adapter.tensors)
    fit = _Fit(base, adapter, ties, config, names[1])
    whole = fit.whole(keys.whole)
    expert_changes = fit.expert_factors(keys.pairs, base_config)
    products = fit.products({name: pair for name, pair in keys.pairs.items() if pair not in fit.expert_pairs})
    changes = {**expert_changes, **fit.dora(keys.magnitudes, products), **fit.biases(keys.biases, products)}
    tokens = fit.tokens(keys.tokens)
    fit.check_tied({*whole, *products, *changes}, {*tokens})
    changes |= tokens
    trained = config.get("base_model_name_or_path")
    if fit.problems:
        more = f" (and {len(fit.problems) - 1} more)" if len(fit.problems) > 1 else ""
        trained_on = f"; it was trained on {trained}" if trained else ""
        raise CheckpointError(f"Adapter {names[1]} does not fit {names[0]}: {fit.problems[0]}{more}{trained_on}.")
    if not (products or whole or changes):
        raise CheckpointError(
            f"Adapter {names[1]} changes no tensor of {names[0]}: its weights file holds no factors, biases or whole "
            "tensors; save it again after training."
        )
    return AdaptedWeights(base, adapter, products, whole, fit.heads, config_file, trained, changes)


class _Fit:
    """Match of an adapter's tensors to the base's; problems are collected and reported together."""

    def __init__(
        self, base: Weights, adapter: Weights, ties: bool, config: Mapping[str, JsonValue], label: str
    ) -> None:
        self._base, self._adapter, self._ties, self._config, self._label = base, adapter, ties, config, label
        self._embedding = main_embedding(base.tensors)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.heads: dict[str, str] = {}
        self.expert_pairs: list[Pair] = []
        self.problems: list[str] = []

    def whole(self, keys: Mapping[str, str]) -> dict[str, str]:
        """Return {stored name: key} of the tensors that replace the base's; a vocabulary may have more rows.

        Where the base ties its head and the adapter has a resized head but no embedding, the embedding takes the head's
        rows, so that new tokens have one.
        """
        replaced = {}
        for name, key in keys.items():
            stored, shape = self._target(name), self._adapter.tensors[key].shape
            if stored is None:
                continue
            base_shape = self._shapes[stored]
            grown = role_of(stored) is not None and base_shape[1:] == shape[1:]
            if base_shape != shape and not grown:
                self.problems.append(f"{stored} is {list(base_shape)} in the base and {list(shape)} in the adapter")
            self._shapes[stored] = shape
            replaced[stored] = key
        head, table = next((n for n in self.heads if ".base_layer." in replaced.get(n, "")), None), self._embedding
        if head is not None and table is not None and table not in replaced:
            grown = self._base.tensors[table].shape != self._shapes[head]
            replaced |= {table: replaced[head]} if grown else {}
            self._shapes[table] = self._shapes[head]
        return replaced

    def products(self, pairs: Mapping[str, Pair]) -> dict[str, Product]:
        """Return {stored name: LoRA product}."""
        targets = {stored: pair for name, pair in pairs.items() if (stored := self._target(name))}
        orientations = {stored: self._orientations(stored, pair) for stored, pair in targets.items()}
        is_transposed = self._config.get("fan_in_fan_out") or any(
            orientation == {True} and not targets[n].embedding for n, orientation in orientations.items()
        )
        stored_transposed = transposed_names({name: info.shape for name, info in self._base.tensors.items()})
        products = {}
        for stored, pair in targets.items():
            scaling = self._scaling(pair.module, self._adapter.tensors[pair.a].shape[0])
            is_transposed_square = len(orientations[stored]) == 2 and (
                is_transposed or stored in stored_transposed
            )  # shapes alone do not decide for a square matrix
            products[stored] = Product(pair, scaling, orientations[stored] == {True} or bool(is_transposed_square))
        return products

    def dora(self, magnitudes: Mapping[str, str], products: Mapping[str, Product]) -> dict[str, Change]:
        """Return {stored name: DoRA rescaling}."""
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
                self.problems.append(f"{key} has no factors A and B")
                continue
            by_column, shape = products[stored].transposed, self._shapes[stored]
            if self._adapter.tensors[key].shape != (shape[1 if by_column else 0],):
                magnitude_shape = list(self._adapter.tensors[key].shape)
                self.problems.append(f"{key} is {magnitude_shape} and {stored} is {list(shape)}")

            def rescaled(rows: Rows, adapter: Weights, key: str = key, by_column: bool = by_column) -> Rows:
                assert isinstance(rows, LowRankRows)
                return DoraRows(rows, rows, adapter.rows(key)[slice(None)], by_column)

            changes[stored] = Change("DoRA", rescaled)
        return changes

    def biases(self, biases: Mapping[str, str], products: Mapping[str, Product]) -> dict[str, Change]:
        """Return {stored name of a bias: bias added by lora_bias}."""
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
        """Return {stored name of an embedding: rows that trainable_token_indices replaces}; a tied head follows."""
        from merging.checkpoints.adapters.adapter_rows import TokenRows

        indices_setting = self._config.get("trainable_token_indices")
        changes = {}
        for name, key in tokens.items():
            stored = self._target(name)
            if stored is None:
                continue
            by_module = indices_setting if isinstance(indices_setting, Mapping) else {"": indices_setting}
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

    def expert_factors(self, pairs: Mapping[str, Pair], base_config: Mapping[str, JsonValue]) -> dict[str, Change]:
        """Return {stored name: change by factors of fused experts (target_parameters)}."""
        parts = [t.rpartition(".") for t in self._config.get("target_parameters") or () if isinstance(t, str)]
        targets = [(owner, leaf) for owner, _, leaf in parts if leaf != "weight"]
        modules: dict[str, list[Pair]] = {}
        for pair in pairs.values():
            module = pair.module.replace(".base_layer", "")
            if any(f".{module}".endswith(f".{owner}") for owner, _ in targets):
                modules.setdefault(module, []).append(pair)
        changes: dict[str, Change] = {}
        for module, listed in modules.items():
            self.expert_pairs += listed
            leaves = sorted({leaf for owner, leaf in targets if f".{module}".endswith(f".{owner}")})
            for pair, parameter, way in self._assigned(module, listed, leaves, base_config):
                changes |= self._fused_changes(pair, parameter, way)
        return changes

    def _assigned(
        self, module: str, pairs: list[Pair], leaves: list[str], base_config: Mapping[str, JsonValue]
    ) -> list[tuple[Pair, FusedParameter, bool]]:
        """Match the pairs of a module to its parameters by shapes; empty, with a problem, where that is ambiguous."""
        shapes = {name: info.shape for name, info in self._base.tensors.items()}
        parameters = [fused_parameter(f"{module}.{leaf}", shapes, base_config) for leaf in leaves]
        present = [parameter for parameter in parameters if parameter is not None]
        if len(present) != len(leaves) or len(pairs) != len(leaves):
            missing = [f"{module}.{leaf}" for leaf, one in zip(leaves, parameters, strict=True) if one is None]
            self.problems.append(f"the base has no stacked experts {', '.join(missing) or module}")
            return []
        version = self._config.get("peft_version")
        is_in_out = _is_in_out(present, text_config_of(base_config).get("hidden_size"))
        choices = []
        for order in permutations(pairs):
            ways = [
                runs_over_axis_1(parameter, self._shape(pair.a), self._shape(pair.b), version, is_in_out)
                for pair, parameter in zip(order, present, strict=True)
            ]
            if None not in ways:
                choices.append(list(zip(order, present, [bool(way) for way in ways], strict=True)))
        if len(choices) != 1:
            what = "do not fit it" if not choices else "fit it in several ways"
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
                left_factor, right_factor = expert_factors(a, b, experts, over_axis_1)
                if expert is None:
                    return ExpertRows(rows, left_factor, right_factor, scaling)
                return LowRankRows(rows, left_factor[expert, first:last], right_factor[expert], scaling)

            changes[stored] = Change("factors of fused experts (target_parameters)", added)
        return changes

    def check_tied(self, changed: set[str], tokens: set[str]) -> None:
        """Report a change of only one of two tied matrices; trained rows of tokens change both."""
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
        """Return the stored name of a tensor of the model; an output head that the base ties keeps its name."""
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

    def _orientations(self, stored: str, pair: Pair) -> set[bool]:
        """Return the orientations in which B A fits a tensor: False as it is, True transposed (see `Product`)."""
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


def _is_in_out(parameters: list[FusedParameter], hidden_size: object) -> bool | None:
    """Return True for experts stored (experts, in, out), by the gate's axis of the hidden size; None if unknown."""
    if any(expert is not None for parameter in parameters for expert, _, _ in parameter.stored.values()):
        return False  # transformers stacks separately stored experts as (experts, out, in)
    for parameter in parameters:
        sides = parameter.shape[1:]
        if "gate" in parameter.name.rpartition(".")[2] and hidden_size in sides and sides[0] != sides[1]:
            return bool(sides[0] == hidden_size)
    return None
