"""performAIM.py --config, --dry_run, --json and --from_lock, as merge.py has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import merge
from common.cli import run
from performAIM import main


@pytest.fixture(scope="module")
def importance(family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base's importance file."""
    folder = tmp_path_factory.mktemp("importance")
    settings = {"calibration": family["text"], "block_size": 64, "n_samples": 8, "importance": folder / "importance"}
    assert run(main, [*command(family, folder / "out"), *(f"--{k}={v}" for k, v in settings.items())]) == 0
    return folder / "importance"


def command(family: dict[str, Path], out: Path | None, *more: object) -> list[str]:
    """A relaxation of a by its base."""
    where = [] if out is None else ["--save_path", out]
    listed = ["--merged_model", family["a"], "--pretrained_model_name", family["base"], *where, "--quiet", *more]
    return list(map(str, listed))


def data(folder: Path) -> bytes:
    """The weights of a result."""
    return (folder / "model.safetensors").read_bytes()


def written(file: Path, family: dict[str, Path], importance: Path, **more: Any) -> list[str]:
    """--config FILE with the relaxation of a, and these keys."""
    keys = {"merged_model": str(family["a"]), "pretrained_model_name": str(family["base"]), **more}
    file.write_text(yaml.safe_dump({"importance": str(importance), **keys}))
    return ["--config", str(file), "--quiet"]


def test_a_file_says_what_flags_say(family: dict[str, Path], importance: Path, tmp_path: Path) -> None:
    """Every flag may stand in the file under its name, to the same bytes; a flag wins over the file."""
    more = {
        "omega": [0.3],
        "include": "layers",
        "dtype": "float32",
        "save_path": str(tmp_path / "file"),
        "relax_tied": True,
    }
    assert run(main, written(tmp_path / "r.yml", family, importance, **more)) == 0
    flags = ["--importance", importance, "--omega", 0.3, "--include", "layers", "--dtype", "float32", "--relax_tied"]
    assert run(main, command(family, tmp_path / "flags", *flags)) == 0
    assert data(tmp_path / "file") == data(tmp_path / "flags")
    other = [*written(tmp_path / "r.yml", family, importance, **more), "--omega", "0.9"]
    assert run(main, [*other, "--save_path", str(tmp_path / "won")]) == 0
    lock = json.loads((tmp_path / "won" / "merge.lock.json").read_text())
    assert lock["recipe"]["omega"] == 0.9


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"omgea": 0.4}, "--config: 'omgea' is no flag of performAIM.py. Did you mean 'omega'?"),
        ({"from_lock": "x"}, "--config: 'from_lock' is no flag of performAIM.py."),
        ({"n_samples": "many"}, "--config: n_samples must be a whole number, found 'many'."),
        ({"n_samples": True}, "--config: n_samples must be a whole number, found True."),
        ({"relax_tied": "often"}, "--config: relax_tied must be true or false, found 'often'."),
        ({"dtype": "float61"}, "--config: dtype must be one of bfloat16, float16, float32, found 'float61'."),
        ({"omega": {"a": 1}}, "--config: omega must be a value, not keys and values, found {'a': 1}."),
        ({"omega": 3}, "--omega must be in [0, 1]"),
        ({"save_path": None}, "--save_path is missing"),
        ({"merged_model": None}, "--merged_model is missing"),
    ],
)
def test_mistakes_in_a_file(
    family: dict[str, Path], importance: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    more: dict[str, Any], sentence: str,
) -> None:  # fmt: skip
    """Each is one sentence with exit code 2, and nothing is written."""
    keys = {"save_path": str(tmp_path / "out"), **more}
    assert run(main, written(tmp_path / "r.yml", family, importance, **keys)) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")
    assert not (tmp_path / "out").exists()


def test_dry_run(family: dict[str, Path], importance: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan of a relaxation in words and as JSON: models, tensors, bytes, and what will be relaxed; no file is
    written, and no --save_path is needed."""
    before = sorted(tmp_path.rglob("*"))
    more = ["--importance", importance, "--dry_run"]
    assert run(main, command(family, None, *more)) == 0
    said = capsys.readouterr().out
    assert "21 tensors" in said
    assert "Relaxing 20 tensors with omega 0.4" in said
    assert run(main, command(family, tmp_path / "out", *more, "--json", "--omega", "0.2,0.6")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["program"] == "performAIM.py"
    assert [model["role"] for model in plan["models"]] == ["model", "base"]
    assert plan["recipe"]["omega"] == [0.2, 0.6]
    assert plan["bytes_to_write"] == 2 * sum(t.numel() * 2 for t in weights_of(family["a"]))
    assert sorted(tmp_path.rglob("*")) == before
    assert run(main, command(family, tmp_path / "out", "--json")) == 2
    assert "--json goes with --dry_run" in capsys.readouterr().err


def weights_of(folder: Path) -> list[Any]:
    """The tensors of a checkpoint."""
    from tests.helpers.tiny import weights

    return list(weights(folder).values())


def test_from_lock(
    family: dict[str, Path], importance: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A relaxation is repeated to the same bytes from its lock, by performAIM.py as by merge.py; with inputs that lie
    elsewhere too; a setting beside it, and the lock of a merge, are refused."""
    assert run(main, command(family, tmp_path / "out", "--importance", importance, "--omega", "0.3")) == 0
    again = ["--from_lock", str(tmp_path / "out"), "--quiet", "--save_path"]
    moved = ["--merged_model", str(family["a"]), "--pretrained_model_name", str(family["base"])]
    for i, (script, more) in enumerate(((main, []), (main, moved), (merge.main, []))):
        assert run(script, [*again, str(tmp_path / str(i)), *more]) == 0
        assert data(tmp_path / str(i)) == data(tmp_path / "out")
    assert run(main, ["--from_lock", str(tmp_path / "out"), "--dry_run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["omega"] == [0.3]
    assert run(main, [*again, str(tmp_path / "x"), "--omega", "0.1"]) == 2
    assert "leave out --omega" in capsys.readouterr().err
    for script in (main, merge.main):
        assert run(script, [*again, str(tmp_path / "x"), "--config", "r.yml"]) == 2
        assert "leave out --config" in capsys.readouterr().err
    models = ["--base_model", str(family["base"]), "--models_to_merge", str(family["a"]), "--method", "ties"]
    assert run(merge.main, ["--quiet", *models, "--save_path", str(tmp_path / "merged")]) == 0
    assert run(main, ["--from_lock", str(tmp_path / "merged"), "--save_path", str(tmp_path / "y")]) == 2
    assert "The lock is of merge.py; repeat it by `python merge.py --from_lock`." in capsys.readouterr().err
