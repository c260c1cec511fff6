"""Outputs of a run besides the weights: resuming, lock, repetition, verification, layer statistics, load check."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from common.errors import CheckpointError, FailureError, UsageError
from merging.output import writer
from merging.output.layer_statistics import by_layer
from merging.output.writer import ShardedWriter
from merging.pipeline import merge
from merging.plan.merge_plan import OutputConfig
from merging.recipe import make_recipe
from tests.conftest import ROOT
from tests.helpers.forked import server
from tests.helpers.tiny import make_llama, weights


def recipe_of(family, **more: object):  # type: ignore[no-untyped-def]
    """TIES of a and b."""
    models = f"{family['a']},{family['b']}"
    return make_recipe({"method": "ties", "base_model": str(family["base"]), "models_to_merge": models, **more}, {})


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the run record, which has the time in it."""
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name != "run_record.json"}


# resuming


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> None:
    """Make the writer fail when `count` tensors are written."""
    real = ShardedWriter.begin

    def failing(self, name):  # type: ignore[no-untyped-def]
        if self.done == count:
            raise error
        real(self, name)

    monkeypatch.setattr(ShardedWriter, "begin", failing)


@pytest.mark.parametrize("size", ["5GB", "20KB"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_resumed_run_gives_the_same_bytes(family, tmp_path: Path, monkeypatch, capsys, size, error) -> None:
    """House law 4: a run that was interrupted after 5 tensors leaves the target alone and nothing that loads; with
    --resume it writes the rest only, and every file is as of an uninterrupted run."""
    whole = merge(recipe_of(family), OutputConfig(tmp_path / "whole" / "out", max_shard_size=size, layer_stats=True))
    out = OutputConfig(tmp_path / "cut" / "out", max_shard_size=size, layer_stats=True)
    with monkeypatch.context() as patch:
        stop_after(patch, 5, error)
        with pytest.raises(type(error)) as stopped:
            merge(recipe_of(family), out)
    stage = tmp_path / "cut" / ".out.partial"
    assert f"5 tensors are done and kept in {stage}: the same command with --resume" in stopped.value.__notes__[-1]
    assert not out.save_path.exists()
    assert not (stage / "result" / "config.json").exists()
    written = []
    real = ShardedWriter.begin
    monkeypatch.setattr(ShardedWriter, "begin", lambda *a: (written.append(a[1]), real(*a)))
    merge(recipe_of(family), OutputConfig(**{**vars(out), "resume": True}))
    assert "Resuming the interrupted run: 5 tensors are done" in capsys.readouterr().err
    assert len(written) == len(weights(whole)) - 5
    assert files(out.save_path) == files(whole)
    assert not stage.exists()


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_a_disk_that_fills_up_late(family, tmp_path: Path, monkeypatch, size: str) -> None:
    """What was written is sent to the disk on the way, to the same bytes; an error of that is one of the run: nothing
    stands at the target, and with --resume the same bytes come."""
    whole = merge(recipe_of(family), OutputConfig(tmp_path / "whole" / "out", max_shard_size=size))
    monkeypatch.setattr(writer, "FLUSH", 1)
    real, sent = os.fsync, []

    def full(handle: int) -> None:
        sent.append(handle)
        if len(sent) == 2:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(writer.os, "fsync", full)
    out = tmp_path / "out"
    with pytest.raises(OSError, match="No space left"):
        merge(recipe_of(family), OutputConfig(out, max_shard_size=size))
    assert not out.exists()
    again = OutputConfig(out, resume=True, max_shard_size=size)
    assert files(merge(recipe_of(family), again)) == files(whole)
    assert len(sent) > 3


def test_resume_trusts_nothing_it_did_not_verify(family, tmp_path: Path, monkeypatch) -> None:
    """A byte of the finished part that was changed meanwhile is found by its digest, and that tensor written again."""
    whole = merge(recipe_of(family), OutputConfig(tmp_path / "whole" / "out"))
    out = OutputConfig(tmp_path / "cut" / "out")
    with monkeypatch.context() as patch:
        stop_after(patch, 6, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge(recipe_of(family), out)
    file = tmp_path / "cut" / ".out.partial" / "result" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    merge(recipe_of(family), OutputConfig(**{**vars(out), "resume": True}))
    assert files(out.save_path) == files(whole)


def test_resume_refuses_another_recipe(family, tmp_path: Path, monkeypatch, capsys) -> None:
    """An interrupted run is not gone on with under another recipe; without --resume it is discarded, and said so."""
    out = OutputConfig(tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_after(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            merge(recipe_of(family), out)
    with pytest.raises(UsageError, match="another recipe"):
        merge(recipe_of(family, density=0.7), OutputConfig(**{**vars(out), "resume": True}))
    merge(recipe_of(family, density=0.7), out)
    assert "is discarded" in capsys.readouterr().err
    assert out.save_path.is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def merge_that_waits(marker: Path, flags: list[str]) -> None:
    """Be a merge that waits, to be killed, when it has written five tensors; its marker is there by then."""
    from common.cli import run
    from merge import main

    begin = ShardedWriter.begin

    def begin_and_wait(writer: ShardedWriter, name: str) -> None:
        if writer.done == 5:
            marker.touch()
            time.sleep(600)
        begin(writer, name)

    ShardedWriter.begin = begin_and_wait  # type: ignore[method-assign]
    sys.argv[1:] = flags
    sys.exit(run(main))


def test_killed_run_is_resumed(family, tmp_path: Path, run_script) -> None:
    """SIGKILL in the middle of writing: no target; the same command with --resume ends in the bytes of a whole run."""
    flags = ["merge.py", "--method", "ties", "--base_model", str(family["base"]), "--models_to_merge",
             str(family["a"]), "--no-load_check", "--quiet"]  # fmt: skip
    out, marker = tmp_path / "out", tmp_path / "waits"
    process = server().Process(target=merge_that_waits, args=(marker, [*flags[1:], "--save_path", str(out)]))
    process.start()
    while not marker.exists():
        assert process.is_alive()
        time.sleep(0.002)
    process.kill()
    process.join()
    assert not out.exists()
    for more in (["--save_path", out, "--resume"], ["--save_path", tmp_path / "whole" / "out"]):
        finished = run_script(*flags, *more)
        assert finished.returncode == 0, finished.stderr
    assert files(out) == files(tmp_path / "whole" / "out")


def test_two_writers_of_one_folder(family, tmp_path: Path) -> None:
    """While a process writes a folder, another that wants to write it is refused."""
    from merging.output.staging.stage import staged

    with staged(tmp_path / "out", False, "key") as (stage,):
        stage.add({"name": "x", "digest": "y"})
        with pytest.raises(FailureError, match=r"Another process \(number \d+ on .*\) is writing"):
            merge(recipe_of(family), OutputConfig(tmp_path / "out"))


# lock and repetition


@pytest.fixture(scope="module")
def done(family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished merge of TIES."""
    return merge(recipe_of(family), OutputConfig(tmp_path_factory.mktemp("done") / "out"))


def test_lock_is_a_function_of_the_merge(family, tmp_path: Path, done: Path) -> None:
    """Two runs of one merge into different places have the same lock, byte for byte."""
    again = merge(recipe_of(family), OutputConfig(tmp_path / "elsewhere"))
    assert (again / "merge.lock.json").read_bytes() == (done / "merge.lock.json").read_bytes()


def test_lock_says_what_went_in_and_came_out(family, done: Path) -> None:
    """The lock has every effective parameter with its source, each input file's digest, and each output tensor's."""
    lock = json.loads((done / "merge.lock.json").read_text())
    assert lock["recipe"]["density"] == [0.2, 0.2]
    assert "TIES" in lock["sources"]["density"]
    by_name = {entry["name"]: entry for entry in lock["inputs"]}
    file = family["a"] / "model.safetensors"
    expected = {"bytes": file.stat().st_size, "digest": f"blake3:{blake3(file.read_bytes()).hexdigest()}"}
    assert by_name[str(family["a"])]["files"]["model.safetensors"] == expected
    for name, tensor in weights(done).items():
        digest = f"blake3:{blake3(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()}"
        assert lock["tensors"][name] == {"shape": list(tensor.shape), "dtype": "bfloat16", "digest": digest}


def test_from_lock_repeats_the_merge(family, tmp_path: Path, done: Path, run_script) -> None:
    """--from_lock gives the same bytes, from another working folder, and with the inputs moved elsewhere too."""
    first = run_script(ROOT / "merge.py", "--from_lock", done, "--save_path", tmp_path / "1", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    for name in ("base", "a", "b"):
        shutil.copytree(family[name], tmp_path / name)
    second = run_script(
        ROOT / "merge.py", "--from_lock", done / "merge.lock.json", "--save_path", "2", "--base_model", "base",
        "--models_to_merge", "a,b", cwd=tmp_path,
    )  # fmt: skip
    assert second.returncode == 0, second.stderr
    for out in ("1", "2"):
        assert (tmp_path / out / "model.safetensors").read_bytes() == (done / "model.safetensors").read_bytes()


def test_from_lock_refuses_other_inputs(family, tmp_path: Path, done: Path, run_script) -> None:
    """An input that is not the lock's is named, and nothing is written."""
    out = tmp_path / "out"
    models = f"{family['a']},{family['c']}"
    finished = run_script("merge.py", "--from_lock", done, "--models_to_merge", models, "--save_path", out)
    assert finished.returncode == 1
    assert "model.safetensors is not the file of the lock" in finished.stderr
    assert not out.exists()


def test_from_lock_takes_no_other_setting(done: Path, tmp_path: Path, run_script) -> None:
    """A flag that would change the recipe is refused with exit code 2."""
    finished = run_script("merge.py", "--from_lock", done, "--density", 0.5, "--save_path", tmp_path / "out")
    assert finished.returncode == 2
    assert "leave out --density" in finished.stderr


# verify


def damaged(done: Path, folder: Path, how: str) -> Path:
    """A copy of an output with something wrong."""
    out = folder / "copy"
    shutil.copytree(done, out)
    file = out / "model.safetensors"
    if how == "flipped bit":
        data = bytearray(file.read_bytes())
        data[-5] ^= 4
        file.write_bytes(data)
    elif how == "truncated":
        os.truncate(file, file.stat().st_size - 3)
    elif how == "missing shard":
        file.unlink()
    elif how == "edited config":
        (out / "config.json").write_text((out / "config.json").read_text() + " ")
    elif how == "extra tensor":
        save_file({**load_file(file), "extra": torch.zeros(2)}, file, {"format": "pt"})
    elif how == "no lock":
        (out / "merge.lock.json").unlink()
    return out


@pytest.mark.parametrize(
    ("how", "code", "says"),
    [
        ("nothing", 0, "GOOD"),
        ("flipped bit", 1, "has other bytes"),
        ("truncated", 1, "is not a whole safetensors file"),
        ("missing shard", 1, "is missing"),
        ("edited config", 1, "File config.json was changed"),
        ("extra tensor", 1, "Tensor extra is not in the lock"),
        ("no lock", 3, "could not check"),
    ],
)
def test_verify(tmp_path: Path, done: Path, run_script, how: str, code: int, says: str) -> None:
    """verify.py: 0 for an output as its lock says, 1 naming what is not, 3 where it cannot tell."""
    finished = run_script("scripts/verify.py", damaged(done, tmp_path, how))
    assert finished.returncode == code, finished.stderr
    assert says in finished.stdout + finished.stderr


def test_verify_names_the_shard_that_is_gone(family, tmp_path: Path, run_script) -> None:
    """A missing shard of several is one sentence with its name and the number of its tensors, not one for each."""
    out = merge(recipe_of(family), OutputConfig(tmp_path / "out", max_shard_size="40KB"))
    shard = sorted(out.glob("model-*.safetensors"))[1]
    count = len(load_file(shard))
    shard.unlink()
    finished = run_script("scripts/verify.py", out)
    assert finished.returncode == 1
    said = finished.stdout.splitlines()
    assert said[0] == f"File {shard.name} is missing, with {count} tensors."
    assert len(said) == 2, said


def test_a_finished_run_is_not_resumed(family, tmp_path: Path) -> None:
    """--resume on a finished result says that it is finished, and touches nothing."""
    out = merge(recipe_of(family), OutputConfig(tmp_path / "out"))
    before = files(out)
    with pytest.raises(UsageError, match="is a finished result: there is nothing to resume"):
        merge(recipe_of(family), OutputConfig(out, resume=True))
    assert files(out) == before


def test_verify_recomputes(family, tmp_path: Path, done: Path, run_script) -> None:
    """With the inputs any tensors are merged again bit for bit; a lock that was doctored to fit changed weights is
    found out; inputs that are gone are 'could not check'."""
    good = run_script("scripts/verify.py", done, "--recompute", "all")
    assert (good.returncode, good.stdout) == (0, "GOOD\n"), good.stderr
    forged = damaged(done, tmp_path, "nothing")
    state = load_file(forged / "model.safetensors")
    state["model.norm.weight"][0] += 1
    save_file(state, forged / "model.safetensors", {"format": "pt"})
    lock = json.loads((forged / "merge.lock.json").read_text())
    digest = blake3(state["model.norm.weight"].view(torch.uint8).numpy().tobytes()).hexdigest()
    lock["tensors"]["model.norm.weight"]["digest"] = f"blake3:{digest}"
    (forged / "merge.lock.json").write_text(json.dumps(lock))
    assert run_script("scripts/verify.py", forged).returncode == 0
    found = run_script("scripts/verify.py", forged, "--recompute", "all")
    assert found.returncode == 1
    assert "Tensor model.norm.weight comes out differently" in found.stdout
    one = run_script("scripts/verify.py", forged, "--recompute", "1", "--tensors", "q_proj")
    assert one.returncode == 0, one.stdout
    gone = run_script("scripts/verify.py", done, "--recompute", "2", "--base_model", tmp_path / "nowhere")
    assert gone.returncode == 3


def test_relaxed_output_has_a_lock_too(family, tmp_path: Path, run_script, done: Path) -> None:
    """performAIM.py's output is verified, recomputed and repeated from its lock, bit for bit."""
    out = tmp_path / "relaxed"
    finished = run_script(
        "performAIM.py", "--merged_model", done, "--pretrained_model_name", family["base"], "--save_path", out,
        "--calibration", family["text"], "--n_samples", 20, "--block_size", 64,
        "--importance", tmp_path / "importance.safetensors",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    verified = run_script("scripts/verify.py", out, "--recompute", "all")
    assert (verified.returncode, verified.stdout) == (0, "GOOD\n"), verified.stderr
    repeated = run_script("merge.py", "--from_lock", out, "--save_path", tmp_path / "again")
    assert repeated.returncode == 0, repeated.stderr
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


# layer statistics, finiteness, loading


def test_health_by_hand(tmp_path: Path) -> None:
    """Norms, conflicts, drops and unchanged layers of a worked case: base 0, TIES at density 0.5 of two models."""
    base = make_llama(tmp_path / "base", dtype=torch.float32)
    state = {name: torch.zeros_like(tensor) for name, tensor in weights(base).items()}
    one = {name: tensor.clone() for name, tensor in state.items()}
    two = {name: tensor.clone() for name, tensor in state.items()}
    one["model.layers.0.input_layernorm.weight"][:4] = torch.tensor([3.0, 4.0, 0, 0])
    two["model.layers.0.input_layernorm.weight"][:4] = torch.tensor([-3.0, 4.0, 0, 12.0])
    for name, tensors in (("base", state), ("one", one), ("two", two)):
        if name != "base":
            shutil.copytree(base, tmp_path / name)
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    flags = {"method": "task_arithmetic", "base_model": str(base), "dtype": "float32",
             "models_to_merge": f"{tmp_path / 'one'},{tmp_path / 'two'}"}  # fmt: skip
    out = merge(make_recipe(flags, {}), OutputConfig(tmp_path / "out", layer_stats=True))
    card = (out / "README.md").read_text()
    row = next(line for line in card.splitlines() if "model.layers.0 " in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # norms 5 and 13; merged (0, 8, 0, 12): sqrt(208); one conflict in three moved entries
    assert cells[1:5] == ["5", "13", f"{208**0.5:.4g}", "33.3 %"]
    assert "Unchanged: lm_head.weight, model.embed_tokens.weight, model.layers.1, model.norm.weight." in card


def test_health_counts_what_ties_trims(family, tmp_path: Path) -> None:
    """The share dropped is what trimming leaves out of the entries that a model moved, counted from the files."""
    merge(recipe_of(family, density=0.25), OutputConfig(tmp_path / "ties", layer_stats=True))
    row = next(line for line in (tmp_path / "ties" / "README.md").read_text().splitlines() if "layers.0 " in line)
    base, tuned = weights(family["base"]), weights(family["a"])
    moved = {n: int((tuned[n].float() != base[n].float()).sum()) for n in base if ".layers.0." in n}
    kept = sum(min(moved[n], int(0.25 * base[n].numel())) for n in moved)
    assert row.split("|")[6].strip() == f"{100 * (1 - kept / sum(moved.values())):.1f} %"


def test_health_rows_add_up() -> None:
    """A layer's figures are sums over its tensors: squares under the root, shares of counts."""
    one = {"squares": [9.0], "merged": 9.0, "conflicts": 1, "moved": 2, "nonzero": [2], "dropped": [1], "changed": 0,
           "elements": 4, "has_base": True, "positions": [0]}  # fmt: skip
    two = {**one, "squares": [16.0], "merged": 16.0, "conflicts": 0, "moved": 2, "dropped": None}
    (row,) = by_layer([("model.layers.3.a.weight", one), ("model.layers.3.b.weight", two)], 1)
    assert row == {"layer": "model.layers.3", "norms": [5.0], "merged": 5.0, "conflicts": 0.25, "dropped": [0.5],
                   "changed": 0.0}  # fmt: skip


def test_health_rows_are_in_the_order_of_the_layers() -> None:
    """Layer 2 stands before layer 10, whatever order the tensors come in; what is in no layer, among them by name."""
    sums = {"squares": [1.0], "merged": 1.0, "conflicts": 0, "moved": 1, "nonzero": [1], "dropped": None, "changed": 1,
            "elements": 1, "has_base": True, "positions": [0]}  # fmt: skip
    names = ["model.norm.weight", *(f"model.layers.{i}.a.weight" for i in (10, 1, 2)), "model.embed_tokens.weight"]
    rows = by_layer([(name, sums) for name in names], 1)
    assert [row["layer"] for row in rows] == [
        "model.embed_tokens.weight", "model.layers.1", "model.layers.2", "model.layers.10", "model.norm.weight",
    ]  # fmt: skip


def test_allow_nonfinite(tmp_path: Path, capsys) -> None:
    """Infinity in an input is refused by name; --allow_nonfinite writes it, says where, and records how many."""
    base = make_llama(tmp_path / "base")
    shutil.copytree(base, tmp_path / "a")
    state = load_file(tmp_path / "a" / "model.safetensors")
    state["model.norm.weight"][:3] = float("inf")
    save_file(state, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    flags = {"method": "task_arithmetic", "base_model": str(base), "models_to_merge": str(tmp_path / "a")}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight of the result is not finite"):
        merge(make_recipe(flags, {}), OutputConfig(tmp_path / "out"))
    out = merge(make_recipe(flags, {}), OutputConfig(tmp_path / "out", allow_nonfinite=True))
    assert "model.norm.weight: 3 entries are not finite" in capsys.readouterr().err
    assert json.loads((out / "run_record.json").read_text())["tensors"]["nonfinite"] == {"model.norm.weight": 3}


def test_output_that_does_not_load_is_not_written(tmp_path: Path, capsys) -> None:
    """A result that its config's class could not load is refused before the first byte; without the check it is
    written. What the inputs have besides (a value head) is told and kept."""
    base = make_llama(tmp_path / "base")
    shutil.copytree(base, tmp_path / "a")
    recipe = make_recipe({"method": "linear", "models_to_merge": f"{base},{tmp_path / 'a'}"}, {})
    whole = weights(base)
    for folder in (base, tmp_path / "a"):
        save_file({**whole, "value.weight": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
    out = merge(recipe, OutputConfig(tmp_path / "outs" / "more"))
    assert "transformers does not load value.weight as LlamaForCausalLM" in capsys.readouterr().err
    assert "value.weight" in weights(out)
    del whole["model.norm.weight"]
    for folder in (base, tmp_path / "a"):
        save_file(whole, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"would not load .* as LlamaForCausalLM \(missing: model\.norm\.weight\)"
    ):
        merge(recipe, OutputConfig(tmp_path / "outs" / "out"))
    assert [p.name for p in (tmp_path / "outs").iterdir()] == ["more"]
    assert merge(recipe, OutputConfig(tmp_path / "outs" / "out", load_check=False)).is_dir()


def test_models_called_like_policies(family, tmp_path: Path, run_script) -> None:
    """Folders called base, union and auto are models and no policies: their merge is repeated from its lock."""
    for name, source in (("base", "base"), ("union", "a"), ("auto", "b")):
        shutil.copytree(family[source], tmp_path / name)
    merged = run_script(
        ROOT / "merge.py", "--method", "ties", "--base_model", "base", "--models_to_merge", "union,auto", "--save_path",
        "out", cwd=tmp_path,
    )  # fmt: skip
    assert merged.returncode == 0, merged.stderr
    again = run_script(ROOT / "merge.py", "--from_lock", "out", "--save_path", "again", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    checked = run_script(ROOT / "scripts" / "verify.py", "out", "--recompute", "3", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr


def test_card_has_no_places(family, done: Path) -> None:
    """A card is read by others: local inputs stand in it by their folder's name, hub ids in full."""
    card = (done / "README.md").read_text()
    assert str(family["base"].parent) not in card
    assert "Base model: base" in card
    assert "models_to_merge:\n- a\n- b\n" in card


@pytest.mark.parametrize(
    ("licenses", "front", "warned"),
    [
        ({"base": "mit", "a": "mit", "b": "mit"}, "license: mit", False),
        ({"base": "llama2", "a": "cc-by-nc-4.0"}, "license: other", True),
        ({}, None, False),
    ],
)
def test_license_of_the_result(family, tmp_path: Path, capsys, licenses, front, warned) -> None:
    """The inputs' licenses go into the card where they agree; where they differ it is a warning that names them all,
    on the screen and in the card; where none is stated none is made up."""
    folders = {name: shutil.copytree(family[name], tmp_path / name) for name in ("base", "a", "b")}
    for name, license in licenses.items():
        (folders[name] / "README.md").write_text(f"---\nlicense: {license}\n---\n")
    out = merge(recipe_of(folders), OutputConfig(tmp_path / "out"))
    card, said = (out / "README.md").read_text(), capsys.readouterr().err
    assert (front in card) if front else ("license:" not in card)
    assert ("different licenses" in said) == ("different licenses" in card) == warned
    if warned:
        assert "cc-by-nc-4.0" in said
        assert "llama2" in said


# what a run must not do


def test_repeating_never_overwrites_what_it_needs(family, tmp_path: Path, run_script, done: Path) -> None:
    """A lock whose importance file lies in the target is refused, with --overwrite too, and the file stays."""
    home = merge(recipe_of(family), OutputConfig(tmp_path / "home"))
    importance = home / "importance.safetensors"
    made = run_script(
        "performAIM.py", "--merged_model", done, "--pretrained_model_name", family["base"], "--save_path",
        tmp_path / "relaxed", "--calibration", family["text"], "--n_samples", 20, "--block_size", 64, "--importance",
        importance,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    again = run_script("merge.py", "--from_lock", tmp_path / "relaxed", "--save_path", home, "--overwrite")
    assert again.returncode == 2
    assert "would write over or into the input" in again.stderr
    assert importance.is_file()


def test_dry_run_of_a_lock_writes_nothing(tmp_path: Path, done: Path, run_script) -> None:
    """--from_lock --dry_run prints the plan and makes no folder."""
    planned = run_script("merge.py", "--from_lock", done, "--dry_run", "--json", "--save_path", tmp_path / "out")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["tensors"]["total"] == len(weights(done))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--max_shard_size", "foo"], "must be a size"), (["--save_path", "INPUT"], "would write over or into the input")],
)
def test_dry_run_makes_the_checks_of_the_run(family, run_script, flags: list[str], message: str) -> None:
    """What the run refuses about its output, the dry run refuses too."""
    flags = [str(family["a"]) if flag == "INPUT" else flag for flag in flags]
    models = f"{family['a']},{family['b']}"
    command = ["merge.py", "--method", "ties", "--base_model", family["base"], "--models_to_merge", models, *flags]
    for more in (["--dry_run"], ["--save_path", "nowhere", *flags]):
        finished = run_script(*command, *more)
        assert finished.returncode == 2
        assert message in finished.stderr


def test_health_of_reference_numerics_is_refused(family, tmp_path: Path) -> None:
    """Reference numerics have no blocks to look at: figures of nothing are not printed."""
    with pytest.raises(UsageError, match="does not go with --numerics reference"):
        merge(recipe_of(family, numerics="reference", density=1), OutputConfig(tmp_path / "out", layer_stats=True))


def test_verify_misses_no_index(family, tmp_path: Path, run_script) -> None:
    """The index of a sharded output is under the lock as well."""
    out = merge(recipe_of(family), OutputConfig(tmp_path / "out", max_shard_size="60KB"))
    assert run_script("scripts/verify.py", out).returncode == 0
    (out / "model.safetensors.index.json").unlink()
    found = run_script("scripts/verify.py", out)
    assert found.returncode == 1
    assert "model.safetensors.index.json was changed or is missing" in found.stdout


def test_health_of_slices(family, tmp_path: Path) -> None:
    """Where layers come from different models each figure stands in the column of its model, '-' in the others'."""
    config = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(family["a"]), "layer_range": [0, 2]}]},
            {"sources": [{"model": str(family["b"]), "layer_range": [1, 2]}]},
        ],
    }
    out = merge(make_recipe({}, config), OutputConfig(tmp_path / "out", layer_stats=True))
    lines = (out / "README.md").read_text().splitlines()
    rows = {i: next(line for line in lines if f"model.layers.{i} " in line).split("|") for i in (0, 2)}
    assert rows[0][3].strip() == rows[2][2].strip() == "-"
    own = [tensor for name, tensor in weights(family["b"]).items() if ".layers.1." in name]
    norm = sum(float(tensor.double().square().sum()) for tensor in own) ** 0.5
    assert rows[2][3].strip() == f"{norm:.4g}"


def test_aim_follows_the_slices(family, tmp_path: Path) -> None:
    """With layer 1 of the base in place 0 of the result, AIM in one pass relaxes it by what was measured on layer 1:
    at omega 0 it is what relaxing the unsliced merge makes of layer 1."""
    from aim.calibration.config import Calibration
    from aim.config import AimConfig
    from aim.measure import Settings
    from aim.pipeline import relax, relaxation_spec

    importance = tmp_path / "importance.safetensors"
    settings = Settings(Calibration(str(family["text"]), n_samples=20, block_size=64), importance)
    whole = {"method": "task_arithmetic", "base_model": str(family["base"]), "models_to_merge": str(family["a"])}
    first = OutputConfig(tmp_path / "first")
    relax(str(family["a"]), str(family["base"]), AimConfig((0.5,), settings), first, None)
    sources = [{"model": str(family[name]), "layer_range": [1, 2]} for name in ("a", "base")]
    sliced = {"merge_method": "task_arithmetic", "base_model": str(family["base"]), "slices": [{"sources": sources}],
              "parameters": {"weight": 1.0}}  # fmt: skip
    results = []
    for name, recipe in (("whole", make_recipe(whole, {})), ("sliced", make_recipe({}, sliced))):
        output = OutputConfig(tmp_path / name)
        results.append(weights(merge(recipe, output, relaxation_spec(AimConfig((0.0,), settings), output, recipe))))
    for name, tensor in results[0].items():
        if ".layers.1." in name:
            assert torch.equal(results[1][name.replace(".layers.1.", ".layers.0.")], tensor), name


def test_importance_files_are_equal(family, tmp_path: Path) -> None:
    """Measured twice, an importance file has the same bytes, so that a lock knows it again; and the lock of the run
    that made the file is that of one which found it."""
    from aim.calibration.config import Calibration
    from aim.config import AimConfig
    from aim.measure import Settings
    from aim.pipeline import relax

    settings = [
        Settings(Calibration(str(family["text"]), n_samples=20, block_size=64), tmp_path / name / "importance")
        for name in "12"
    ]
    outs = [
        relax(str(family["a"]), str(family["base"]), AimConfig((0.5,), which), OutputConfig(tmp_path / f"out{i}"), None)
        for i, which in enumerate((*settings, settings[0]))
    ]
    assert settings[0].importance_file.read_bytes() == settings[1].importance_file.read_bytes()
    assert (outs[0] / "merge.lock.json").read_bytes() == (outs[2] / "merge.lock.json").read_bytes()


def test_failing_rename_can_be_resumed(family, tmp_path: Path, monkeypatch) -> None:
    """Where the finished stage cannot take its place, what is done is kept, and --resume ends the run."""
    from merging.output.staging import stage

    out = OutputConfig(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_publish", lambda *_: (_ for _ in ()).throw(OSError(16, "Device busy")))
        with pytest.raises(OSError, match="busy"):
            merge(recipe_of(family), out)
    merge(recipe_of(family), OutputConfig(**{**vars(out), "resume": True}))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert not list(out.save_path.glob("journal*"))
