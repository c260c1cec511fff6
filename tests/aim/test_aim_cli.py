"""performAIM.py at the shell: the seed's command on its trio in miniature, and every mistake as one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from aim.measure import check_dtype
from common.cli import run
from common.errors import UsageError
from performAIM import main
from tests.helpers.tiny import VOCABULARY, fine_tune, make_llama, weights


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The seed's trio in miniature: a base of 320 rows, two models with `[PAD]` or `<pad>` at 320, one whose tokenizer
    lists a token that has no row; and the importance file of the base once it is made."""
    folder = tmp_path_factory.mktemp("trio")
    base = make_llama(folder / "llama-2-13b", hidden=32)
    models = {
        "WizardLM": fine_tune(base, folder / "WizardLM", 1, extra=("[PAD]",)),
        "WizardMath": fine_tune(base, folder / "WizardMath", 2, extra=("<pad>",)),
        "code-alpaca": fine_tune(base, folder / "code-alpaca", 3),
    }
    file = models["code-alpaca"] / "tokenizer.json"
    listed = json.loads(file.read_text())
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    listed["added_tokens"].append({**plain, "id": VOCABULARY, "content": "[PAD]"})
    file.write_text(json.dumps(listed))
    return {"base": base, **models, "importance": folder / "importance.safetensors"}


def test_the_seeds_commands(trio: dict[str, Path], family, tmp_path: Path, run_script) -> None:
    """The seed's merge and its performAIM command, with a local text for the Pile: the relaxed checkpoint has the
    merged one's rows, tokenizer and generation config, loads, and embeddings alone are left."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged, relaxed = tmp_path / "DARE_TIES_InstructMathCode", tmp_path / "DARE_TIES_AIM_InstructMathCode"
    models = ",".join(str(trio[name]) for name in ("WizardLM", "WizardMath", "code-alpaca"))
    done = run_script("merge.py", "--method", "dare_ties", "--base_model", trio["base"], "--models_to_merge", models,
                      "--save_path", merged)  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run_script("performAIM.py", "--merged_model", merged, "--pretrained_model_name", trio["base"],
                      "--omega", "0.4", "--save_path", relaxed, "--calibration", family["text"], "--block_size", "64",
                      "--importance", trio["importance"])  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Relaxing 20 tensors with omega 0.4; 1 not (embedding)." in done.stderr
    before, after = weights(merged), weights(relaxed)
    assert [name for name in after if torch.equal(after[name], before[name])] == ["model.embed_tokens.weight"]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (relaxed / name).read_bytes() == (merged / name).read_bytes(), name
    tokenizer = AutoTokenizer.from_pretrained(relaxed)
    ids = torch.tensor([tokenizer.encode("w5 w6 w7")])
    with torch.no_grad():
        assert torch.isfinite(AutoModelForCausalLM.from_pretrained(relaxed)(ids).logits).all()


def test_mistakes(trio: dict[str, Path], family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each mistake is one sentence on stderr with its exit code, no traceback, and nothing is written."""
    base, tuned, importance = trio["base"], family["a"], tmp_path / "imp"
    text = family["text"]
    good = ["--merged_model", trio["WizardLM"], "--pretrained_model_name", base, "--calibration", text,
            "--block_size", "64"]  # fmt: skip
    out = ["--save_path", tmp_path / "out"]
    made = [*good, "--importance", importance, "--save_path", tmp_path / "first"]
    assert run(main, list(map(str, made))) == 0
    deep = make_llama(tmp_path / "deep", layers=3, hidden=32)
    copy = shutil.copytree(base, tmp_path / "copy")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1") * 50)
    (tmp_path / "fields.jsonl").write_text('{"body": "w5"}\n')
    changed = changed_value(importance, tmp_path / "changed")
    cut = tmp_path / "cut"
    cut.write_bytes(importance.read_bytes()[:-100])
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    cases = {
        "omega abc": ([*good, *out, "--omega", "abc"], 2, "--omega must be a number in [0, 1]"),
        "omega 1.2": ([*good, *out, "--omega", "1.2"], 2, "--omega must be in [0, 1]"),
        "omega list": ([*good, *out, "--omega", "0.2,1.2"], 2, "--omega must be in [0, 1]"),
        "no omega": ([*good, *out, "--omega", ""], 2, "--omega needs at least one value"),
        "layers": (["--merged_model", deep, "--pretrained_model_name", base, *out], 1, "3 layers"),
        "same folder": (["--merged_model", base, "--pretrained_model_name", base, *out], 2, "nothing to relax"),
        "same weights": (["--merged_model", copy, "--pretrained_model_name", base, *out], 2, "hold the same weights"),
        "other importance": (["--merged_model", tuned, "--pretrained_model_name", family["base"], "--importance",
                              importance, *out], 1, "whose weights are not those of"),
        "changed importance": ([*good, *out, "--importance", changed], 1, "was changed since it was written"),
        "cut importance": ([*good, *out, "--importance", cut], 1, "not a whole safetensors file"),
        "a checkpoint for importance": ([*good, *out, "--importance", base / "model.safetensors"], 1,
                                        "not an importance file"),
        "empty text": ([*good[:4], *out, "--calibration", tmp_path / "empty.jsonl"], 1, "is empty: it holds no text"),
        "not UTF-8": ([*good[:4], *out, "--calibration", tmp_path / "latin.txt"], 1, "not text in UTF-8"),
        "no field": ([*good[:4], *out, "--calibration", tmp_path / "fields.jsonl"], 1, "no field 'text'"),
        "no file": ([*good[:4], *out, "--calibration", tmp_path / "none.jsonl"], 2, "does not exist"),
        "little text": ([*good[:6], *out, "--block_size", "2048", "--n_samples", "1"], 1, "less than one block"),
        "long blocks": ([*good[:6], *out, "--block_size", "4096"], 2, "more than the 2048 positions"),
        "regex": ([*good, *out, "--exclude", "("], 2, "--exclude '(' is not a regular expression"),
        "nothing left": ([*good, *out, "--include", "nowhere"], 1, "nothing would be relaxed"),
        "batch": ([*good, *out, "--batch_size", "0"], 2, "--batch_size must be a whole number from 1"),
        "batch word": ([*good, *out, "--batch_size", "many"], 2, "a number of blocks or auto"),
        "way": ([*good, *out, "--calibration_mode", "layered"], 2, "invalid choice: 'layered'"),
        "reference by layers": ([*good, *out, "--calibration_mode", "layerwise", "--numerics", "reference"], 2,
                                "runs the whole base"),
        "min tokens": ([*good, *out, "--min_tokens", "0"], 2, "--min_tokens must be a whole number from 1"),
    }  # fmt: skip
    for what, (arguments, code, sentence) in cases.items():
        capsys.readouterr()
        returned, said = run(main, list(map(str, arguments))), capsys.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert (returned, len(errors)) == (code, 1), (what, said)
        assert sentence in errors[0], (what, errors[0])
        assert "Traceback" not in said, what
        if what == "nothing left":  # the measurement is good, and is not thrown away for a wrong pattern
            assert f"The calibration is kept in {tmp_path / '.out.calibration'}" in said
            shutil.rmtree(tmp_path / ".out.calibration")
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before, what


def changed_value(importance: Path, to: Path) -> Path:
    """The importance file with one number changed, and its metadata as it was."""
    with safe_open(importance, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata()
    tensors["model.norm.weight"][3] *= 1.5
    save_file(tensors, to, metadata)
    return to


def test_gpu_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base in bf16 on a GPU that has none is refused with what to do, before anything is loaded."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    with pytest.raises(UsageError, match="Tesla T4 does not compute in bfloat16; give --calibration_dtype float16"):
        check_dtype("bfloat16", torch.device("cuda"))
    check_dtype("float16", torch.device("cuda"))
    check_dtype("bfloat16", torch.device("cpu"))
