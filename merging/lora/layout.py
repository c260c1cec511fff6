"""Layout of an adapter made of adapters: factors side by side, and the tensors that are whole in one of them.

    A = [A_1; ...; A_n] (sum r_t, in),   B = [c_1 s_1 / s B_1, ..., c_n s_n / s B_n] (out, sum r_t),   scaling s

s is the largest |c_t s_t| where the coefficients are known beforehand, so that adapters that count alike keep the bytes
of their factors; 1 where they follow from the adapters. One adapter that counts wholly is laid out as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.errors import CheckpointError, UsageError
from merging.checkpoints.adapters.adapter import Product
from merging.checkpoints.adapters.adapter_keys import PREFIX
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.storage import Weights
from merging.lora.algebra import PLAIN, check_parameters, coefficients
from merging.lora.whole import adapted, is_whole, name_in_model, own_key, stored_dtypes, without_products
from merging.plan.slices import Inputs
from merging.plan.types import Plan, TensorPlan


@dataclass(frozen=True, eq=False)
class Term:
    """One adapter's factors of a tensor; model: its position among the merged ones."""

    adapter: Weights
    product: Product
    model: int

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.adapter.tensors[self.product.pair.a].shape[0]


@dataclass(frozen=True, eq=False)
class Sum:
    """A tensor's factors in the result. name: of the tensor in the base; models: how many are merged there."""

    name: str
    terms: tuple[Term, ...]
    scaling: float
    parameters: Mapping[str, Any]
    models: int

    @property
    def module(self) -> str:
        """The module's name in PEFT."""
        return self.terms[0].product.pair.module

    @property
    def embedding(self) -> bool:
        """True for a tensor that is looked up by row, so that no activation enters it."""
        return self.terms[0].product.pair.embedding

    @property
    def rank(self) -> int:
        """Rank of the result."""
        return sum(term.rank for term in self.terms)


@dataclass(frozen=True, eq=False)
class Entry:
    """A tensor of the result by its key. side: "A" or "B" of a sum, "" for a whole tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    origin: Sum | TensorPlan
    side: str = ""


@dataclass(frozen=True)
class AdapterPlan:
    """Every tensor of an adapter that is to be written.

    unchanged: one adapter is laid out as it is, but for what relaxation does.
    """

    method: str
    tensors: tuple[Entry, ...]
    unchanged: bool
    notes: tuple[str, ...] = ()

    @property
    def sums(self) -> list[Sum]:
        """The pairs of factors, in order."""
        return [e.origin for e in self.tensors if isinstance(e.origin, Sum) and e.side == "A"]

    @property
    def wholes(self) -> dict[str, TensorPlan]:
        """{key: plan} of the tensors that are stored whole."""
        return {e.name: e.origin for e in self.tensors if isinstance(e.origin, TensorPlan)}

    @property
    def names(self) -> list[str]:
        """The names in the base of the tensors that the adapter changes."""
        return list(dict.fromkeys(e.origin.name for e in self.tensors))


def lay_out(inputs: Inputs, model: Plan, method: str, dtype: str | None) -> AdapterPlan:
    """Plan the adapter that a merge of adapted checkpoints gives.

    Args:
        inputs: the adapted checkpoints and their base.
        model: the plan of the same merge as a whole model.
        method: its name.
        dtype: of every tensor; None keeps that of the adapters (the wider one where they differ).

    Raises:
        UsageError: for parameters whose result is no adapter.
        CheckpointError: where the result would hold no factors.
    """
    merged = [tensor for tensor in model.tensors if tensor.is_merged]
    for checkpoint in inputs.models:
        if changes := adapted(checkpoint).changes:
            name, change = next(iter(changes.items()))
            raise UsageError(
                f"--save_as adapter: {checkpoint.name} has {change.kind} on {name}, which a merged LoRA adapter cannot "
                "hold; leave --save_as adapter out to save the whole model."
            )
    for tensor in merged:
        check_parameters(method, tensor.parameters)
    unchanged = _unchanged(inputs.models, merged, method)
    entries: list[Entry] = []
    alongside: list[str] = []
    for tensor in merged:
        sum_ = _sum(tensor, method, unchanged)
        if unchanged:
            entries += _factors(sum_, dtype) if sum_ else []
            if key := own_key(tensor):
                entries.append(_whole(key, without_products(tensor), dtype))
        elif is_whole(tensor):
            alongside += [tensor.name] if sum_ else []
            entries.append(_whole(PREFIX + name_in_model(tensor), tensor, dtype))
        elif sum_:
            entries += _factors(sum_, dtype)
    layout = AdapterPlan(method, tuple(_with_wrapped_biases(entries)), unchanged)
    if not layout.sums:
        raise CheckpointError(
            "Nothing of the result is a product of two small matrices, so that it is no adapter; leave --save_as "
            "adapter out to save the whole model."
        )
    notes = [f"Stored whole, since one of the adapters has it whole: {_listed(alongside)}."] if alongside else []
    return replace(layout, notes=(*notes, *_left_out(inputs, merged)))


def _left_out(inputs: Inputs, merged: Sequence[TensorPlan]) -> Iterator[str]:
    """The sentences on what adapters change and the result does not: parts that modules leave out, dropped copies."""
    counted = {(source.checkpoint.name, source.name) for tensor in merged for source in tensor.models}
    for model in inputs.models:
        changed = {**adapted(model).products, **adapted(model).whole}
        lost = [name for name in changed if (model.name, name) not in counted]
        if lost:
            yield f"{model.name}: left out {_listed(lost)}."


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])} ({len(names)} tensors)" if len(names) > 3 else ", ".join(names)


def _unchanged(models: Sequence[Checkpoint], merged: Sequence[TensorPlan], method: str) -> bool:
    """Return True where the result is the only adapter: all of it, times 1."""
    if len(models) > 1 or method not in PLAIN:
        return False
    weights = adapted(models[0])
    counted = {tensor.models[0].name for tensor in merged}
    alone = all(coefficients(method, t.name, t.parameters, 1) == [1.0] for t in merged)
    return alone and {*weights.products, *weights.whole} <= counted


def _terms(tensor: TensorPlan) -> tuple[Term, ...]:
    terms = []
    for position, source in enumerate(tensor.models):
        weights = adapted(source.checkpoint)
        if source.name in weights.products:
            terms.append(Term(weights.adapter, weights.products[source.name], position))
    return tuple(terms)


def _sum(tensor: TensorPlan, method: str, unchanged: bool) -> Sum | None:
    """The factors of a tensor, None where no adapter has any."""
    terms, count = _terms(tensor), len(tensor.models)
    if not terms:
        return None
    scaling = terms[0].product.scaling
    if not unchanged:
        factors = coefficients(method, tensor.name, tensor.parameters, count) if method in PLAIN else None
        sizes = [abs(factors[t.model] * t.product.scaling) for t in terms] if factors else [1.0]
        scaling = max(sizes) or 1.0
    return Sum(tensor.name, terms, scaling, tensor.parameters, count)


def _factors(sum_: Sum, dtype: str | None) -> list[Entry]:
    """A and B of a sum."""
    infos = [(t.adapter.tensors[t.product.pair.a], t.adapter.tensors[t.product.pair.b]) for t in sum_.terms]
    a = (sum_.rank, infos[0][0].shape[1])
    b = (infos[0][1].shape[0], sum_.rank)
    stem = f"{PREFIX}{sum_.module}.lora_"
    names = (f"{stem}embedding_A", f"{stem}embedding_B") if sum_.embedding else (f"{stem}A.weight", f"{stem}B.weight")
    return [
        Entry(names[side], shape, dtype or widest(pair[side].dtype for pair in infos), sum_, "AB"[side])
        for side, shape in enumerate((a, b))
    ]


def _whole(key: str, tensor: TensorPlan, dtype: str | None) -> Entry:
    """A tensor that is stored whole, in the plan's dtype."""
    kind = dtype or widest(stored_dtypes(tensor))
    return Entry(key, tensor.shape, kind, replace(tensor, dtype=kind))


def _with_wrapped_biases(entries: Sequence[Entry]) -> list[Entry]:
    """The entries with the key that PEFT has for a bias beside factors: there, its module is wrapped."""
    wrapped = {PREFIX + e.origin.module for e in entries if isinstance(e.origin, Sum)}
    return [
        replace(e, name=f"{e.name.removesuffix('.bias')}.base_layer.bias")
        if e.name.removesuffix(".bias") in wrapped
        else e
        for e in entries
    ]


def widest(dtypes: Iterable[str]) -> str:
    """Return the dtype that holds values of all of these: the one there is, else fp32 (or fp64)."""
    names = set(dtypes)
    return names.pop() if len(names) == 1 else "float64" if "float64" in names else "float32"
