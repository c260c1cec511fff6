"""Laws of AIM's statistics, normalizations and controls, and how their results are recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aim import controls
from aim.calibration.config import Calibration
from aim.capture.hooks import LayerInput
from aim.capture.statistics import Batch, Sums
from aim.capture.whole_model import calibrate
from aim.config import AimConfig
from aim.importance import Importance
from aim.measure import Settings
from aim.pipeline import relax, relaxation_spec
from aim.relax import importance
from aim.scaling import CONTROLS, Scaling
from aim.statistics import find_statistic, statistic_names
from common.errors import CheckpointError, UsageError
from eval.results.result import Lineage
from merging.pipeline import merge
from merging.plan.merge_plan import OutputConfig
from merging.recipe import make_recipe
from tests.helpers.tiny import make_gpt2, weights

OMEGA = 0.25


@pytest.fixture(scope="module")
def fp32(family, tmp_path_factory) -> dict[str, Path]:
    """The base and one fine-tuned model in float32, so that no rounding hides a factor."""
    folder, found = tmp_path_factory.mktemp("fp32"), {}
    for name in ("base", "a"):
        recipe = make_recipe({"method": "passthrough", "models_to_merge": [str(family[name])], "dtype": "float32"}, {})
        found[name] = merge(recipe, OutputConfig(folder / name))
    return found


@pytest.fixture(scope="module")
def settings(family, tmp_path_factory) -> Settings:
    """Calibration on the family's text, the importance kept in a file."""
    file = tmp_path_factory.mktemp("importance") / "imp.safetensors"
    return Settings(Calibration(str(family["text"]), n_samples=40, block_size=64), importance_file=file)


@pytest.fixture(scope="module")
def relaxed(fp32, settings, tmp_path_factory):
    """Return (task vectors, relaxed task vectors) fp64 by tensor, of a run with a scaling."""
    folder = tmp_path_factory.mktemp("relaxed")
    cache: dict[Scaling, Path] = {}

    def run(scaling: Scaling) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        if scaling not in cache:
            aim = AimConfig((OMEGA,), settings, scaling=scaling)
            output = OutputConfig(folder / str(len(cache)))
            cache[scaling] = relax(str(fp32["a"]), str(fp32["base"]), aim, output, None)
        base, merged, found = weights(fp32["base"]), weights(fp32["a"]), weights(cache[scaling])
        names = [name for name in base if name.endswith("proj.weight")]
        return (
            {name: merged[name].double() - base[name].double() for name in names},
            {name: found[name].double() - base[name].double() for name in names},
        )

    run.folder = cache  # type: ignore[attr-defined]
    return run


def factors(pair: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return s (channels,) of each matrix, recovered from what is left of its task vector."""
    before, after = pair
    left = {name: (after[name] * before[name]).sum(0) / before[name].square().sum(0) for name in before}
    return {name: (1.0 - f) / (1.0 - OMEGA) for name, f in left.items()}


def test_statistics_of_hand_worked_activations() -> None:
    """Two batches of x = [[3, 0], [-4, 1]] and [[0, -2], [1, 1]]: mean |x| = (2, 1), mean square = (6.5, 1.5), rms its
    root; what is summed over batches in both halves is the statistic of all tokens."""
    batches = [torch.tensor([[3.0, 0.0], [-4.0, 1.0]]), torch.tensor([[0.0, -2.0], [1.0, 1.0]])]
    expected = {"mean_abs": [2.0, 1.0], "mean_square": [6.5, 1.5], "rms": [6.5**0.5, 1.5**0.5]}
    assert set(statistic_names()) == set(expected)
    assert statistic_names()[0] == "mean_abs"
    for name, values in expected.items():
        statistic, sums = find_statistic(name), Sums()
        for half, x in enumerate(batches):
            batch = Batch(statistic)
            batch(LayerInput("w", -1, x, x))
            sums.add(batch, half)
        assert torch.allclose(sums.means(statistic).means["w"], torch.tensor(values)), name


def test_statistics_of_a_stack_of_experts() -> None:
    """An expert's rms is over its own tokens; one without tokens has zeros."""
    x = torch.zeros(2, 3, 2)
    x[0, 0], x[0, 1] = torch.tensor([3.0, 1.0]), torch.tensor([4.0, 1.0])
    statistic, sums = find_statistic("rms"), Sums()
    batch = Batch(statistic)
    batch(LayerInput("experts", -1, x, x, experts=2))
    sums.add(batch, 0)
    assert torch.allclose(sums.means(statistic).means["experts"], torch.tensor([[12.5**0.5, 1.0], [0.0, 0.0]]))


def test_a_mean_square_is_the_square_of_an_rms(family) -> None:
    """Measured on a model, whole: mean_square = rms^2 >= mean_abs^2 in every channel (Jensen)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family["base"], dtype=torch.float32).eval()
    blocks = torch.randint(3, 300, (4, 32), generator=torch.Generator().manual_seed(1))
    found = {n: calibrate(model, blocks, statistic=find_statistic(n)).means for n in statistic_names()}
    for name, square in found["mean_square"].items():
        assert torch.allclose(found["rms"][name].square(), square, rtol=1e-5), name
        assert bool((square >= found["mean_abs"][name].square() * (1 - 1e-5)).all()), name


@pytest.mark.parametrize("way", ["whole", "layerwise"])
def test_each_way_of_calibration_measures_the_statistic(family, tmp_path: Path, way: str) -> None:
    """A whole and a layerwise calibration write the same rms, under its name."""
    file = tmp_path / "imp"
    given = Settings(
        Calibration(str(family["text"]), n_samples=40, block_size=64), file, calibration_mode=way, statistic="rms",
        calibration_dtype="float32",
    )  # fmt: skip
    relax(str(family["a"]), str(family["base"]), AimConfig((0.5,), given), OutputConfig(tmp_path / "out"), None)
    whole = replace(given, importance_file=tmp_path / "whole", calibration_mode="whole")
    relax(str(family["a"]), str(family["base"]), AimConfig((0.5,), whole), OutputConfig(tmp_path / "two"), None)
    one, other = Importance.load(file), Importance.load(tmp_path / "whole")
    assert one.statistic == other.statistic == "rms_input"
    assert all(torch.allclose(a, other.activations[n], rtol=1e-5) for n, a in one.activations.items())


def test_another_statistic_is_refused(fp32, settings: Settings, relaxed, tmp_path: Path) -> None:
    """An importance file of one statistic does not serve another, in a run and in --dry_run."""
    relaxed(Scaling())  # writes the file
    other = replace(settings, statistic="rms")
    both = str(fp32["a"]), str(fp32["base"])
    with pytest.raises(CheckpointError, match=r"holds the statistic mean_abs_input, and --statistic rms needs"):
        relax(*both, AimConfig((OMEGA,), other), OutputConfig(tmp_path / "out"), None)
    from aim.pipeline import plan_relaxation

    plan = plan_relaxation(*both, AimConfig((OMEGA,), other), OutputConfig(tmp_path / "out"), None, headers_only=True)
    with pytest.raises(CheckpointError, match="holds the statistic mean_abs_input"):
        plan.relaxation.preview(plan.base, plan.model)


def test_recovered_factors_are_the_importance(relaxed, settings: Settings) -> None:
    """The check of the checks: AIM's own factors come back as s = a / max(a)."""
    found = factors(relaxed(Scaling()))
    stored = Importance.load(settings.importance_file).activations
    for name, s in found.items():
        assert torch.allclose(s.float(), importance(stored[name]), atol=1e-4), name


def test_uniform_has_the_mean(relaxed) -> None:
    """One factor per matrix, with the mean of AIM's."""
    aim, uniform = factors(relaxed(Scaling())), factors(relaxed(Scaling(control="uniform")))
    for name, s in uniform.items():
        assert float(s.max() - s.min()) < 1e-4, name
        assert abs(float(s.mean() - aim[name].mean())) < 1e-4, name


def test_uniform_norm_has_the_norm(relaxed) -> None:
    """The task vector is multiplied by one factor, and keeps the norm that AIM leaves it."""
    _, aim = relaxed(Scaling())
    before, found = relaxed(Scaling(control="uniform_norm"))
    for name, tau in found.items():
        assert float(tau.norm() / aim[name].norm()) == pytest.approx(1.0, abs=1e-5), name
        factor = float(tau.norm() / before[name].norm())
        assert torch.allclose(tau, factor * before[name], atol=1e-6), name


@pytest.mark.parametrize("control", ["permuted", "reversed"])
def test_orders_keep_the_multiset(relaxed, control: str) -> None:
    """The values of s are AIM's, in another order; reversed gives the largest to the least active channel."""
    aim, found = factors(relaxed(Scaling())), factors(relaxed(Scaling(control=control)))
    for name, s in found.items():
        assert torch.allclose(s.sort().values, aim[name].sort().values, atol=1e-4), name
        assert not torch.allclose(s, aim[name], atol=1e-2), name
        if control == "reversed":
            assert int(s.argmax()) == int(aim[name].argmin()), name
            assert int(s.argmin()) == int(aim[name].argmax()), name


def test_reversed_order_by_hand() -> None:
    """The k-th smallest entry gets the k-th largest value, in each matrix of a stack."""
    s = torch.tensor([[0.1, 1.0, 0.5], [1.0, 0.0, 0.25]])
    assert torch.equal(controls.reversed_order(s), torch.tensor([[1.0, 0.1, 0.5], [0.0, 1.0, 0.25]]))


def test_random_draws_from_the_distribution() -> None:
    """Every value is one of AIM's for the matrix; over many channels the distributions agree; seed and name count."""
    s = importance(torch.rand(2, 20000, generator=torch.Generator().manual_seed(3)) ** 4)
    scaling = Scaling(control="random")
    drawn = scaling.importance("w", s)
    for row, own in zip(drawn, s, strict=True):
        assert bool(torch.isin(row, own).all())
        for q in (0.1, 0.5, 0.9):
            assert float(row.quantile(q)) == pytest.approx(float(own.quantile(q)), abs=0.02)
    assert torch.equal(drawn, scaling.importance("w", s))
    assert not torch.equal(drawn, scaling.importance("v", s))
    assert not torch.equal(drawn, replace(scaling, control_seed=1).importance("w", s))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(drawn, scaling.importance("w", s))
    finally:
        torch.set_num_threads(before)


def test_weight_norm_knows_no_activation(fp32, settings: Settings, relaxed, tmp_path: Path) -> None:
    """s is the base's mean |W| per channel over its maximum; the bytes are the same with any other activations."""
    found = factors(relaxed(Scaling(control="weight_norm")))
    base = weights(fp32["base"])
    for name, s in found.items():
        a = base[name].double().abs().mean(0)
        assert torch.allclose(s, a / a.max(), atol=1e-4), name
    stored = Importance.load(settings.importance_file)
    other = replace(stored, activations={n: torch.rand_like(a) + 0.1 for n, a in stored.activations.items()})
    other.save(tmp_path / "other")
    given = replace(settings, importance_file=tmp_path / "other")
    aim = AimConfig((OMEGA,), given, scaling=Scaling(control="weight_norm"))
    out = relax(str(fp32["a"]), str(fp32["base"]), aim, OutputConfig(tmp_path / "out"), None)
    same = weights(relaxed.folder[Scaling(control="weight_norm")])
    assert all(torch.equal(tensor, same[name]) for name, tensor in weights(out).items())


def test_weight_norm_runs_along_the_inputs(tmp_path: Path) -> None:
    """A Conv1D, stored (in, out), has its channels along axis 0; a stack of experts a row per expert."""
    weight = torch.arange(12.0).reshape(3, 4) - 4
    assert torch.allclose(controls.weight_magnitudes(weight, 0, False), weight.abs().mean(1))
    stack = torch.randn(5, 3, 4)
    assert torch.allclose(controls.weight_magnitudes(stack, 2, True), stack.abs().mean(1))
    base = make_gpt2(tmp_path / "gpt2")
    model = load_file(base / "model.safetensors")
    name = next(n for n in model if n.endswith("c_fc.weight"))
    assert controls.weight_magnitudes(model[name], 0, False).shape == (48,)


def test_quantile_normalization_by_hand() -> None:
    """s = min(1, a / q): with the median of (1, 2, 4) as q, (0.5, 1, 1); quantile 1 is the maximum."""
    a = torch.tensor([1.0, 2.0, 4.0])
    half = Scaling(normalization="quantile", quantile=0.5)
    assert torch.equal(half.normalize(a), torch.tensor([0.5, 1.0, 1.0]))
    assert torch.equal(Scaling(normalization="quantile", quantile=1.0).normalize(a), importance(a))
    assert torch.equal(half.normalize(torch.tensor([0.0, 0.0, 5.0])), torch.tensor([0.0, 0.0, 1.0]))
    assert torch.equal(half.normalize(torch.zeros(3)), torch.zeros(3))


@pytest.mark.parametrize("control", sorted(CONTROLS))
def test_one_pass_is_two_passes(
    fp32, settings: Settings, relaxed, tmp_path: Path, control: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """merge.py with a control in the same pass writes what performAIM.py makes of the merge, for two omegas, also where
    a tensor would have several blocks; every record names the control."""
    scaling = Scaling(control=control)
    relaxed(scaling)
    recipe = make_recipe({"method": "task_arithmetic", "base_model": str(fp32["base"]),
                          "models_to_merge": [str(fp32["a"])], "scaling": 1.0}, {})  # fmt: skip
    aim = AimConfig((OMEGA, 0.5), settings, scaling=scaling)
    output = OutputConfig(tmp_path / "one")
    monkeypatch.setattr("merging.engine.row_groups.block_elements_for", lambda device: 200)
    out = merge(recipe, output, relaxation_spec(aim, output, recipe))
    monkeypatch.undo()
    plain = merge(recipe, OutputConfig(tmp_path / "plain"))
    two = relax(str(plain), str(fp32["base"]), aim, OutputConfig(tmp_path / "two"), None)
    for folder in (f"omega-{OMEGA:g}", "omega-0.5"):
        made, other = weights(out / folder), weights(two / folder)
        assert all(torch.equal(tensor, other[name]) for name, tensor in made.items())
        for written in (out / folder, two / folder):
            record = json.loads((written / "run_record.json").read_text())
            lock = json.loads((written / "merge.lock.json").read_text())
            assert record["lineage"]["control"] == record["relaxation"]["control"] == lock["recipe"]["control"]
            card = (written / "README.md").read_text()
            assert f"by the control {control} of an experiment, not by AIM" in card
            assert "- activation-informed-merging" not in card  # the tag of the hub
            assert Lineage.of_checkpoint(str(written)).variant == f"control {control}"


def test_from_lock_repeats_a_control(fp32, settings: Settings, relaxed, run_script, tmp_path: Path) -> None:
    """--from_lock repeats a control, its seed included, from the command line."""
    relaxed(Scaling())
    out = tmp_path / "out"
    common = ["--importance", settings.importance_file, "--omega", 0.3, "--quiet"]
    both = ["--merged_model", fp32["a"], "--pretrained_model_name", fp32["base"]]
    kind = ["--control", "permuted", "--control_seed", 3, "--normalization", "quantile", "--quantile", 0.9]
    made = run_script("performAIM.py", *both, *common, *kind, "--save_path", out)
    assert made.returncode == 0, made.stderr
    again = run_script("performAIM.py", "--from_lock", out, "--save_path", tmp_path / "again", "--quiet")
    assert again.returncode == 0, again.stderr
    assert all(torch.equal(t, weights(out)[n]) for n, t in weights(tmp_path / "again").items())
    lineage = json.loads((tmp_path / "again" / "run_record.json").read_text())["lineage"]
    assert (lineage["control"], lineage["normalization"]) == ("permuted", "quantile 0.9")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"control": "unifrom"}, "--control must be one of .* Did you mean 'uniform'"),
        ({"normalization": "min"}, "--normalization must be one of max, quantile"),
        ({"quantile": 0.9}, "--quantile has an effect with --normalization quantile alone"),
        ({"normalization": "quantile", "quantile": 0}, "--quantile must be a number above 0 and at most 1"),
        ({"control": "uniform", "control_seed": 2}, "--control_seed has an effect with --control permuted or random"),
        ({"statistic": "median"}, "--statistic must be one of mean_abs, mean_square, rms"),
    ],
)
def test_unknown_settings_are_refused(given: dict[str, object], message: str) -> None:
    """A misspelled name, a value out of bounds or a setting without effect is one sentence."""
    with pytest.raises(UsageError, match=message):
        AimConfig.from_mapping({"omega": 0.4, **given})


def test_reference_numerics_are_the_originals_alone() -> None:
    """--numerics reference takes no control, normalization or other statistic."""
    for given in ({"control": "uniform"}, {"normalization": "quantile"}, {"statistic": "rms"}):
        with pytest.raises(UsageError, match="--numerics reference"):
            AimConfig.from_mapping({"omega": 0.4, **given}, reference=True)


def test_adapters_take_controls_by_channel_alone(family, settings: Settings, tmp_path: Path) -> None:
    """A factor of equal norm needs whole tensors: refused for an adapter as the result."""
    output = OutputConfig(tmp_path / "out", save_as="adapter")
    recipe = make_recipe({"method": "task_arithmetic", "base_model": str(family["base"]),
                          "models_to_merge": [str(family["a"])]}, {})  # fmt: skip
    with pytest.raises(UsageError, match="--control uniform_norm needs whole tensors"):
        relaxation_spec(AimConfig((OMEGA,), settings, scaling=Scaling(control="uniform_norm")), output, recipe)


def test_tables_name_a_control() -> None:
    """A control has a row of its own under its name and a change to the merge, and is on no front or curve of AIM."""
    from eval.report.fronts import variants
    from eval.report.plots import curved
    from eval.report.report import make_report
    from eval.results.collection import packed, unpacked
    from eval.results.result import EvalResult, Score
    from eval.results.rows import assemble
    from eval.stats.gains import Measure

    merged = Lineage("ties", "base", ("one", "two"))
    kinds = {
        "plain": {}, "aim": {"omega": 0.4}, "uniform": {"omega": 0.4, "control": "uniform"},
        "rms": {"omega": 0.4, "statistic": "rms"}, "low": {"omega": 0.2, "control": "uniform"},
    }  # fmt: skip
    lineages = {
        **dict.fromkeys(("base", "one", "two"), Lineage()),
        **{n: replace(merged, **k) for n, k in kinds.items()},
    }
    results = [
        EvalResult(name, {"A": Score("acc", 50.0 + i), "B": Score("acc", 60.0 - i)}, lineage)
        for i, (name, lineage) in enumerate(lineages.items())
    ]
    again, _ = unpacked(json.loads(packed(results, {})), "collection")
    assert [r.lineage for r in again] == list(lineages.values())
    models = assemble(results, {}, print)
    (family,) = models.families
    assert [row.name for row in family.relaxed] == ["aim"]
    assert not curved(models)
    assert [row.name for variant in variants(models) for row in variant.rows] == ["aim"]
    report = make_report(models, Measure(), print)
    shown = {line.row.name: line.aim for line in report.lines if line.method != "-"}
    assert shown == {"plain": "No", "aim": "Yes", "rms": "AIM rms (0.4)", "uniform": "control uniform (0.4)",
                     "low": "control uniform (0.2)"}  # fmt: skip
    assert all(line.cells[0].change for line in report.lines if line.row.name in ("aim", "uniform", "rms", "low"))
