"""Laws of the merge methods on single tensors, through the same loop that files go through."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from merging.checkpoints.row_sums import last_sums, row_sums
from merging.engine.execution import ExecutionConfig
from merging.methods.contract import check_method, load_method
from merging.ops.sparse.sparsify import keep_mask, kept_count, trim, trim_thresholds
from merging.ops.tensor_blocks import Block, TensorGroup
from merging.recipe.method_registry import all_methods, find_method
from tests.helpers.merging import merge_group

METHODS = sorted(all_methods())
NEEDED = {"slerp": {"t": 0.3}, "nearswap": {"t": 0.01}}
"""Parameters without a default."""
SPHERICAL = ("slerp", "multislerp", "karcher")
STOCHASTIC = ("dare_linear", "dare_ties", "della", "della_linear")
SINGLE = [name for name in METHODS if find_method(name).max_models == 1]
RETURNS_ONE = [m for m in METHODS if find_method(m).min_models == 1 and m not in (*NEEDED, "arcee_fusion")]
DELTA_METHODS = [name for name in METHODS if find_method(name).base == "required"]
CPU = torch.device("cpu")


def defaults(method: str, n: int, **changed: object) -> dict[str, object]:
    """The method's parameters with their defaults, some changed."""
    parameters = find_method(method).parameters
    changed = {**NEEDED.get(method, {}), **changed}
    return {name: p.for_models(changed.get(name, p.default), n) for name, p in parameters.items()}


def merge(
    method, base, finetuned, *, dtype=torch.float32, seed=42, block=1 << 20, name="w", embedding=False, **changed
):
    """Merge whole tensors by the blockwise loop."""
    group = TensorGroup(name, base, tuple(finetuned), CPU, seed, embedding, block)
    implementation = load_method(method)
    parameters = defaults(method, len(finetuned), **changed)
    return merge_group(group, ExecutionConfig(implementation, CPU, seed), parameters, dtype)


def tensors(n: int, shape=(24, 20), *, seed: int = 0, std: float = 0.02, dtype=torch.bfloat16):
    """A base and n fine-tuned tensors of bounded exponents, as real checkpoints have."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator) + 3.0 * torch.sign(torch.randn(shape, generator=generator))
    return base.to(dtype), [(base + std * torch.randn(shape, generator=generator)).to(dtype) for _ in range(n)]


def how_many(method: str) -> int:
    """Three models, or as many as the method takes."""
    return int(min(3, find_method(method).max_models))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, so that NaN and signed zeros compare too."""
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("seed", [0, 7])
def test_dare_at_density_one_is_task_arithmetic(seed: int) -> None:
    """Law 1: density 1 drops nothing, so dare_linear is task_arithmetic bit for bit, for any seed."""
    base, models = tensors(3)
    dare = merge("dare_linear", base, models, density=1, seed=seed)
    assert torch.equal(bits(dare), bits(merge("task_arithmetic", base, models)))


def test_dare_ties_equals_ties_only_with_the_same_normalize() -> None:
    """Law 2: at density 1, dare_ties is ties where normalize agrees, and not with the defaults."""
    base, models = tensors(3)
    for normalize in (True, False):
        dare = merge("dare_ties", base, models, density=1, normalize=normalize)
        assert torch.equal(dare, merge("ties", base, models, density=1, normalize=normalize))
    assert not torch.equal(merge("dare_ties", base, models, density=1), merge("ties", base, models, density=1))


@pytest.mark.parametrize("method", RETURNS_ONE)
def test_one_model_is_returned(method: str) -> None:
    """Law 4: one model, weight 1, density 1, gives that model exactly (bf16 inputs, bounded exponents)."""
    base, models = tensors(1)
    changed = {"density": 1} if "density" in find_method(method).parameters else {}
    assert torch.equal(merge(method, base, models, dtype=torch.bfloat16, **changed), models[0])


@pytest.mark.parametrize("method", DELTA_METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_models_equal_to_the_base_give_the_base(method: str, dtype: torch.dtype) -> None:
    """Law 5: all models equal to the base give the base bit for bit, whatever the method."""
    base, _ = tensors(1, dtype=dtype)
    same = [base] * how_many(method)
    merged = merge(method, base, same, dtype=dtype)
    if method in SPHERICAL:  # angles and norms: to rounding
        assert torch.allclose(merged.float(), base.float(), rtol=1e-6)
    else:
        assert torch.equal(bits(merged), bits(base))


@pytest.mark.parametrize("n", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_average_of_equal_models(n: int, dtype: torch.dtype) -> None:
    """Law 6: linear of n equal models is that model exactly, for every n."""
    _, (model,) = tensors(1, dtype=dtype)
    assert torch.equal(bits(merge("linear", None, [model] * n, dtype=dtype)), bits(model))


@pytest.mark.parametrize("method", [m for m in METHODS if m not in (*STOCHASTIC, *SINGLE)])
def test_order_of_models_does_not_matter(method: str) -> None:
    """Law 7: reversing the models changes no bf16 result by more than one unit in the last place."""
    base, models = tensors(how_many(method))
    forward = merge(method, base, models, dtype=torch.bfloat16)
    backward = merge(method, base, models[::-1], dtype=torch.bfloat16)
    ulp = (forward.view(torch.int16).int() - backward.view(torch.int16).int()).abs()
    assert int(ulp.max()) <= 1


def test_linear_weights_scale() -> None:
    """Law 8: multiplying all weights by c changes nothing when normalised, and multiplies the result by c when not."""
    _, models = tensors(3)
    weights = [0.5, 0.25, 2.0]
    scaled = [4 * w for w in weights]
    assert torch.equal(merge("linear", None, models, weights=weights), merge("linear", None, models, weights=scaled))
    plain = merge("linear", None, models, weights=weights, normalize=False)
    assert torch.equal(4 * plain, merge("linear", None, models, weights=scaled, normalize=False))


def test_scaling_is_a_common_weight() -> None:
    """Law 9: task arithmetic with weights w and scaling lambda is that with weights lambda * w."""
    base, models = tensors(3)
    left = merge("task_arithmetic", base, models, weights=[0.5, 1, 2], scaling=0.5)
    assert torch.equal(left, merge("task_arithmetic", base, models, weights=[0.25, 0.5, 1]))


def test_sign_election_by_hand() -> None:
    """Law 10: base 0, task vectors [1,1,0,-1] and [-1,0,0,1] elect + where they cancel: ties gives [1,1,0,1]."""
    models = [torch.tensor([1.0, 1, 0, -1]), torch.tensor([-1.0, 0, 0, 1])]
    assert merge("ties", torch.zeros(4), models, density=1).tolist() == [1, 1, 0, 1]


def test_agreeing_signs() -> None:
    """Law 11: where all signs agree, ties adds the mean of the task vectors and dare_ties their sum."""
    base = torch.zeros(6)
    deltas = torch.rand(3, 6) + 0.5
    assert torch.allclose(merge("ties", base, list(deltas), density=1), deltas.mean(0), rtol=1e-6)
    assert torch.allclose(merge("dare_ties", base, list(deltas), density=1), deltas.sum(0), rtol=1e-6)


def test_identical_models() -> None:
    """Law 12: ties of n equal models is task arithmetic of one; dare_ties adds n times the task vector."""
    base, (model,) = tensors(1)
    one = merge("task_arithmetic", base, [model])
    assert torch.equal(merge("ties", base, [model] * 4, density=1), one)
    four = base.float() + 4 * (model.float() - base.float())
    assert torch.equal(merge("dare_ties", base, [model] * 4, density=1), four)


def test_trim_keeps_the_largest() -> None:
    """Law 13: density 0.25 of 8 distinct magnitudes keeps exactly the 2 largest, with their values."""
    delta = torch.tensor([0.1, -0.8, 0.3, 0.2, 0.5, -0.4, 0.7, 0.6])
    merged = merge("ties", torch.zeros(8), [delta], density=0.25)
    assert merged.tolist() == pytest.approx([0, -0.8, 0, 0, 0, 0, 0.7, 0])


@pytest.mark.parametrize("density", [0.0, 0.001, 0.2, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("levels", [2, 50, None])
@pytest.mark.parametrize("block", [64, 10_000, 1 << 20])
def test_trim_count_is_exact(density: float, levels: int | None, block: int) -> None:
    """Exactly max(1, floor(density * n)) entries survive, none smaller than one that does not, with ties or without."""
    generator = torch.Generator().manual_seed(3)
    delta = torch.randn(700, 500, generator=generator)
    if levels:  # coarse magnitudes: many equal ones, as bf16 task vectors have
        delta = (delta * levels / 4).round().clamp(-levels, levels) + delta.sign() * 0.5
    group = TensorGroup("w", torch.zeros_like(delta), (delta,), CPU, block_elements=block)
    (limit,) = trim_thresholds(group, [density])
    trimmed = torch.cat([trim(group.task_vector(0, b), limit, b) for b in group.blocks()])
    assert (
        int((trimmed != 0).sum())
        == {0: 1, 0.001: 350, 0.2: 70_000, 0.5: 175_000, 0.77: 269_500, 0.999: 349_650}[density]
    )
    survivors, rest = trimmed[trimmed != 0].abs(), delta[trimmed == 0].abs()
    assert survivors.min() >= rest.max()


@pytest.mark.parametrize(
    ("density", "n", "kept"), [(0.57, 100, 57), (0.29, 100, 29), (0.3, 7, 2), (1e-9, 5, 1), (1, 5, 5)]
)
def test_density_counts_as_written(density: float, n: int, kept: int) -> None:
    """The count is the floor of the decimal density times n: 0.57 of 100 is 57, which binary arithmetic makes 56."""
    assert kept_count(density, n) == kept


def test_equal_entries_are_spread_evenly() -> None:
    """Of equal entries, the survivors are spread evenly in index order: of 1000 every fourth."""
    merged = merge("ties", torch.zeros(1000), [torch.ones(1000)], density=0.25, block=130)
    positions = merged.nonzero().squeeze(1)
    assert len(positions) == 250
    assert set(positions.diff().tolist()) == {4}


def test_dare_rate_and_factor() -> None:
    """Law 14: of 10^6 entries a share of 0.3 +- 0.003 is kept, each multiplied by 1/0.3 in fp32; l1 keeps the norm."""
    delta = torch.randn(1000, 1000)
    base = torch.zeros_like(delta)
    merged = merge("dare_linear", base, [delta], density=0.3)
    kept = merged != 0
    assert abs(float(kept.float().mean()) - 0.3) < 0.003
    assert torch.equal(merged[kept], delta[kept] * (1 / 0.3))
    l1 = merge("dare_linear", base, [delta], density=0.3, rescale="l1")
    assert float(l1.double().abs().sum() / delta.double().abs().sum()) == pytest.approx(1, abs=1e-5)
    plain = merge("dare_linear", base, [delta], density=0.3, rescale="none")
    assert torch.equal(plain[kept], delta[kept])
    assert torch.equal(plain != 0, kept)


def test_masks_depend_on_seed_position_name_and_index_only() -> None:
    """Law 15: a mask is cut from one stream per (seed, position, name): any block of it is the same; others differ."""
    whole = keep_mask(Block(0, 100, 7), torch.Size((100, 7)), name="w", model=0, density=0.4, seed=1)
    for start, stop in [(0, 1), (1, 2), (3, 50), (49, 100), (99, 100)]:
        part = keep_mask(Block(start, stop, 7), torch.Size((stop - start, 7)), name="w", model=0, density=0.4, seed=1)
        assert torch.equal(part, whole[start:stop])
    shape = torch.Size((200, 100))
    for other in ({"seed": 2}, {"model": 1}, {"name": "v"}):
        arguments = {"name": "w", "model": 0, "density": 0.5, "seed": 1}
        a = keep_mask(Block(0, 200, 100), shape, **arguments)
        b = keep_mask(Block(0, 200, 100), shape, **{**arguments, **other})
        assert abs(float((a == b).float().mean()) - 0.5) < 0.02  # independent masks agree by chance


def test_mask_is_fixed_for_all_time() -> None:
    """The mask of a given key never changes between versions: its first 16 entries are pinned by numpy's Philox."""
    import hashlib

    key = int.from_bytes(hashlib.sha256(b"42|0|w").digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(8)
    expected = [int(w >> shift & 0xFFFFFFFF) < 2**31 for w in map(int, words) for shift in (0, 32)]
    mask = keep_mask(Block(0, 16, 1), torch.Size((16,)), name="w", model=0, density=0.5, seed=42)
    assert mask.tolist() == expected


def test_dare_is_unbiased() -> None:
    """Law 16: dare_linear averaged over 400 seeds is task arithmetic within 5 standard errors in every entry."""
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(40, generator=generator)
    samples = torch.stack([merge("dare_linear", torch.zeros(40), [delta], density=0.4, seed=s) for s in range(400)])
    error = (samples.double().mean(0) - delta).abs()
    standard = delta.abs() * ((1 - 0.4) / 0.4 / 400) ** 0.5
    assert (error <= 5 * standard).all()


@pytest.mark.parametrize(
    ("method", "shape"),
    [(m, shape) for m in METHODS for shape in [(37, 30), (513,), (5, 4, 6)]],
)
def test_blocks_do_not_change_the_result(method: str, shape: tuple[int, ...]) -> None:
    """House law 2: the result is the same bit for bit for any block size and any thread count."""
    base, models = tensors(how_many(method), shape)
    results = []
    threads = torch.get_num_threads()
    for block, n_threads in ((1, 1), (64, 2), (1 << 20, 1)):
        torch.set_num_threads(n_threads)
        results.append(merge(method, base, models, block=block))
    torch.set_num_threads(threads)
    assert all(torch.equal(bits(result), bits(results[0])) for result in results)


def test_l1_rescaling_does_not_depend_on_blocks() -> None:
    """House law 2 for DARE's l1 factor, a sum over the whole tensor: the same bits for any block and thread count."""
    base, models = tensors(2, (600, 700))
    threads = torch.get_num_threads()
    results = []
    for block, n_threads in ((1000, 1), (1 << 20, 2)):
        torch.set_num_threads(n_threads)
        results.append(merge("dare_ties", base, models, rescale="l1", density=0.3, block=block))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("columns", [1024, 1025, 53248])
def test_sums_of_rows_that_stand_alone(columns: int) -> None:
    """A row's sum is the same bits alone and beside others, however many threads would share it."""
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert torch.equal(last_sums(x[3:4]), last_sums(x)[3:4])
        assert row_sums(x[3:4]) == row_sums(x)[3:4]
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(last_sums(x), x.double().sum(-1).float(), atol=1e-3)


@pytest.mark.parametrize("n", [0, 1, 1023, 1024, 1025, 3_000_001])
@pytest.mark.parametrize("as_rows", [False, True])
def test_row_sums(n: int, as_rows: bool) -> None:
    """The exactly rounded total of the row sums is the sum, to fp64 accuracy, for one long row or many of one entry."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    sums = row_sums(x if as_rows else x[None])
    assert math.fsum(sums) == pytest.approx(float(x.double().sum()), abs=1e-9)


# the spherical methods and the other newer ones


def test_slerp_ends_and_middle() -> None:
    """t 0 is the base, t 1 the model; between unit vectors at a right angle the middle is their normalised sum."""
    base, (model,) = tensors(1)
    assert torch.equal(merge("slerp", base, [model], t=0), base.float())
    assert torch.equal(merge("slerp", base, [model], t=1), model.float())
    x, y = torch.eye(2)
    assert torch.allclose(merge("slerp", x, [y], t=0.5), torch.full((2,), 0.5**0.5), rtol=1e-6)
    assert torch.equal(merge("slerp", x, [2 * x], t=0.5), 1.5 * x)  # collinear: a line


def test_karcher_of_two_is_the_middle_of_the_arc() -> None:
    """The Karcher mean of two vectors of equal norm is slerp at one half, and equally far from both."""
    x = torch.tensor([3.0, 0.0, 4.0])
    y = torch.tensor([0.0, 5.0, 0.0])
    mean = merge("karcher", None, [x, y])
    assert torch.allclose(mean, merge("slerp", x, [y], t=0.5), atol=1e-5)
    assert float(mean.norm()) == pytest.approx(5, rel=1e-6)


def test_model_stock_by_hand() -> None:
    """Orthogonal task vectors give t = 0 (the base), parallel ones t = 1 (their average)."""
    base = torch.ones(4)
    e = torch.eye(4)
    assert torch.allclose(merge("model_stock", base, [base + e[0], base + e[1]]), base, atol=1e-7)
    assert torch.allclose(merge("model_stock", base, [base + e[0], base + 3 * e[0]]), base + 2 * e[0])


def test_nearswap_moves_by_t_at_most() -> None:
    """No entry moves by more than t; those that differ by less become the model's."""
    base, (model,) = tensors(1, dtype=torch.float32)
    moved = merge("nearswap", base, [model], t=0.01) - base
    assert float(moved.abs().max()) <= 0.01 * (1 + 1e-4)
    near = (model - base).abs() < 0.009
    assert torch.allclose(moved[near], (model - base)[near], atol=1e-6)


def test_ram_by_hand() -> None:
    """One model's change is added whole, several models' averaged, changes below epsilon not at all."""
    models = [torch.tensor([1.0, 2.0, 0.0, 1e-6]), torch.tensor([0.0, 4.0, 3.0, 0.0])]
    assert merge("ram", torch.zeros(4), models).tolist() == [1, 3, 3, 0]
    # model 1 shares 1 of 2 changes, ratio 1 (cut to alpha 0.2): unique changes times 1 + 0.1 * 0.2
    plus = merge("ramplus_tl", torch.zeros(4), models)
    assert plus.tolist() == pytest.approx([1.02, 3, 3.06, 0])


def test_density_one_makes_them_equal() -> None:
    """Law 3: at density 1 breadcrumbs and della_linear are task arithmetic, della and breadcrumbs_ties are ties."""
    base, models = tensors(3)
    plain, elected = merge("task_arithmetic", base, models), merge("ties", base, models, density=1)
    assert torch.equal(merge("breadcrumbs", base, models, density=1), plain)
    assert torch.equal(merge("della_linear", base, models, density=1), plain)
    assert torch.equal(merge("della", base, models, density=1), elected)
    assert torch.equal(merge("breadcrumbs_ties", base, models, density=1, normalize=True), elected)


def test_breadcrumbs_keeps_the_band() -> None:
    """Law 17: of 1..1000, density 0.9 and gamma 0.01 keep 91..990; gamma 0 keeps 101..1000, not nothing."""
    delta = torch.arange(1.0, 1001)
    for gamma, first, last in ((0.01, 91, 990), (0.0, 101, 1000)):
        kept = merge("breadcrumbs", torch.zeros(1000), [delta], density=0.9, gamma=gamma)
        assert kept[kept != 0].tolist() == list(range(first, last + 1))
    equal = merge("breadcrumbs", torch.zeros(1000), [torch.ones(1000)], density=0.5, gamma=0.2, block=130)
    assert int(equal.sum()) == 500  # the count holds where all magnitudes are equal


def test_della_keeps_large_entries_more_often() -> None:
    """DELLA: the entry of rank r is kept with probability d - e + 2 e r / (n - 1), and 1/p makes it unbiased."""
    row = torch.tensor([0.1, 0.4, 0.2, 0.8, 0.6])
    delta = row.repeat(20_000, 1)
    merged = merge("della_linear", torch.zeros_like(delta), [delta], density=0.5, epsilon=0.3)
    share = (merged != 0).float().mean(0)
    expected = torch.tensor([0.2, 0.5, 0.35, 0.8, 0.65])
    assert torch.allclose(share, expected, atol=0.015)
    assert torch.allclose(merged.mean(0), row, rtol=0.04)
    l1 = merge("della_linear", torch.zeros_like(delta), [delta], density=0.5, epsilon=0.3, rescale="l1")
    assert float(l1.double().sum() / delta.double().sum()) == pytest.approx(1, abs=1e-5)


def test_sce_by_hand() -> None:
    """SCE: model weights are the shares of the mean squares, minority signs are erased, the rest averaged by weight."""
    models = [torch.tensor([3.0, 1.0, 0.0]), torch.tensor([1.0, -2.0, 0.0])]  # mean squares 10/3 and 5/3
    merged = merge("sce", torch.zeros(3), models)
    assert merged.tolist() == pytest.approx([(2 * 3 + 1) / 3, -2, 0])
    assert merge("sce", torch.zeros(3), models, select_topk=0.5).tolist() == pytest.approx([0, -2, 0])


# WIDEN


def widen_by_the_paper(base, models, ratio=1.0, calibration=1.0, embedding=False):
    """WIDEN's equations written out in fp64 with numpy, one column at a time."""
    theta0 = base.double().numpy()
    thetas = [m.double().numpy() for m in models]
    if theta0.ndim == 1:
        significance = [np.abs(t - theta0) for t in thetas]
        coefficients = score_of(significance, ratio, calibration)
        return theta0 + sum(c * (t - theta0) for c, t in zip(coefficients, thetas, strict=True))
    if embedding:
        theta0, thetas = theta0.T, [t.T for t in thetas]
    d = theta0.shape[1]
    ranks: dict[str, list[np.ndarray]] = {"magnitude": [], "direction": []}
    for theta in thetas:
        magnitude, direction = [], []
        for j in range(d):
            a, b = theta[:, j], theta0[:, j]
            norm_a, norm_b = np.sqrt((a**2).sum()), np.sqrt((b**2).sum())
            magnitude.append(abs(norm_a - norm_b))
            direction.append(1 - (a / norm_a) @ (b / norm_b))
        for key, values in (("magnitude", magnitude), ("direction", direction)):
            rank = np.empty(d)
            rank[np.argsort(values, kind="stable")] = np.arange(d) / d
            ranks[key].append(rank)
    # the mean of the ranks 0, 1/d, ..., (d-1)/d is (d-1)/2d; a mean taken in floating point may fall below the middle
    scores = [score_of(r, ratio, calibration, (d - 1) / 2 / d) for r in ranks.values()]
    merged = theta0.copy()
    for m, theta in enumerate(thetas):
        merged += (theta - theta0) * (0.5 * (scores[0][m] + scores[1][m]))
    return merged.T if embedding else merged


def score_of(values, ratio, calibration, mean=None):
    """Softmax over the models; the calibration value above ratio times the average."""
    exponentials = [np.exp(v) for v in values]
    total = sum(exponentials)
    return [
        np.where(v > ratio * (v.mean() if mean is None else mean), calibration, e / total)
        for v, e in zip(values, exponentials, strict=True)
    ]


@pytest.mark.parametrize(("shape", "embedding"), [((30, 21), False), ((30, 21), True), ((33,), False)])
@pytest.mark.parametrize(("ratio", "calibration"), [(1.0, 1.0), (1.3, 0.6), (0.0, 2.0)])
def test_widen_is_the_paper(shape, embedding, ratio, calibration) -> None:
    """WIDEN equals its equations written out in fp64, on matrices, embeddings and vectors, to fp32 accuracy."""
    base, models = tensors(3, shape, dtype=torch.float32)
    merged = merge(
        "widen", base, models, embedding=embedding, above_average_value_ratio=ratio, score_calibration_value=calibration
    )
    expected = widen_by_the_paper(base, models, ratio, calibration, embedding)
    assert np.abs(merged.double().numpy() - expected).max() < 1e-6


def test_widen_without_competition_is_task_arithmetic() -> None:
    """Law 20: one model is returned; ratio -1 with calibration 1 is task arithmetic."""
    base, models = tensors(3)
    everything = merge("widen", base, models, above_average_value_ratio=-1)
    assert torch.equal(everything, merge("task_arithmetic", base, models))


def test_widen_of_identical_models() -> None:
    """Law 21: of two identical models each column gets 0, 1/2 or 1 on top; each rank selects floor(d/2) columns."""
    base, (model,) = tensors(1, (64, 50), std=0.3, dtype=torch.float32)
    merged = merge("widen", base, [model, model])
    ratio = ((merged - base) / (model - base)).median(0).values - 1
    hits = ratio / 0.5
    assert torch.allclose(hits, hits.round(), atol=1e-3)
    assert set(hits.round().int().tolist()) <= {0, 1, 2}
    assert int(hits.round().sum()) == 2 * (50 // 2)  # floor(d / 2) columns by magnitude and as many by direction


def test_widen_permutes_with_its_columns() -> None:
    """Law 22: permuting the columns of all models permutes the result; a row of zeros in an embedding stays finite."""
    base, models = tensors(2, (40, 31), dtype=torch.float32)
    order = torch.randperm(31)
    permuted = merge("widen", base[:, order], [m[:, order] for m in models])
    assert torch.equal(permuted, merge("widen", base, models)[:, order])
    zeroed = base.clone()
    zeroed[5] = 0
    assert torch.isfinite(merge("widen", zeroed, models, embedding=True)).all()
    assert torch.isfinite(merge("widen", zeroed, [zeroed, models[0]], embedding=True)).all()


def test_widen_of_experts_is_widen_of_each() -> None:
    """A stack of a mixture's experts is merged as its matrices are, one by one, whatever the block."""
    base, models = tensors(2, (3, 6, 10))
    together = merge("widen", base, models, name="mlp.experts.up_proj", block=61)
    for i in range(3):
        assert torch.equal(together[i], merge("widen", base[i], [m[i] for m in models]))


def test_widen_of_a_convolution() -> None:
    """A tensor of more dimensions that stacks no experts counts as the matrix of its rows and all the rest."""
    base, models = tensors(2, (7, 4, 5))
    flat = merge("widen", base.flatten(1), [m.flatten(1) for m in models])
    assert torch.equal(merge("widen", base, models, name="conv1d.weight").flatten(1), flat)


# registry


@pytest.mark.parametrize("method", METHODS)
def test_yaml_is_the_signature(method: str) -> None:
    """A method's functions take exactly the parameters of its YAML, and every default has a source."""
    spec = find_method(method)
    check_method(spec, load_method(method))
    assert all(p.source and p.help for p in spec.parameters.values())
    assert spec.paper.startswith("https://")
    assert Path(f"merging/methods/{method}.py").exists()


def test_aliases() -> None:
    """The original's spellings of WIDEN are the same method."""
    assert find_method("WIDEN") is find_method("widen") is find_method("widen_merging")
