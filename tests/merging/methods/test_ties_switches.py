"""TIES's two switches, zero_sum and trim_scope, and the selection by rank that both stand on."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import merging.ops.selection as selection
from common.errors import CheckpointError, UsageError
from merging.methods.contract import load_method, select_arguments
from merging.ops.model_scope import ModelScope, model_scope, thresholds_in
from merging.ops.order_statistics import LOWER_BINS, halves_of, locate, lower_counts, upper_counts, value_of
from merging.ops.selection import select, top_threshold
from merging.ops.tensor_blocks import TensorGroup
from merging.pipeline import merge
from merging.plan.merge_plan import OutputConfig
from merging.recipe import make_recipe
from merging.recipe.method_registry import find_method
from tests.helpers.tiny import fine_tune, make_llama, weights

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
Models = Mapping[str, list[Tensor]]
"""Task vectors by tensor name; with a base of zero they are the models."""


def parameters_of(n: int, **changed: object) -> dict[str, object]:
    """TIES's parameters with their defaults, some changed."""
    return {key: p.for_models(changed.get(key, p.default), n) for key, p in find_method("ties").parameters.items()}


def groups_of(models: Models, block: int = 1 << 20) -> Iterator[TensorGroup]:
    """Every tensor over a base of zeros, in the order of the mapping."""
    for name, tensors in models.items():
        yield TensorGroup(name, torch.zeros_like(tensors[0]), tuple(tensors), CPU, block_elements=block)


def scope_of(groups: Callable[[], Iterator[TensorGroup]], parameters: Mapping[str, object]) -> ModelScope | None:
    """The thresholds over whole models."""
    return model_scope(groups, **select_arguments(model_scope, parameters))


def ties(models: Models, *, block: int = 1 << 20, scope_block: int | None = None, **changed: object) -> dict:
    """Merge all tensors as the loop does: the model statistics first, then one after the other."""
    n = len(next(iter(models.values())))
    parameters, functions = parameters_of(n, **changed), load_method("ties")
    scope = scope_of(lambda: groups_of(models, scope_block or block), parameters)
    known = {**parameters, "model_statistics": scope}
    given, merged = select_arguments(functions.merge_block, parameters), {}
    for group in groups_of(models, block):
        by_block = functions.tensor_statistics(group, **select_arguments(functions.tensor_statistics, known))
        merged[group.name] = torch.cat(
            [
                functions.merge_block(group.base_block(b), group.model_blocks(b), **given, **by_block.for_block(b))
                for b in group.blocks()
            ]
        )
    return merged


def one(tensors: list[Tensor], **changed: object) -> list[float]:
    """Merge a single tensor of density 1 by default."""
    return ties({"w": tensors}, **{"density": 1, **changed})["w"].tolist()


def some_models(n: int = 3, seed: int = 0, levels: float | None = None) -> dict[str, list[Tensor]]:
    """Task vectors of several shapes, not in name order and of different scales; `levels` rounds them to make ties."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b.weight": (30, 17), "a.weight": (41, 8), "c.norm": (55,), "a.bias": (7, 3, 5)}
    models = {
        name: [scale * torch.randn(shape, generator=generator) for _ in range(n)]
        for scale, (name, shape) in zip((1.0, 3.0, 0.2, 1.0), shapes.items(), strict=True)
    }
    return {k: [(t * levels).round() / levels for t in v] if levels else v for k, v in models.items()}


def flat(models: Mapping[str, Tensor] | Models, model: int | None = None) -> np.ndarray:
    """All tensors in name order, one after the other."""
    parts = [models[name] if model is None else models[name][model] for name in sorted(models)]
    return np.concatenate([p.double().numpy().ravel() for p in parts])


# zero_sum


def test_majority_by_hand() -> None:
    """Where task vectors cancel, the sign is that of most other entries: here + and then, all negated, -."""
    a, b = torch.tensor([1.0, 1, 0, -1]), torch.tensor([-1.0, 0, 0, 1])
    assert one([a, b]) == one([a, b], zero_sum="majority") == [1, 1, 0, 1]
    assert one([-a, -b], zero_sum="positive") == [1, -1, 0, 1]
    assert one([-a, -b], zero_sum="majority") == [-1, -1, 0, -1]


def test_without_a_majority_nothing_is_elected() -> None:
    """As many + as -: the majority's sign is 0, and entries that cancel get nothing, as in the authors' code."""
    a, b = torch.tensor([1.0, 1, -1]), torch.tensor([-1.0, 0, 0])
    assert one([a, b], zero_sum="majority") == [0, 1, -1]
    assert one([a, b], zero_sum="positive") == [1, 1, -1]


def test_the_majority_counts_signs_not_sizes() -> None:
    """Two small negative sums outvote a large positive one; weights act before the sums are taken."""
    a, b = torch.tensor([2.0, 100, -1, -1]), torch.tensor([-2.0, 0, 0, 0])
    assert one([a, b], zero_sum="majority") == [-2, 100, -1, -1]
    assert one([a, b], zero_sum="majority", weights=[1, 0.5])[0] == 2  # no longer cancels


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_majority_is_odd(scope: str) -> None:
    """Negating every task vector negates the result, cancelled entries included; `positive` prefers one side."""
    models = some_models(2, levels=2)
    negated = {k: [-t for t in v] for k, v in models.items()}
    for sign, expected in (("majority", True), ("positive", False)):
        plus = flat(ties(models, zero_sum=sign, trim_scope=scope, density=0.7))
        minus = flat(ties(negated, zero_sum=sign, trim_scope=scope, density=0.7))
        assert np.array_equal(plus, -minus) == expected


@pytest.mark.parametrize("block", [1, 50, 1 << 20])
def test_the_majority_is_the_tensors_own(block: int) -> None:
    """By tensor, each tensor has its own majority; over the model, all have one; blocks do not enter."""
    cancelled = [torch.tensor([5.0, 1, 1]), torch.tensor([-5.0, 0, 0])]
    models = {"down": [-cancelled[0].repeat(9), -cancelled[1].repeat(9)], "up": cancelled}
    apart = ties(models, zero_sum="majority", density=1, block=block)
    together = ties(models, zero_sum="majority", density=1, block=block, trim_scope="model")
    assert (float(apart["up"][0]), float(apart["down"][0])) == (5, -5)
    assert (float(together["up"][0]), float(together["down"][0])) == (-5, -5)


# trim_scope


def paper_ties(taus: list[np.ndarray], density: list[float], zero_sum: str) -> np.ndarray:
    """The TIES authors' procedure over one long vector per model: trim by one threshold, elect, disjoint mean.

    As many entries survive as here, floor(density n): all magnitudes must differ.
    """
    trimmed = []
    for tau, d in zip(taus, density, strict=True):
        threshold = np.sort(np.abs(tau))[-math.floor(d * len(tau))]
        trimmed.append(np.where(np.abs(tau) >= threshold, tau, 0))
    stacked = np.stack(trimmed)
    sign = np.sign(stacked.sum(0))
    sign[sign == 0] = np.sign(sign.sum()) if zero_sum == "majority" else 1
    agrees = np.where(sign > 0, stacked > 0, (stacked < 0) & (sign < 0))
    return (stacked * agrees).sum(0) / np.maximum(agrees.sum(0), 1)


@pytest.mark.parametrize("zero_sum", ["positive", "majority"])
@pytest.mark.parametrize("density", [[0.2] * 3, [0.05, 0.5, 0.8]])
def test_model_scope_is_the_papers_procedure(zero_sum: str, density: list[float]) -> None:
    """Over the whole model flattened in name order, with numpy; a fourth model cancels the first exactly."""
    models = {k: [*v, -v[0]] for k, v in some_models(3).items()}
    density = [*density, density[0]]
    merged = ties(models, density=density, trim_scope="model", zero_sum=zero_sum)
    expected = paper_ties([flat(models, i) for i in range(4)], density, zero_sum)
    assert np.allclose(flat(merged), expected, rtol=1e-6, atol=1e-9)
    assert not np.allclose(flat(ties(models, density=density, zero_sum=zero_sum)), expected, rtol=1e-3)


@pytest.mark.parametrize("levels", [None, 1, 3])
@pytest.mark.parametrize("density", [0.001, 0.1, 0.37, 0.9, 0.999])
def test_the_count_over_the_model_is_exact(density: float, levels: float | None) -> None:
    """Of each model exactly max(1, floor(density n)) entries survive, none smaller than one that does not."""
    models = some_models(2, levels=levels)
    parameters = parameters_of(2, density=density, trim_scope="model")
    found = scope_of(lambda: groups_of(models), parameters)
    total = sum(v[0].numel() for v in models.values())
    for i in range(2):
        masks = {
            g.name: torch.cat([select(models[g.name][i][b.rows].abs(), limits[i], b) for b in g.blocks()])
            for g in groups_of(models, 60)
            for limits in [thresholds_in(g, found)]
        }
        kept, magnitude = flat(masks) == 1, np.abs(flat(models, i))
        assert kept.sum() == max(1, math.floor(density * total))
        assert magnitude[kept].min() >= magnitude[~kept].max()


def test_equal_entries_are_spread_in_name_order() -> None:
    """All magnitudes equal: every fourth entry survives, counted over the tensors in name order, not in file order."""
    models = {name: [torch.ones(shape)] for name, shape in {"z": (10, 3), "a": (7, 2), "m": (5,)}.items()}
    merged = ties(models, density=0.25, trim_scope="model", block=4)
    positions = flat(merged).nonzero()[0]
    assert len(positions) == 12
    assert set(np.diff(positions)) <= {4, 5}
    assert np.array_equal(
        positions, flat(ties(dict(reversed(models.items())), density=0.25, trim_scope="model")).nonzero()[0]
    )


@pytest.mark.parametrize("zero_sum", ["positive", "majority"])
@pytest.mark.parametrize("levels", [None, 2])
def test_blocks_do_not_enter(levels: float | None, zero_sum: str) -> None:
    """House law 2: the same bits whatever the blocks of statistics and merge, for both scopes."""
    models = some_models(3, levels=levels)
    for scope in ("tensor", "model"):
        switches = {"trim_scope": scope, "zero_sum": zero_sum, "density": [0.1, 0.3, 0.6]}
        whole = ties(models, **switches)
        for block, other in ((1, 1 << 20), (40, 7), (1 << 20, 40)):
            merged = ties(models, block=block, scope_block=other, **switches)
            assert all(torch.equal(merged[name], whole[name]) for name in models)


def test_one_tensor_is_the_whole_model() -> None:
    """With a single tensor both scopes are the same, bit for bit, ties among magnitudes included."""
    models = {"w": some_models(3, levels=3)["b.weight"]}
    for zero_sum in ("positive", "majority"):
        scopes = [ties(models, trim_scope=s, zero_sum=zero_sum, density=0.4)["w"] for s in ("tensor", "model")]
        assert torch.equal(*scopes)


def test_density_one_trims_nothing_in_either_scope() -> None:
    """At density 1 there is no threshold, whatever the scope."""
    models = some_models(3)
    apart, together = (ties(models, trim_scope=s, density=1) for s in ("tensor", "model"))
    assert all(torch.equal(apart[name], together[name]) for name in models)


def test_a_small_tensor_may_lose_everything() -> None:
    """Over the model, a tensor of small entries is trimmed away whole; by tensor, each keeps its share."""
    models = {"big": [torch.arange(10.0, 20)], "small": [torch.arange(1.0, 11) / 100]}
    together = ties(models, density=0.5, trim_scope="model")
    assert not together["small"].any()
    assert together["big"].all()
    assert all(int(t.count_nonzero()) == 5 for t in ties(models, density=0.5).values())


def test_settings_of_one_tensor_are_refused() -> None:
    """One threshold per model cannot serve two densities (nor, for the majority, two sets of weights)."""
    models = some_models(2)
    parameters = parameters_of(2, trim_scope="model", zero_sum="majority")
    known = {**parameters, "model_statistics": scope_of(lambda: groups_of(models), parameters)}
    group = next(groups_of(models))
    statistics = load_method("ties").tensor_statistics
    with pytest.raises(UsageError, match=r"density must be the same for all tensors; found .*0\.2.* b\.weight, .*0\.5"):
        statistics(group, **select_arguments(statistics, {**known, "density": [0.5, 0.2]}))
    with pytest.raises(UsageError, match=r"weights must be the same for all tensors"):
        statistics(group, **select_arguments(statistics, {**known, "weights": [1.0, 2.0]}))


def test_layers_of_different_models_are_refused() -> None:
    """A recipe whose tensors are merged from different models has no whole model to trim."""
    models = {"a": [torch.ones(3)] * 2, "b": [torch.ones(3)]}
    with pytest.raises(UsageError, match=r"same models; b is merged from 1 of 2"):
        scope_of(lambda: groups_of(models), parameters_of(2, trim_scope="model"))


def test_nan_is_named() -> None:
    """A model that has not enough numbers to keep is refused, with the tensor that holds NaN."""
    models = {"a": [torch.ones(3)], "b": [torch.tensor([1.0, math.nan, math.nan])]}
    with pytest.raises(CheckpointError, match=r"Tensor b holds NaN in the base or in model 1"):
        scope_of(lambda: groups_of(models), parameters_of(1, trim_scope="model", density=0.9))


def test_switches_are_checked() -> None:
    """Other words than the four are refused with those that are known; the original program has but one."""
    known = find_method("ties").parameters
    assert (known["zero_sum"].default, known["trim_scope"].default) == ("positive", "tensor")
    with pytest.raises(UsageError, match="zero_sum must be one of positive, majority"):
        known["zero_sum"].parse("minority")
    with pytest.raises(UsageError, match="trim_scope must be one of tensor, model"):
        known["trim_scope"].parse("layer")
    reference = load_method("ties").reference
    changed = select_arguments(reference, {**parameters_of(1), "zero_sum": "majority"})
    with pytest.raises(UsageError, match=r"--numerics reference .* --zero_sum positive"):
        reference(torch.zeros(2), [torch.ones(2)], **changed)


def test_checkpoints_are_trimmed_as_wholes(tmp_path: Path) -> None:
    """Through files, the authors' procedure over real checkpoints, embeddings, norms and head included."""
    base = make_llama(tmp_path / "base", dtype=torch.float32)
    models = [fine_tune(base, tmp_path / name, seed=i) for i, name in enumerate("ab", 1)]
    switches = {"trim_scope": "model", "zero_sum": "majority", "density": "0.1,0.4"}
    recipe = make_recipe(
        {"method": "ties", "base_model": base, "models_to_merge": [*map(str, models)], "dtype": "float32", **switches},
        {},
    )
    merged, theta_0 = weights(merge(recipe, OutputConfig(tmp_path / "out"))), weights(base)
    taus = [flat({name: w - theta_0[name] for name, w in weights(model).items()}) for model in models]
    expected = flat(theta_0) + paper_ties(taus, [0.1, 0.4], "majority")
    assert np.allclose(flat(merged), expected, rtol=1e-6, atol=1e-7)


# selection by rank


@pytest.mark.parametrize("held", [0, selection.MAX_CACHED_COUNTS])
@pytest.mark.parametrize("kind", ["normal", "bf16", "zeros", "one", "tiny", "infinite"])
def test_thresholds_are_exact(monkeypatch: pytest.MonkeyPatch, kind: str, held: int) -> None:
    """The k-th largest of a sort, with the counts around it, whether counts are held or taken again."""
    monkeypatch.setattr(selection, "MAX_CACHED_COUNTS", held)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(60, 43, generator=generator)
    if kind == "bf16":
        values = values.bfloat16().float()
    elif kind == "zeros":
        values[torch.rand(60, 43, generator=generator) < 0.6] = -0.0
    elif kind == "one":
        values = torch.full((60, 43), 0.1)
    elif kind == "tiny":
        values = values * 1e-41  # below the smallest normal number
    elif kind == "infinite":
        values[::7] = math.inf
    ordered = values.abs().flatten().sort(descending=True).values
    for block in (100, 1 << 20):
        group = TensorGroup("w", torch.zeros_like(values), (values,), CPU, block_elements=block)
        for keep in (1, 2, 900, 1200, len(ordered) - 1):
            found = top_threshold(group, lambda b: values[b.rows].abs(), keep)
            larger, equal = int((ordered > ordered[keep - 1]).sum()), int((ordered == ordered[keep - 1]).sum())
            assert (found.value, found.equal, found.equal_kept) == (ordered[keep - 1], equal, keep - larger)
            chosen = [select(values[b.rows].abs(), found, b) for b in group.blocks()]
            assert int(torch.cat(chosen).sum()) == keep
    assert top_threshold(group, lambda b: values[b.rows].abs(), len(ordered)) is None
    nothing = top_threshold(group, lambda b: values[b.rows].abs(), 0)
    assert not select(values.abs(), nothing, next(iter(group.blocks()))).any()


PEAK = """
import torch
from merging.ops.model_scope import model_scope
from merging.ops.selection import top_threshold
from merging.ops.tensor_blocks import TensorGroup
from tests.helpers.memory import peak_of

parameters = {"density": [0.5], "weights": [1.0], "trim_scope": "model", "zero_sum": "majority"}

def find(group):
    top_threshold(group, lambda block: group.task_vector(0, block).abs_(), group.elements // 2)
    model_scope(lambda: [group], **parameters)

for rows in (64, 1024, 4096):
    model = torch.randn(rows, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    model[:, : 6 * 4096 // 10] = 0
    group = TensorGroup("w", torch.zeros(rows, 1).bfloat16().expand(rows, 4096), (model,), torch.device("cpu"))
    print(peak_of(lambda: find(group)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of the memory")
def test_memory_does_not_grow_with_equal_entries() -> None:
    """With 60 % zeros, the k-th among them, four times as many values (48 MiB more) need no more memory."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed goes back to the system
    done = subprocess.run(
        [sys.executable, "-c", PEAK], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    _, small, large = map(float, done.stdout.split())
    assert large < small + 8


def test_halves_of_a_number() -> None:
    """Counting upper and then lower halves of the bit patterns finds any number of any size again; NaN is left out."""
    values = torch.tensor([0.0, -0.0, 1e-45, 1.5, 1.5, 3.4e38, math.inf, math.nan])
    counts = upper_counts(values)
    assert int(counts.sum()) == 7
    for keep, expected, larger in ((1, math.inf, 0), (2, 3.4e38, 1), (4, 1.5, 2), (5, 1e-45, 4), (7, 0.0, 5)):
        upper, above = locate(counts, keep)
        places, numbers = lower_counts(values, upper)
        lower, more = locate(torch.zeros(LOWER_BINS, dtype=torch.int64).index_add(0, places, numbers), keep - above)
        assert value_of(upper, lower) == pytest.approx(expected, rel=1e-6)
        assert halves_of(value_of(upper, lower)) == (upper, lower)
        assert above + more == larger
    places, numbers = lower_counts(values, locate(counts, 4)[0])
    assert (places.tolist(), numbers.tolist()) == ([0], [2])  # 1.5 has zeros only in its lower half
