"""Figures of an importance file: concentration over channels, per layer and kind of module."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING

from aim.relaxer import ZERO, Rule, is_expert
from common.files.json_values import JsonObject
from merging.checkpoints.tensor_names import in_order, layer_of

if TYPE_CHECKING:
    from torch import Tensor

    from aim.importance import Importance

TOP = 0.01
"""The part of the channels whose share is told: at least one channel."""
TIED = "it is the embedding too, which --relax_tied relaxes"
Place = tuple[str, int | None, str]


@dataclass(frozen=True)
class Row:
    """The figures of the modules of one kind in one layer that get the same input, or of experts of one kind together.

    layer: None outside of layers; tensors: how many weights; experts: how many of them there are (0: no experts);
    channels: of each; tokens: None where not counted. Of the activations a, and s = a / max(a): top_share is what the
    largest hundredth has of the sum, maximum that of a, mean that of s, entropy that of the shares in units of log
    channels, stability the rank correlation of two halves; None where not defined. Of experts: means, the largest
    maximum, the lowest stability, the fewest tokens.
    """

    stack: str
    layer: int | None
    kind: str
    tensors: int
    experts: int
    channels: int
    tokens: int | None
    top_share: float
    maximum: float
    mean: float
    entropy: float | None
    stability: float | None


@dataclass(frozen=True)
class KindRow:
    """The figures of the modules of one kind over all layers: medians, the largest maximum, the lowest stability.

    layers: their number; None outside of layers. The others are those of `Row`.
    """

    kind: str
    layers: int | None
    channels: float
    top_share: float
    mean: float
    maximum: float
    entropy: float | None
    stability: float | None


@dataclass(frozen=True)
class Summary:
    """Rows by layer and kind, and what is not relaxed: {reason: tensors}, and experts by {tensor: how many}."""

    rows: tuple[Row, ...]
    not_relaxed: Mapping[str, tuple[str, ...]]
    few_tokens: Mapping[str, int]

    def as_json(self) -> JsonObject:
        """Return everything in JSON's types."""
        rows = [asdict(row) for row in self.rows]
        return {"rows": rows, "not_relaxed": dict(self.not_relaxed), "experts_not_relaxed": dict(self.few_tokens)}


@dataclass(frozen=True)
class ChannelVector:
    """One activation vector (channels,) fp64 with its tokens and stability; place: stack, layer and kind."""

    place: Place
    is_expert: bool
    name: str
    values: Tensor
    tokens: int | None
    stability: float | None


@dataclass(frozen=True)
class InputGroup:
    """Tensors of a layer that get the same input (query, key and value); vectors: one, or one for each expert."""

    stack: str
    layer: int | None
    kind: str
    tensors: tuple[str, ...]
    vectors: tuple[ChannelVector, ...]


def summarise(importance: Importance, rule: Rule | None = None) -> Summary:
    """Return the figures of every tensor that the rule lets be relaxed, and the reasons of the others."""
    groups, not_relaxed, few_tokens = input_groups(importance, rule)
    return Summary(rows=tuple(map(_row, groups)), not_relaxed=not_relaxed, few_tokens=few_tokens)


def input_groups(
    importance: Importance, rule: Rule | None = None
) -> tuple[list[InputGroup], dict[str, tuple[str, ...]], dict[str, int]]:
    """Return the tensors that the rule lets be relaxed, grouped by layer and input, in the order of the layers.

    Returns:
        The groups; {reason: tensors that are not relaxed}; {tensor: number of its experts that are not relaxed}.
    """
    rule = rule or Rule()
    reasons: dict[str, list[str]] = {}
    few: dict[str, int] = {}
    by_place: dict[Place, list[ChannelVector]] = {}
    for name in sorted({*importance.activations, *importance.unmeasured}, key=_in_order):
        tied = TIED if name in importance.heads.values() and not rule.relax_tied else None
        reason = importance.unmeasured.get(name) or rule.verdict(name) or tied
        vectors = [] if reason else list(_vectors(importance, name))
        enough = [v for v in vectors if v.tokens is None or not v.is_expert or v.tokens >= rule.min_tokens]
        active = [v for v in enough if float(v.values.max()) > 0]
        if not reason and not active:
            reason = ZERO if enough else rule.too_few
        if reason:
            reasons.setdefault(reason, []).append(name)
            continue
        if len(enough) < len(vectors):
            few[name] = len(vectors) - len(enough)
        by_place.setdefault(active[0].place, []).extend(active)
    return list(_same_inputs(by_place)), {reason: tuple(names) for reason, names in reasons.items()}, few


def _vectors(importance: Importance, name: str) -> Iterable[ChannelVector]:
    """The vectors of a tensor, one for each expert of a stack."""
    match = layer_of(name)
    stack, layer, rest = match or ("", None, name)
    kind = re.sub(r"\.\d+(?=\.|$)", ".*", rest.strip(".")).removesuffix(".weight")
    values, tokens = importance.activations[name], importance.tokens.get(name)
    stability = importance.stability.get(name)
    for i, one in enumerate(values if values.dim() == 2 else values[None]):
        yield ChannelVector(
            (stack, layer, kind),
            isinstance(tokens, list) or is_expert(name),
            name,
            one.double(),
            tokens[i] if isinstance(tokens, list) else tokens,
            stability[i] if isinstance(stability, list) else stability,
        )


def _same_inputs(by_place: Mapping[Place, Sequence[ChannelVector]]) -> Iterable[InputGroup]:
    """Put the kinds of a layer that get the same input into one group; stacks and layers in order."""
    same: list[list[Place]] = []
    for place in by_place:
        equal_stack = next((s for s in same if s[0][:2] == place[:2] and _equal(by_place[s[0]], by_place[place])), None)
        if equal_stack is None:
            same.append([place])
        else:
            equal_stack.append(place)
    for places in same:
        stack, layer, _ = places[0]
        names = dict.fromkeys(vector.name for place in places for vector in by_place[place])
        yield InputGroup(
            stack, layer, together([kind for *_, kind in places]), tuple(names), tuple(by_place[places[0]])
        )


def _equal(one: Sequence[ChannelVector], other: Sequence[ChannelVector]) -> bool:
    import torch

    return len(one) == len(other) and all(torch.equal(a.values, b.values) for a, b in zip(one, other, strict=True))


def _row(group: InputGroup) -> Row:
    vectors = group.vectors
    entropies = [h for v in vectors if (h := entropy(v.values)) is not None]
    stabilities = [v.stability for v in vectors if v.stability is not None]
    tokens = [v.tokens for v in vectors if v.tokens is not None]
    return Row(
        stack=group.stack,
        layer=group.layer,
        kind=group.kind,
        tensors=len(group.tensors),
        experts=len(vectors) if vectors[0].is_expert else 0,
        channels=len(vectors[0].values),
        tokens=min(tokens) if tokens else None,
        top_share=_mean([top_share(v.values) for v in vectors]),
        maximum=max(float(v.values.max()) for v in vectors),
        mean=_mean([float(v.values.mean() / v.values.max()) for v in vectors]),
        entropy=_mean(entropies) if entropies else None,
        stability=min(stabilities) if stabilities else None,
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def top_share(a: Tensor) -> float:
    """Return the share of the sum of a (channels,) that its largest hundredth holds, at least one channel."""
    count = max(1, round(TOP * len(a)))
    return float(a.topk(count).values.sum() / a.sum())


def entropy(a: Tensor) -> float | None:
    """Return the entropy of the shares of a (channels,), in units of log channels; None for a single channel."""
    if len(a) < 2:
        return None
    p = a / a.sum()
    return -float((p * p.where(p > 0, 1.0).log()).sum()) / math.log(len(a))


def together(kinds: Sequence[str]) -> str:
    """Name several kinds as one: self_attn.q_proj and self_attn.k_proj are self_attn.{q,k}_proj."""
    by_parent: dict[str, list[str]] = {}
    for kind in kinds:
        parent, dot, leaf = kind.rpartition(".")
        by_parent.setdefault(parent + dot, []).append(leaf)
    return ", ".join(parent + _braced(names) for parent, names in by_parent.items())


def _braced(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    endings = {"".join(name.rpartition("_")[1:]) if "_" in name else "" for name in names}
    ending = endings.pop() if len(endings) == 1 else ""
    return "{" + ",".join(name.removesuffix(ending) for name in names) + "}" + ending


def _in_order(name: str) -> tuple[bool, list[tuple[int, str]]]:
    """Sorts by layer, and what is in no layer behind them."""
    return layer_of(name) is None, in_order(name)


def by_kind(rows: Sequence[Row]) -> list[KindRow]:
    """Return the medians over the layers for each kind, the largest maximum and the lowest stability."""
    kinds: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row.stack, row.kind), []).append(row)
    return [
        KindRow(
            kind=_where(stack, None) + kind,
            layers=len(layers) if layers[0].layer is not None else None,
            channels=median(row.channels for row in layers),
            top_share=median(row.top_share for row in layers),
            mean=median(row.mean for row in layers),
            maximum=max(row.maximum for row in layers),
            entropy=median(entropies)
            if (entropies := [row.entropy for row in layers if row.entropy is not None])
            else None,
            stability=min((row.stability for row in layers if row.stability is not None), default=None),
        )
        for (stack, kind), layers in kinds.items()
    ]


def _where(stack: str, layer: int | None) -> str:
    return f"{stack}{'*' if layer is None else layer}." if stack else ""
