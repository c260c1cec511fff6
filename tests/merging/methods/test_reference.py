"""Parity with independent implementations: mergekit's own package, and the original AIM arithmetic written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aim.calibration.config import Calibration
from aim.config import AimConfig
from aim.measure import Settings
from aim.pipeline import relax
from merging.pipeline import merge
from merging.plan.merge_plan import OutputConfig
from merging.recipe import make_recipe
from tests.helpers.tiny import fine_tune, make_llama, weights

PAIRS = [("linear", {}), ("task_arithmetic", {}), ("ties", {"density": 1}), ("dare_linear", {"density": 1}),
         ("dare_ties", {"density": 1})]  # fmt: skip


def mergekit_merge(method: str, base: Path, models: list[Path], out: Path, dtype: str, **parameters: object) -> dict:
    """Merge with mergekit's package (a development dependency: missing, these tests fail)."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = {
        "merge_method": method,
        **({} if method == "linear" else {"base_model": str(base)}),
        "models": [{"model": str(m), "parameters": {"weight": 1.0, **parameters}} for m in models],
        "dtype": dtype,
    }
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions())
    return weights(out)


def ours(method: str, base: Path, models: list[Path], out: Path, **flags: object) -> dict:
    """Merge with this project."""
    recipe = make_recipe({"method": method, "base_model": base, "models_to_merge": list(map(str, models)), **flags}, {})
    return weights(merge(recipe, OutputConfig(out)))


@pytest.mark.parametrize(("method", "extra"), PAIRS)
def test_reference_numerics_are_mergekit_bit_for_bit(family, tmp_path: Path, method: str, extra: dict) -> None:
    """With --numerics reference every bf16 tensor equals mergekit 0.1.5's, bit for bit (density 1, weight 1)."""
    models = [family[name] for name in "abc"]
    theirs = mergekit_merge(method, family["base"], models, tmp_path / "theirs", "bfloat16", **extra)
    mine = ours(method, family["base"], models, tmp_path / "mine", numerics="reference", **extra)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("method", "extra"), PAIRS)
def test_float32_agrees_with_mergekit(family, tmp_path: Path, method: str, extra: dict) -> None:
    """In float32 every tensor agrees with mergekit 0.1.5 to rounding: 2e-7 of the largest value."""
    models = [family[name] for name in "abc"]
    theirs = mergekit_merge(method, family["base"], models, tmp_path / "theirs", "float32", **extra)
    mine = ours(method, family["base"], models, tmp_path / "mine", dtype="float32", **extra)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (mine[name] - tensor).abs().max() <= 2e-7 * tensor.abs().max() + 1e-9, name


NEWER = [
    ("slerp", {"t": 0.3}, 1),
    ("slerp", {"t": 0.8}, 1),
    ("nearswap", {"t": 0.005}, 1),
    ("karcher", {}, 3),
    ("karcher", {"max_iter": 2, "tol": 1e-3}, 3),
    ("multislerp", {}, 3),
    ("multislerp", {"normalize_weights": False}, 2),
    ("multislerp", {"weights": [0.2, 0.5, 1.5]}, 3),
    ("model_stock", {}, 3),
    ("model_stock", {"filter_wise": True}, 3),
    ("ram", {}, 3),
    ("ram", {"epsilon": 0.01}, 3),
    ("ramplus_tl", {}, 3),
    ("ramplus_tl", {"epsilon": 0.01, "r": 0.5, "alpha": 0.6}, 3),
    ("passthrough", {}, 1),
    ("nuslerp", {"weights": [0.3, 0.9]}, 2),
    ("nuslerp", {"nuslerp_flatten": False}, 2),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True, "weights": [2, 1]}, 2),
    ("sce", {}, 3),
    ("sce", {"select_topk": 0.4}, 3),
    ("arcee_fusion", {}, 1),
    ("breadcrumbs", {"density": [0.5, 0.7, 0.9], "gamma": [0.1, 0.01, 0.05]}, 3),
    ("breadcrumbs", {"density": 0.6, "gamma": 0.05, "rescale": "l1", "scaling": 0.7}, 3),
    ("breadcrumbs_ties", {"density": 0.8, "gamma": 0.02, "normalize": True}, 3),
    ("della", {"density": 1}, 3),
    ("della_linear", {"density": 1}, 3),
    ("passthrough", {"scale": 0.5}, 1),
]


@pytest.fixture(scope="module")
def family32(tmp_path_factory) -> dict[str, Path]:
    """A float32 family: magnitudes are distinct, so that what is selected does not hang on equal entries."""
    folder = tmp_path_factory.mktemp("family32")
    base = make_llama(folder / "base", dtype=torch.float32)
    return {"base": base, **{name: fine_tune(base, folder / name, seed=i) for i, name in enumerate("abc", 1)}}


WITH_BASE = {"karcher": [False], "passthrough": [False], "multislerp": [True, False], "nuslerp": [True, False]}


@pytest.mark.parametrize(
    ("method", "parameters", "n", "with_base"), [(*case, b) for case in NEWER for b in WITH_BASE.get(case[0], [True])]
)
def test_newer_methods_agree_with_mergekit(family32, tmp_path: Path, method, parameters, n, with_base) -> None:
    """In float32 every tensor agrees with mergekit 0.1.5 to 2e-6 of its largest value, in every parameter."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    from merging.recipe.method_registry import find_method

    models = [str(family32[name]) for name in "abc"[:n]]
    names = {"scaling": "lambda"}
    per_model = (
        ("weights", "scale", "density", "gamma", "epsilon") if method not in ("ram", "ramplus_tl") else ("weights",)
    )
    shared = {names.get(k, k): v == "l1" if k == "rescale" else v for k, v in parameters.items() if k not in per_model}
    if "rescale" in find_method(method).parameters:
        shared.setdefault("rescale", False)
    weights_of = parameters.get("weights", [1.0] * n)
    entries = []
    for i, (model, weight) in enumerate(zip(models, weights_of, strict=True)):
        own = {"weight": weight} if "weights" in find_method(method).parameters else {}
        given = {k: v for k, v in parameters.items() if k in per_model and k != "weights"}
        own |= {k: v[i] if isinstance(v, list) else v for k, v in given.items()}
        entries.append({"model": model, **({"parameters": own} if own else {})})
    base = {"base_model": str(family32["base"])} if with_base else {}
    if method == "slerp":
        entries.insert(0, {"model": str(family32["base"])})
    config = {"merge_method": method, **base, "models": entries, "parameters": shared, "dtype": "float32"}
    run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "theirs"), MergeOptions())
    theirs = weights(tmp_path / "theirs")
    recipe = make_recipe({"method": method, **base, "models_to_merge": models, "dtype": "float32", **parameters}, {})
    mine = weights(merge(recipe, OutputConfig(tmp_path / "mine")))
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (mine[name] - tensor).abs().max() <= 2e-6 * tensor.abs().max() + 1e-9, name


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_trimmed_ties_agrees_with_mergekit(family32, tmp_path: Path, density: float) -> None:
    """TIES below density 1 agrees with mergekit in float32 where magnitudes are distinct (float32 task vectors)."""
    base, models = family32["base"], [family32[name] for name in "abc"]
    theirs = mergekit_merge("ties", base, models, tmp_path / "theirs", "float32", density=density)
    mine = ours("ties", base, models, tmp_path / "mine", dtype="float32", density=density)
    for name, tensor in theirs.items():
        different = (mine[name] - tensor).abs() > 2e-7 * tensor.abs().max()
        assert int(different.sum()) == 0, name


def test_reference_density_is_one(family, tmp_path: Path) -> None:
    """--numerics reference refuses a density below 1, which the original never used."""
    from common.errors import UsageError

    with pytest.raises(UsageError, match="--density 1"):
        ours("ties", family["base"], [family["a"]], tmp_path / "x", numerics="reference")


def original_widen(base: torch.Tensor, models: list[torch.Tensor], embedding: bool) -> torch.Tensor:
    """The published WIDEN in the tensors' own dtype: per model and column, as semantics fixes it."""
    if base.dim() == 1:
        deltas = torch.stack([m - base for m in models])
        significance = deltas.abs()
        score = torch.softmax(significance, dim=0)
        for i in range(len(models)):
            score[i][significance[i] > significance[i].mean() * 1.0] = 1.0
        return (base + (deltas * score).sum(0)).to(base.dtype)
    if embedding:
        base, models = base.transpose(0, 1), [m.transpose(0, 1) for m in models]
    columns = base.shape[1]
    norm0 = torch.norm(base, p=2, dim=0)
    rank_m, rank_d = torch.zeros(len(models), columns), torch.zeros(len(models), columns)
    for i, model in enumerate(models):
        norm = torch.norm(model, p=2, dim=0)
        differences = (norm - norm0).abs(), 1 - torch.cosine_similarity(model / norm, base / norm0, dim=0)
        for rank, values in zip((rank_m, rank_d), differences, strict=True):
            order = torch.argsort(values, stable=True)
            for position, column in enumerate(order.tolist()):
                rank[i, column] = position / columns
    total = torch.zeros(len(models), columns)
    for rank in (rank_m, rank_d):
        score = torch.softmax(rank, dim=0)
        for i in range(len(models)):
            score[i][rank[i] > rank[i].mean() * 1.0] = 1.0
        total += score
    deltas = torch.stack([m - base for m in models])
    merged = (base + (deltas * (0.5 * total).unsqueeze(1)).sum(0)).to(base.dtype)
    return merged.transpose(0, 1) if embedding else merged


def test_reference_widen_is_the_original(family, tmp_path: Path) -> None:
    """With --numerics reference WIDEN equals the published code's bf16 arithmetic, bit for bit, on every tensor."""
    base, models = weights(family["base"]), [weights(family[name]) for name in "abc"]
    mine = ours("widen", family["base"], [family[name] for name in "abc"], tmp_path / "mine", numerics="reference")
    for name, tensor in base.items():
        expected = original_widen(tensor, [m[name] for m in models], embedding="embed_tokens" in name)
        assert torch.equal(mine[name], expected), name


def test_reference_aim_is_the_original(family, tmp_path: Path) -> None:
    """performAIM --numerics reference gives, bit for bit, the original's activations and relaxed weights.

    The original is written out here: bf16 model, one block at a time, bf16 means added up in bf16, bf16 task vectors.
    """
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = tmp_path / "merged"
    ours("task_arithmetic", family["base"], [family["a"], family["b"]], merged)
    rows = load_dataset("json", data_files=str(family["text"]), split="train", cache_dir=str(tmp_path)).shuffle(seed=42)
    tokenizer = AutoTokenizer.from_pretrained(family["base"])
    kept: list[int] = []
    count = 0
    for row in rows:
        ids = tokenizer.encode(row["text"].strip())
        if len(ids) <= 64:
            kept += ids
            count += 1
        if count == 40:
            break
    blocks = [torch.tensor([kept[i * 64 : (i + 1) * 64]]) for i in range(len(kept) // 64)]
    model = AutoModelForCausalLM.from_pretrained(family["base"], dtype=torch.bfloat16).eval()
    features: dict[str, list[torch.Tensor]] = {}

    def hook(name):
        def keep(module, inputs, output):
            x = inputs[0]
            features.setdefault(name, []).append(x.abs().reshape(-1, x.shape[-1]).mean(0))

        return keep

    for name, module in model.named_modules():
        if hasattr(module, "weight") and "embed" not in name:
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        for block in blocks:
            model(block)
    aim = AimConfig((0.4,), Settings(Calibration(str(family["text"]), n_samples=40, block_size=64), reference=True))
    relaxed = weights(relax(str(merged), str(family["base"]), aim, OutputConfig(tmp_path / "out"), None))
    base, before = weights(family["base"]), weights(merged)
    assert len(features) == len(base) - 1
    for name, tensor in base.items():
        module = name.removesuffix(".weight")
        if module not in features:
            assert torch.equal(relaxed[name], before[name])
            continue
        a = sum(features[module]).float()
        a = a / a.max()
        expected = (tensor + (before[name] - tensor) * (1 - a * (1 - 0.4))).to(torch.bfloat16)
        assert torch.equal(relaxed[name], expected), name
