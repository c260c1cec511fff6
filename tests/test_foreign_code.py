"""Code that comes with a checkpoint is not run, whatever is typed at a question."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.tiny import fine_tune

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("common", "merging", "aim", "eval", "scripts")
LOADERS = ("from_pretrained", "from_config")
WITHOUT_CODE = ("PeftConfig", "PeftModel")
"""Classes whose loaders have no code of a checkpoint to run."""
FLAG = "trust_remote_code"
EXPLICIT = ("settings.trusts_remote_code", "trusts_remote_code")
"""Expressions that stand for --model_args trust_remote_code=true."""


def syntax_trees() -> Iterator[tuple[Path, ast.Module]]:
    """Yield every module of the program."""
    files = [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py")))]
    for file in files:
        yield file, ast.parse(file.read_text(encoding="utf-8"))


def is_refused_or_explicit(value: ast.expr | None) -> bool:
    """Return True for a literal False and for the explicit flag of an evaluation."""
    if isinstance(value, ast.Constant):
        return value.value is False
    return value is not None and ast.unparse(value) in EXPLICIT


def test_every_loader_decides_about_foreign_code() -> None:
    """Each call of from_pretrained and from_config, and each argument of that name, is False or the user's flag."""
    calls = 0
    for file, tree in syntax_trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                pairs = zip(node.keys, node.values, strict=True)
                values = [v for k, v in pairs if isinstance(k, ast.Constant) and k.value == FLAG]
            elif isinstance(node, ast.Call):
                values = [keyword.value for keyword in node.keywords if keyword.arg == FLAG]
                function = node.func
                is_loader = isinstance(function, ast.Attribute) and function.attr in LOADERS
                if is_loader and ast.unparse(function.value) not in WITHOUT_CODE:
                    calls += 1
                    assert values, f"{file}:{node.lineno}: {FLAG} is missing"
            else:
                continue
            assert all(is_refused_or_explicit(value) for value in values), f"{file}:{node.lineno}"
    assert calls > 20


def add_code(model: Path, marker: Path, changes: dict[str, object]) -> Path:
    """Give a checkpoint a module that writes `marker` when it is imported, and configs that name its classes."""
    (model / "own.py").write_text(
        f"open({str(marker)!r}, 'w').write('ran')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    names = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel", "AutoModelForCausalLM": "own.OwnModel"}
    for name, added in (
        ("config.json", {"auto_map": names, **changes}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}),
    ):
        file = model / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **added}))
    return model


OWN = {"model_type": "own", "architectures": ["OwnModel"]}
CASES = {
    "a class of transformers with code beside it": {},
    "a class of its own": OWN,
    "a config without a causal model": {"model_type": "clip", "architectures": ["OwnModel"]},
}


YES = "y\n" * 50


def answer_yes(tmp_path: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Run Python with "y" as the answer to every question."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        input=YES, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture
def models(checkpoint: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A base and a merged model to change."""
    base = Path(shutil.copytree(checkpoint, tmp_path / "base"))
    merged = fine_tune(base, tmp_path / "merged", 1)
    for file in base.glob("*token*"):
        shutil.copy(file, merged)
    return base, merged


def test_the_code_of_these_checkpoints_would_run(models: tuple[Path, Path], tmp_path: Path) -> None:
    """transformers runs it after "y" where a caller leaves the decision open: the tests below can fail."""
    base = add_code(models[0], tmp_path / "ran", OWN)
    answer_yes(tmp_path, "-c", f"import transformers; transformers.AutoConfig.from_pretrained({str(base)!r})")
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_relaxation_runs_no_foreign_code(
    models: tuple[Path, Path], family: dict[str, Path], changes: dict[str, object], tmp_path: Path, run_script
) -> None:
    """performAIM.py relaxes such a model, or refuses it in one sentence, without asking."""
    base, merged = (add_code(model, tmp_path / "ran", changes) for model in models)
    done = run_script(
        "performAIM.py", "--merged_model", merged, "--pretrained_model_name", base, "--save_path",
        tmp_path / "out", "--calibration", family["text"], "--block_size", 256, "--n_samples", 20, "--quiet",
        answers=YES,
    )  # fmt: skip
    assert not (tmp_path / "ran").exists()
    assert (done.returncode == 0) is (not changes), done.stderr
    assert len(done.stderr.splitlines()) == bool(done.returncode), done.stderr


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_evaluation_runs_no_foreign_code(
    models: tuple[Path, Path], data_dir: Path, changes: dict[str, object], tmp_path: Path
) -> None:
    """evaluate_model.py answers with transformers' class, or refuses the model in one sentence, without asking."""
    base = add_code(models[0], tmp_path / "ran", changes)
    done = answer_yes(
        tmp_path, "evaluate_model.py", "--model", base, "--data_dir", data_dir, "--save_path", tmp_path / "results",
        "--benchmarks", "", "--math_benchmarks", "gsm8k", "--limit", 1, "--device", "cpu", "--quiet",
    )  # fmt: skip
    assert not (tmp_path / "ran").exists()
    assert (done.returncode == 0) is (not changes), done.stderr
    assert len(done.stderr.splitlines()) == bool(done.returncode), done.stderr
