"""The scripts as a user runs them: the original's commands, and one sentence for each mistake."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path

import pytest

from common.cli import Parser
from common.errors import UsageError
from tests.conftest import ROOT
from tests.helpers.tiny import make_llama, weights


def models(family: dict[str, Path]) -> str:
    """The three fine-tuned models as the flag takes them."""
    return ",".join(str(family[name]) for name in "abc")


def test_spellings_of_flags() -> None:
    """Dashes and underscores spell one flag, also after `--no-`; an unknown flag is refused with the nearest one."""
    parser = Parser(prog="merge.py")
    parser.add_argument("--no_cache", action="store_true")
    parser.add_argument("--load_check", action=argparse.BooleanOptionalAction, default=None)
    for words in (["--no_cache", "--no-load_check"], ["--no-cache", "--no-load-check"]):
        parsed = parser.parse_args(words)
        assert (parsed.no_cache, parsed.load_check) == (True, False)
    with pytest.raises(UsageError, match=r"unknown argument '--no_cash'\. Did you mean '--no_cache'"):
        parser.parse_args(["--no_cash"])


def test_the_original_commands(family, tmp_path: Path, run_script) -> None:
    """The original README's merge and AIM commands, with miniature checkpoints for the 13B ones, work as printed."""
    merged, relaxed = tmp_path / "DARE_TIES_InstructMathCode", tmp_path / "DARE_TIES_AIM_InstructMathCode"
    done = run_script(
        "merge.py", "--method", "dare_ties", "--base_model", family["base"], "--models_to_merge", models(family),
        "--save_path", merged,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    done = run_script(
        "performAIM.py", "--merged_model", merged, "--pretrained_model_name", family["base"], "--omega", "0.4",
        "--save_path", relaxed, "--calibration", family["text"], "--block_size", "64",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "60 texts kept of 60 read" in done.stderr
    assert weights(relaxed).keys() == weights(merged).keys()


def test_config_file_gives_the_same_merge(family, tmp_path: Path, run_script) -> None:
    """A YAML with the flags' names gives the same bytes as the flags; a flag wins over it."""
    by_flags, by_file, over = tmp_path / "flags", tmp_path / "file", tmp_path / "over"
    common = ["--base_model", family["base"], "--models_to_merge", models(family)]
    done = run_script("merge.py", "--method", "ties", *common, "--density", "0.5,0.3,0.7", "--save-path", by_flags)
    assert done.returncode == 0, done.stderr
    config = tmp_path / "recipe.yaml"
    listed = "\n".join(f"  - {family[name]}" for name in "abc")
    config.write_text(
        f"method: ties\nbase_model: {family['base']}\nmodels_to_merge:\n{listed}\ndensity: [0.5, 0.3, 0.7]\n"
        f"save_path: {by_file}\n"
    )
    done = run_script("merge.py", "--config", config)
    assert done.returncode == 0, done.stderr
    assert (by_flags / "model.safetensors").read_bytes() == (by_file / "model.safetensors").read_bytes()
    done = run_script("merge.py", "--config", config, "--density", "1", "--save_path", over)
    assert done.returncode == 0, done.stderr
    assert "density 1: ties trims nothing." in done.stderr
    assert json.loads((over / "run_record.json").read_text())["recipe"]["density"] == [1, 1, 1]


def test_help_of_a_method(run_script) -> None:
    """`--method ties --help` shows the parameters of ties with defaults and sources, and no other method's."""
    done = run_script("merge.py", "--method", "ties", "--help", COLUMNS="200")
    assert "--density" in done.stdout
    assert "0.2" in done.stdout
    assert "Yadav" in done.stdout
    assert "--above_average_value_ratio" not in done.stdout


def yaml(tmp_path: Path, text: str) -> Path:
    """A recipe of one line in a file of its own."""
    file = tmp_path / f"{abs(hash(text))}.yaml"
    file.write_text(text + "\n")
    return file


def test_negative_weights(family, tmp_path: Path, run_script) -> None:
    """`--weights -0.5,1.5` is a value, not a flag: it merges with a negative weight."""
    done = run_script(
        "merge.py", "--method", "task_arithmetic", "--base_model", family["base"], "--models_to_merge",
        f"{family['a']},{family['b']}", "--weights", "-0.5,1.5", "--save_path", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "run_record.json").read_text())["recipe"]["weights"] == [-0.5, 1.5]


def test_the_original_evaluation_command(family, tmp_path: Path, run_script) -> None:
    """The original's third command: refused by one sentence that names the flag; with the flag, all six benchmarks."""
    data = Path(os.environ.get("AIM_DATA_DIR", ROOT.parent / "shared" / "data"))
    command = ["evaluate_model.py", "--model", family["a"]]
    done = run_script(*command)
    assert done.returncode == 2
    assert "--allow_code_execution" in done.stderr
    if not (data / "hub").is_dir():
        pytest.skip("set AIM_DATA_DIR to a folder with the benchmarks' files to run the rest")
    done = run_script(
        *command, "--allow_code_execution", "--data_dir", data, "--limit", "1", "--math_max_tokens", "4",
        "--max_gen_toks", "4", "--save_path", tmp_path / "results",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for benchmark in ("HumanEval", "MBPP", "MMLU", "MATH", "GSM8K", "IFEval"):
        assert re.search(rf"\| +{benchmark} \|", done.stdout), done.stdout
    (file,) = (tmp_path / "results").rglob("results_*.json")
    assert set(json.loads(file.read_text())["aim"]["scores"]) == {
        "HumanEval",
        "MBPP",
        "MMLU",
        "MATH",
        "GSM8K",
        "IFEval",
    }


def bad(family: dict[str, Path], tmp_path: Path) -> dict[str, tuple[list[object], int, str]]:
    """Every mistake: the command, its exit code, and a part of its sentence."""
    other = make_llama(tmp_path / "other", layers=3, hidden=32)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep me")
    base, a = family["base"], family["a"]
    out = ["--save_path", tmp_path / "out"]
    m = ["merge.py", "--base_model", base, "--models_to_merge", a]
    p = ["performAIM.py", "--merged_model", a, "--pretrained_model_name", base]
    return {
        "unknown method": ([*m, *out, "--method", "tiesss"], 2, "Did you mean 'ties'?"),
        "no method": ([*m, *out], 2, "--method is missing"),
        "missing model": (["merge.py", "--method", "ties", "--base_model", base, "--models_to_merge", "./none",
                           *out], 2, "Model ./none is neither a local folder"),
        "no such hub model": (["merge.py", "--method", "ties", "--base_model", base, "--models_to_merge", "org/none",
                               *out], 1, "HF_HUB_OFFLINE is set"),
        "base among the models": (["merge.py", "--method", "ties", "--base_model", base, "--models_to_merge",
                                   f"{a},{base}", *out], 2, "listed among the models"),
        "twice the same": (["merge.py", "--method", "ties", "--base_model", base, "--models_to_merge", f"{a},{a}",
                            *out], 2, "listed twice"),
        "other shapes": (["merge.py", "--method", "ties", "--base_model", base, "--models_to_merge", other, *out], 1,
                         "The models do not fit together: "),
        "no base": (["merge.py", "--method", "ties", "--models_to_merge", a, *out], 2, "ties needs --base_model"),
        "no models": (["merge.py", "--method", "ties", "--base_model", base, *out], 2, "--models_to_merge is missing"),
        "no save_path": ([*m, "--method", "ties"], 2, "--save_path is missing"),
        "unknown flag": ([*m, *out, "--method", "ties", "--densty", "1"], 2, "Did you mean '--density'?"),
        "flag of another method": ([*m, *out, "--method", "ties", "--gamma", "0.1"], 2,
                                   "ties has no parameter 'gamma'"),
        "density outside": ([*m, *out, "--method", "ties", "--density", "1.5"], 2, "density must be in (0, 1]"),
        "densities for others": ([*m, *out, "--method", "ties", "--density", "0.1,0.2"], 2,
                                 "one per model (1), found 2"),
        "no number": ([*m, *out, "--method", "ties", "--density", "half"], 2, "density must be a float, found 'half'"),
        "target full": ([*m, "--method", "ties", "--save_path", full], 2, "not empty"),
        "no such device": ([*m, *out, "--method", "ties", "--device", "cuda:99"], 2, "CUDA devices"),
        "no such device, adapters": ([*m, *out, "--method", "ties", "--save_as", "adapter", "--device", "cuda:99"], 2,
                                     "CUDA devices"),
        "no device at all": ([*m, *out, "--method", "ties", "--device", "gpu"], 2,
                             "--device must be auto, cpu, cuda or cuda:N, found 'gpu'"),
        "a comma too many": (["merge.py", "--method", "ties", "--base_model", base, "--models_to_merge", f"{a},,{a}",
                              *out], 2, "an empty name among 3: is there a comma too many?"),
        "target under a file": ([*m, "--method", "ties", "--save_path", full / "mine.txt" / "out"], 2,
                                "mine.txt is a file, so that no folder can be made in it"),
        "target not writable": ([*m, "--method", "ties", "--save_path", "/proc/out"], 2,
                                "no folder can be made in /proc ("),
        "bad size": ([*m, *out, "--method", "ties", "--max_shard_size", "5XB"], 2, "must be a size such as 5GB"),
        "no config": (["merge.py", "--config", tmp_path / "none.yaml"], 2, "does not exist"),
        "omega alone": ([*m, *out, "--method", "ties", "--omega", "0.4"], 2, "--omega needs the base's importance"),
        "yaml of other types": (["merge.py", "--config", yaml(tmp_path, "omega: abc")], 2, "omega must be a number"),
        "yaml overwrite": (["merge.py", "--config", yaml(tmp_path, 'overwrite: "no"')], 2, "overwrite must be a true"),
        "yaml path": (["merge.py", "--config", yaml(tmp_path, "save_path: 5")], 2, "save_path must be a path"),
        "yaml key": (["merge.py", "--config", yaml(tmp_path, "1: 2")], 2, "should hold keys and values"),
        "seed": (["merge.py", "--config", yaml(tmp_path, "seed: 42.7")], 2, "--method is missing"),
        "t missing": ([*m, *out, "--method", "slerp"], 2, "--t must be given"),
        "too many models": (["merge.py", "--method", "slerp", "--t", "0.5", "--base_model", base, "--models_to_merge",
                             models(family), *out], 2, "slerp takes 1 model besides the base, 3 given"),
        "reference of another": ([*m, *out, "--method", "ram", "--numerics", "reference"], 2, "which had no ram"),
        "weights nan": ([*m, *out, "--method", "ties", "--weights", "nan"], 2, "weights must be a finite number"),
        "aim onto its base": ([*p, "--save_path", base, "--overwrite"], 2, "would write over or into the input"),
        "merge onto a model": ([*m, "--method", "ties", "--save_path", a], 2, "would write over or into the input"),
        "overwrite of another folder": ([*m, "--method", "ties", "--save_path", full, "--overwrite"], 2,
                                        "no checkpoint written here"),
        "aim into its base": ([*p, "--save_path", base / "x"], 2, "would write over or into the input"),
        "importance is a folder": ([*p, *out, "--importance", full], 2, "is a folder"),
        "omega outside": ([*p, *out, "--omega", "1.5"], 2, "--omega must be in [0, 1]"),
        "no calibration": ([*p, *out], 1, "pass a local file with --calibration"),
        "no calibration file": ([*p, *out, "--calibration", "none.jsonl"], 2, "does not exist"),
        "aim onto full": ([*p, "--save_path", full], 2, "not empty"),
        "batch of none": ([*p, *out, "--batch_size", "0"], 2, "--batch_size must be a whole number from 1"),
    }  # fmt: skip


def test_mistakes(family, tmp_path: Path, run_script) -> None:
    """Each mistake gives one sentence on stderr, its exit code, no traceback, and nothing is written or lost."""
    for what, (command, code, sentence) in bad(family, tmp_path).items():
        before = sorted(tmp_path.rglob("*"))
        done = run_script(*command)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == code, (what, done.stderr)
        assert len(errors) == 1, (what, done.stderr)
        assert sentence in errors[0], (what, errors[0])
        assert "Traceback" not in done.stderr, what
        assert sorted(tmp_path.rglob("*")) == before, what


def test_debug_shows_the_traceback(family, tmp_path: Path, run_script) -> None:
    """--debug prints the traceback besides the sentence."""
    done = run_script("merge.py", "--method", "nope", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "error: Unknown merge method 'nope'" in done.stderr
