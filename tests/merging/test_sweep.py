"""Several omegas from one read: each result is that of a run of its own, whole, locked, and taken up again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from aim.calibration.config import Calibration
from aim.config import AimConfig
from aim.measure import Settings
from aim.omegas import parse_omegas
from aim.pipeline import relax, relaxation_spec
from common.errors import UsageError
from merging.checkpoints.storage import StoredWeights
from merging.output.writer import ShardedWriter
from merging.pipeline import merge
from merging.plan.merge_plan import OutputConfig
from merging.recipe import make_recipe
from tests.helpers.tiny import weights

OMEGAS = (0.0, 0.4, 1.0)
NAMES = ("omega-0", "omega-0.4", "omega-1")


@pytest.fixture(scope="module")
def settings(family, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Calibration on the family's text, kept in a file."""
    file = tmp_path_factory.mktemp("importance") / "imp"
    found = Settings(Calibration(str(family["text"]), n_samples=40, block_size=64), file)
    out = OutputConfig(tmp_path_factory.mktemp("first") / "out")
    relax(str(family["a"]), str(family["base"]), AimConfig((0.5,), found), out, None)
    return found


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the run record, which has the time in it, and the card, which has the folder's name."""
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name not in ("run_record.json", "README.md")}


def test_a_sweep_is_its_single_runs(family, settings: Settings, tmp_path: Path) -> None:
    """performAIM with three omegas makes three folders, each with the bytes, lock and configs of a run with that omega
    alone; the one of omega 1 has the merged weights."""
    both = (str(family["a"]), str(family["base"]))
    out = relax(*both, AimConfig(OMEGAS, settings), OutputConfig(tmp_path / "sweep", max_shard_size="30KB"), None)
    assert sorted(p.name for p in out.iterdir()) == [*NAMES, "run_record.json"]
    for omega, name in zip(OMEGAS, NAMES, strict=True):
        single = OutputConfig(tmp_path / name, max_shard_size="30KB")
        alone = relax(*both, AimConfig((omega,), settings), single, None)
        assert files(out / name) == files(alone)
        record = json.loads((out / name / "run_record.json").read_text())
        assert (record["lineage"]["omega"], record["relaxation"]["omega"]) == (omega, omega)
    merged = weights(family["a"])
    assert all(torch.equal(tensor, merged[name]) for name, tensor in weights(out / "omega-1").items())


def test_a_sweep_in_one_pass(family, settings: Settings, tmp_path: Path) -> None:
    """merge.py's omegas in one pass are its single ones too, DARE's masks included."""
    flags = {"method": "dare_ties", "base_model": str(family["base"]), "density": 0.5, "scaling": 0.7,
             "models_to_merge": [str(family[name]) for name in "ab"]}  # fmt: skip
    recipe = make_recipe(flags, {})
    output = OutputConfig(tmp_path / "sweep")
    out = merge(recipe, output, relaxation_spec(AimConfig(OMEGAS, settings), output, recipe))
    for omega, name in zip(OMEGAS, NAMES, strict=True):
        single = OutputConfig(tmp_path / name)
        alone = merge(recipe, single, relaxation_spec(AimConfig((omega,), settings), single, recipe))
        assert files(out / name) == files(alone)
    plain = merge(recipe, OutputConfig(tmp_path / "plain"))
    assert all(torch.equal(tensor, weights(plain)[name]) for name, tensor in weights(out / "omega-1").items())


def test_one_read_for_all(family, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six omegas open each input tensor as often as one does."""
    opened: list[str] = []
    real = StoredWeights.rows
    monkeypatch.setattr(StoredWeights, "rows", lambda self, name: (opened.append(name), real(self, name))[1])
    counts = []
    for i, omegas in enumerate(((0.4,), (0.0, 0.2, 0.4, 0.6, 0.8, 1.0))):
        opened.clear()
        output = OutputConfig(tmp_path / str(i), load_check=False)
        relax(str(family["a"]), str(family["base"]), AimConfig(omegas, settings), output, None)
        counts.append(sorted(opened))
    assert counts[0] == counts[1]


def test_interrupted_sweep_goes_on(family, settings: Settings, tmp_path: Path, monkeypatch, capsys) -> None:
    """Stopped between two writers of one tensor, a sweep goes on with --resume to the same bytes in every folder."""
    both = (str(family["a"]), str(family["base"]))
    whole = relax(*both, AimConfig(OMEGAS, settings), OutputConfig(tmp_path / "whole" / "out"), None)
    output = OutputConfig(tmp_path / "cut" / "out")
    real = ShardedWriter.end

    def failing(self, remark):  # type: ignore[no-untyped-def]
        if self.done == 6 and self.folder.name == NAMES[1]:  # the first has ended this tensor, the second has not
            raise KeyboardInterrupt
        real(self, remark)

    with monkeypatch.context() as patch:
        patch.setattr(ShardedWriter, "end", failing)
        with pytest.raises(KeyboardInterrupt):
            relax(*both, AimConfig(OMEGAS, settings), output, None)
    assert not output.save_path.exists()
    capsys.readouterr()
    again = relax(*both, AimConfig(OMEGAS, settings), OutputConfig(**{**vars(output), "resume": True}), None)
    assert "6 tensors are done" in capsys.readouterr().err
    for name in NAMES:
        assert files(again / name) == files(whole / name)
        assert not (again / name / "journal.jsonl").exists()


def test_a_sweep_of_other_omegas_does_not_go_on(family, settings: Settings, tmp_path: Path, monkeypatch) -> None:
    """An interrupted run for other omegas is refused with --resume: its folders would hold other results."""
    both = (str(family["a"]), str(family["base"]))
    output = OutputConfig(tmp_path / "out")
    real = ShardedWriter.begin
    with monkeypatch.context() as patch:
        patch.setattr(ShardedWriter, "begin", lambda s, n: (_ for _ in ()).throw(OSError(28, "full")) if s.done > 3
                      else real(s, n))  # fmt: skip
        with pytest.raises(OSError, match="full"):
            relax(*both, AimConfig((0.2, 0.4), settings), output, None)
    resumed = OutputConfig(**{**vars(output), "resume": True})
    with pytest.raises(UsageError, match="had another recipe"):
        relax(*both, AimConfig((0.3, 0.4), settings), resumed, None)


def test_a_result_of_a_sweep_repeats(family, settings: Settings, tmp_path: Path, run_script) -> None:
    """The lock in each folder repeats that result alone, and verify.py recomputes its tensors."""
    both = (str(family["a"]), str(family["base"]))
    out = relax(*both, AimConfig((0.2, 0.6), settings), OutputConfig(tmp_path / "sweep"), None)
    again = tmp_path / "again"
    done = run_script("merge.py", "--from_lock", out / "omega-0.6", "--save_path", again)
    assert done.returncode == 0, done.stderr
    assert (again / "model.safetensors").read_bytes() == (out / "omega-0.6" / "model.safetensors").read_bytes()
    done = run_script("scripts/verify.py", out / "omega-0.2", "--recompute", "5")
    assert (done.returncode, done.stdout.strip()) == (0, "GOOD"), done.stderr


def test_a_lock_with_keys_of_another_version(family, settings: Settings, tmp_path: Path, run_script) -> None:
    """A lock whose recipe has a key that this version does not know is refused, by name, for every kind of recipe."""
    out = relax(str(family["a"]), str(family["base"]), AimConfig((0.4,), settings), OutputConfig(tmp_path / "r"), None)
    merged = merge(
        make_recipe({"method": "linear", "models_to_merge": f"{family['a']},{family['b']}"}, {}),
        OutputConfig(tmp_path / "m"),
    )
    for folder in (out, merged):
        lock = json.loads((folder / "merge.lock.json").read_text())
        lock["recipe"]["relax_tide"] = True
        (tmp_path / "old.json").write_text(json.dumps(lock))
        done = run_script("merge.py", "--from_lock", tmp_path / "old.json", "--save_path", tmp_path / "again")
        assert done.returncode == 2, done.stderr
        assert "The recipe of the lock is not one of this version: " in done.stderr
        assert "has no parameter 'relax_tide'" in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("abc", "must be a number"),
        ("0.2,,x", "must be a number"),
        ("1.2", r"must be in \[0, 1\]"),
        ("0.2,-0.1", r"must be in \[0, 1\]"),
        ("nan", r"must be in \[0, 1\]"),
        ("", "needs at least one value"),
        (",", "needs at least one value"),
        ("0.4,0.40", "given twice"),
    ],
)
def test_omegas_that_cannot_be(text: str, sentence: str) -> None:
    """What is no list of numbers in [0, 1], each once, is one sentence."""
    with pytest.raises(UsageError, match=sentence):
        parse_omegas(text)


def test_flags_yaml_and_lock_say_the_same(family, tmp_path: Path) -> None:
    """What is asked of AIM survives the way through a recipe: every key that is not at its default, and no other."""
    given = {
        "omega": "0.1,0.3", "importance": str(tmp_path / "imp"), "relax_include": "layers", "relax_exclude": "mlp",
        "keep_base": "x", "relax_tied": True, "min_tokens": 5, "calibration_mode": "whole", "hidden_states": "disk",
        "batch_size": "7", "calibration_dtype": "float32", "calibration": str(family["text"]), "n_samples": 9,
        "block_size": 33, "text_field": "body", "calibration_seed": 3,
    }  # fmt: skip
    asked = AimConfig.from_mapping(given)
    recipe = asked.as_recipe()
    assert AimConfig.from_mapping({**recipe, "omega": [0.1, 0.3]}) == asked
    assert set(recipe) == set(given) - {"omega"}
    assert AimConfig.from_mapping({"omega": 0.4}).as_recipe() == {}


def test_plot_of_a_sweep(family, settings: Settings, tmp_path: Path, run_script) -> None:
    """scripts/plot_sweep.py tells how much of each layer's task vector every omega leaves: all of it at 1, its own norm
    over the merge's elsewhere, computed here from the weights; outputs of two merges, or none, are refused."""
    both = (str(family["a"]), str(family["base"]))
    out = relax(*both, AimConfig((0.2, 1.0), settings), OutputConfig(tmp_path / "sweep", layer_stats=True), None)
    done = run_script("scripts/plot_sweep.py", out, "--out", tmp_path / "plot.png")
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("| model.layers.0 "))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    base, merged, relaxed = weights(family["base"]), weights(family["a"]), weights(out / "omega-0.2")
    norms = [
        sum(float((w[n].double() - base[n].double()).square().sum()) for n in base if ".layers.0." in n) ** 0.5
        for w in (merged, relaxed)
    ]
    assert float(cells[1]) == pytest.approx(norms[0], rel=1e-3)
    assert float(cells[2].removesuffix(" %")) == pytest.approx(100 * norms[1] / norms[0], abs=0.2)
    assert cells[3] == "100.0 %"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    other = relax(
        str(family["b"]), both[1], AimConfig((0.5,), settings), OutputConfig(tmp_path / "b", layer_stats=True), None
    )
    for folders, sentence in (((out / "omega-1", other), "is of another merge"), ((tmp_path,), "has no run_record")):
        done = run_script("scripts/plot_sweep.py", *folders)
        assert done.returncode != 0
        assert sentence in done.stderr
