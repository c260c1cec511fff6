"""Distribution of importance, what AIM takes back of task vectors, and the two scripts that measure them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from aim.calibration.config import Calibration
from aim.config import AimConfig
from aim.importance import Importance
from aim.measure import Settings
from aim.pipeline import relax
from aim.report.distribution import CURVE, LEVELS, QUANTILES, distributions, even_shares, taken_back
from aim.scaling import Scaling
from common.cli import run
from common.errors import CheckpointError
from merging.checkpoints.checkpoint import open_checkpoint
from merging.pipeline import merge
from merging.plan.merge_plan import OutputConfig
from merging.recipe import make_recipe
from scripts.benchmarks.importance_samples import SCALINGS, compare, measure, run_source
from scripts.plot_importance import as_text, document, main, plot
from tests.aim.test_summary import made
from tests.helpers.tiny import weights

OMEGA = 0.4
TWO_LAYERS = {
    "model.layers.0.self_attn.o_proj.weight": [1.0, 2.0, 3.0, 4.0],
    "model.layers.1.self_attn.o_proj.weight": [4.0, 4.0, 4.0, 8.0],
    "model.norm.weight": [0.0, 0.0, 0.0, 5.0],
}
S = [0.25, 0.5, 0.75, 1.0, 0.5, 0.5, 0.5, 1.0]
"""a / max(a) of the two layers."""


@pytest.fixture(scope="module")
def measured(family, tmp_path_factory) -> dict[str, Path]:
    """A base, a merge and its relaxation in float32, and the importance file."""
    folder = tmp_path_factory.mktemp("measured")
    result = {"importance": folder / "base.safetensors"}
    for name, source in (("base", "base"), ("merged", "a")):
        recipe = make_recipe(
            {"method": "passthrough", "models_to_merge": [str(family[source])], "dtype": "float32"}, {}
        )
        result[name] = merge(recipe, OutputConfig(folder / name))
    calibration = Calibration(str(family["text"]), n_samples=40, block_size=64)
    config = AimConfig((OMEGA,), Settings(calibration, importance_file=result["importance"]))
    output = OutputConfig(folder / "relaxed")
    result["relaxed"] = relax(str(result["merged"]), str(result["base"]), config, output, None)
    return result


def test_distribution_by_hand() -> None:
    """Channels of all layers of a kind count alike, each layer by its own maximum; a median of 0 gives no ratio."""
    projections, norm = distributions(made(TWO_LAYERS))
    assert (projections.kind, projections.layers, projections.channels) == ("self_attn.o_proj", 2, 4)
    assert projections.quantiles == pytest.approx(np.quantile(S, QUANTILES))
    assert projections.curve == pytest.approx(np.quantile(S, CURVE))
    assert projections.mean == pytest.approx(np.mean(S))
    assert LEVELS == (0.1, 0.5)
    assert projections.above == (1.0, 3 / 8)
    assert projections.largest_to_median == 2.0
    assert norm.kind == "model.norm"
    assert norm.largest_to_median is None
    assert norm.above == (0.25, 0.25)


def test_normalization_of_a_distribution() -> None:
    """By the median in place of the maximum every channel at or above it has s = 1."""
    (projections, _) = distributions(made(TWO_LAYERS), Scaling("quantile", 0.5))
    assert projections.above == (1.0, 7 / 8)
    assert projections.quantiles[-1] == 1.0


def test_even_share_by_hand() -> None:
    """A task vector with the same norm in every channel keeps the root of the mean of the squared factors."""
    shares = even_shares(made(TWO_LAYERS), OMEGA)
    kept = math.sqrt(sum((1 - 0.6 * s) ** 2 for s in S) / len(S))
    assert shares["self_attn.o_proj"] == pytest.approx(1 - kept)
    assert even_shares(made(TWO_LAYERS), 1.0) == {"self_attn.o_proj": 0.0, "model.norm": 0.0}


def test_share_is_that_of_a_relaxation(measured) -> None:
    """The share taken back per kind is that of the norms of the checkpoints before and after performAIM.py."""
    importance = Importance.load(measured["importance"])
    base, merged = (open_checkpoint(str(measured[name])) for name in ("base", "merged"))
    shares = taken_back(importance, base, merged, OMEGA, Scaling())
    theta_0, theta_m, theta = (weights(measured[name]) for name in ("base", "merged", "relaxed"))
    for kind, part in (("mlp.down_proj", "down_proj"), ("self_attn.o_proj", "o_proj"), ("model.norm", "model.norm")):
        names = [name for name in theta_0 if part in name]
        before, after = (
            math.sqrt(sum(float((model[n].double() - theta_0[n].double()).square().sum()) for n in names))
            for model in (theta_m, theta)
        )
        assert shares[kind] == pytest.approx(1 - after / before, abs=1e-6), kind


def test_a_merge_of_other_shapes_is_refused(measured, checkpoint: Path) -> None:
    """A tensor that the merge lacks or has in another shape is named."""
    importance = Importance.load(measured["importance"])
    base, other = open_checkpoint(str(measured["base"])), open_checkpoint(str(checkpoint))
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.0\..* give a merge of this base"):
        taken_back(importance, base, other, OMEGA, Scaling())


def test_script(measured, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Tables by statistic, normalization and merge; results keep entries of other names; the figure has a line for each
    kind."""
    results = tmp_path / "results.json"
    results.write_text("{}")
    arguments = [measured["importance"], "--normalizations", "max,0.9", "--results", results]
    merged = ["--base_model", measured["base"], "--merged_model", measured["merged"]]
    assert run(main, [*map(str, arguments), "--names", "first"]) == 0
    assert run(main, [*map(str, [*arguments, *merged]), "--names", "second", "--out", str(tmp_path / "p.png")]) == 0
    printed = capsys.readouterr().out
    entries = json.loads(results.read_text())
    assert list(entries) == ["first", "second"]
    assert list(entries["second"]["taken_back"]["quantile 0.9"]) == ["even", "merged"]
    assert "| mean_abs, quantile 0.9 | merged " in printed
    assert as_text({"second": entries["second"]}) in printed
    assert "first: mean_abs, normalization max" in document(results)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    ax = plot({"first": entries["first"]}).axes[0]
    rows = entries["first"]["distributions"]["max"]
    assert {line.get_label(): list(line.get_ydata()) for line in ax.lines} == {r["kind"]: r["curve"] for r in rows}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--names", "a,b"], "--names must be a different name for each of 1 files"),
        (["--normalizations", "max,1.5"], "--normalizations must be max or quantiles in (0, 1], found '1.5'"),
        (["--normalizations", "mx"], "found 'mx'"),
        (["--merged_model", "x"], "--base_model and --merged_model belong together"),
        (["--omega", "2"], "--omega must be in [0, 1]"),
        (["--out", "figure.gif"], "--out must be a .png, .svg or .pdf file"),
    ],
)
def test_script_refuses(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Usage errors name the flag before a file is read."""
    assert run(main, ["absent.safetensors", *flags]) == 2
    assert message in capsys.readouterr().err


def test_block_means_are_calibrations(family) -> None:
    """The mean over the blocks of the first texts is the importance that calibration with so many texts measures."""
    from aim.capture.base_model import load_whole
    from aim.measure import importance_of

    calibration = Calibration(str(family["text"]), n_samples=40, block_size=64)
    base = open_checkpoint(str(family["base"]))
    source = run_source(base, load_whole(base, "float32", torch.device("cpu")), calibration, [8, 16])
    for count, (blocks, touched) in source.counts.items():
        settings = Settings(replace(calibration, n_samples=count), calibration_dtype="float32")
        expected = importance_of(base, settings, torch.device("cpu"), Path("state")).activations
        assert 0 < blocks <= touched < source.blocks
        for name, mean in source.mean(slice(0, blocks)).items():
            torch.testing.assert_close(mean.float(), expected[name], rtol=1e-5, atol=1e-7)


def test_comparison_by_hand() -> None:
    """s = (1, 0.5) against (1, 0.25): half of one channel; the factor at 0.4 changes by 0.6 of 0.25."""
    one, other = {"w": torch.tensor([4.0, 2.0])}, {"w": torch.tensor([4.0, 1.0])}
    result = compare(one, other, SCALINGS["max"])
    assert (result["median"], result["largest"], result["importance"]) == (0.0, 0.5, 0.25)
    assert result["factor"] == pytest.approx(0.15)
    assert result["cosine"] == pytest.approx(1.125 / math.sqrt(1.25 * 1.0625), rel=1e-3)
    assert compare(one, one, SCALINGS["max"])["factor"] == 0.0


def test_rows_of_a_source(family) -> None:
    """The first source is compared with its other texts, another one with all of the first."""
    files = f"{family['text']},{family['text'].with_name('again.jsonl')}"
    family["text"].with_name("again.jsonl").write_bytes(family["text"].read_bytes())
    calibration = Calibration(files, n_samples=80, block_size=64)
    entry = list(measure(str(family["base"]), calibration, [8], 16))[-1]
    first, other = entry["rows"]
    assert (first["texts"], other["texts"], other["against"]) == (8, 16, family["text"].name)
    assert first["tokens"] + first["against_tokens"] <= other["against_tokens"]
