"""Reading and writing checkpoints: shards, .bin, staging, vocabulary, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import CheckpointError, FailureError, UsageError
from merging.checkpoints.checkpoint import CheckpointRef, open_checkpoint
from merging.output.writer import parse_size
from merging.pipeline import merge
from merging.plan import checks
from merging.plan.merge_plan import OutputConfig
from merging.recipe import make_recipe
from merging.tokenizers.vocabulary import AlignedRows, align
from tests.helpers.tiny import VOCABULARY, fine_tune, make_llama, weights


def merged(method: str, base: Path | None, models: list[Path], out: Path, size: str = "5GB", **flags: object) -> Path:
    """Merge folders, quietly."""
    given = {"method": method, "models_to_merge": list(map(str, models)), **flags}
    if base is not None:
        given["base_model"] = str(base)
    return merge(make_recipe(given, {}), OutputConfig(out, max_shard_size=size))


def test_reference_names() -> None:
    """`org/name@revision` splits at the last @; a folder with an @ in it does not."""
    assert CheckpointRef.parse("org/name@abc") == CheckpointRef("org/name", "abc")
    assert CheckpointRef.parse("org/name").is_hub_id
    assert not CheckpointRef.parse("./folder/none").is_hub_id


@pytest.mark.parametrize("layout", ["sharded", "bin", "sharded bin"])
def test_layout_of_the_inputs_does_not_matter(family, tmp_path: Path, layout: str) -> None:
    """The same weights in shards or as .bin, whole or sharded, give the same merged bytes."""
    plain = merged("ties", family["base"], [family["a"], family["b"]], tmp_path / "plain")
    again = tmp_path / "a"
    model = AutoModelForCausalLM.from_pretrained(family["a"], dtype="auto")
    if layout == "sharded":
        model.save_pretrained(again, max_shard_size="60KB")
        assert len(list(again.glob("*.safetensors"))) > 1
    else:
        again.mkdir()
        (again / "config.json").write_text((family["a"] / "config.json").read_text())
        state = {name: tensor.clone() for name, tensor in weights(family["a"]).items()}
        names = sorted(state)
        parts = [names] if layout == "bin" else [names[:10], names[10:]]
        files = ["pytorch_model.bin"] if layout == "bin" else [f"pytorch_model-{i:05d}-of-00002.bin" for i in (1, 2)]
        for part, file in zip(parts, files, strict=True):
            torch.save({name: state[name] for name in part}, again / file)
        if layout == "sharded bin":
            index = {"weight_map": {n: f for part, f in zip(parts, files, strict=True) for n in part}}
            (again / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    other = merged("ties", family["base"], [again, family["b"]], tmp_path / "other")
    assert (plain / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_shards_of_the_output(family, tmp_path: Path) -> None:
    """Sharded output holds the same tensors, an index with the true total, shards under the size, and loads."""
    whole = merged("dare_ties", family["base"], [family["a"], family["b"]], tmp_path / "whole")
    shards = merged("dare_ties", family["base"], [family["a"], family["b"]], tmp_path / "shards", size="40KB")
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    one, many = weights(whole), weights(shards)
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in one.values())
    files = sorted(shards.glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert AutoModelForCausalLM.from_pretrained(shards).config.vocab_size == VOCABULARY


def test_what_stands_in_the_output(family, tmp_path: Path) -> None:
    """Exactly these files; the tokenizer's byte for byte the base's; generation config; card; run record."""
    out = merged("ties", family["base"], [family["a"], family["b"]], tmp_path / "out")
    assert {f.name for f in out.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "merge.lock.json", "mergekit_config.yml",
        "model.safetensors", "run_record.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert (out / "tokenizer.json").read_bytes() == (family["base"] / "tokenizer.json").read_bytes()
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    record = json.loads((out / "run_record.json").read_text())
    assert record["lineage"]["method"] == "ties"
    assert record["recipe"]["density"] == [0.2, 0.2]
    assert record["sources"]["density"].startswith("default: TIES")
    assert (out / "README.md").read_text().startswith("---\nlibrary_name: transformers")
    assert AutoTokenizer.from_pretrained(out).decode([5, 6]) == "w5 w6"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_of_the_output(family, tmp_path: Path, dtype: str) -> None:
    """--dtype rounds the one fp32 result; every floating-point tensor has it, and the config says so."""
    exact = weights(merged("linear", None, [family["a"], family["b"]], tmp_path / "exact", dtype="float32"))
    out = merged("linear", None, [family["a"], family["b"]], tmp_path / "out", dtype=dtype)
    for name, tensor in weights(out).items():
        assert torch.equal(tensor, exact[name].to(getattr(torch, dtype)))
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype


def test_linear_with_a_base_takes_only_its_tokenizer(family, tmp_path: Path) -> None:
    """A base given to linear changes no weight, and supplies tokenizer and config."""
    without = merged("linear", None, [family["a"], family["b"]], tmp_path / "1")
    with_base = merged("linear", family["base"], [family["a"], family["b"]], tmp_path / "2")
    assert (without / "model.safetensors").read_bytes() == (with_base / "model.safetensors").read_bytes()


def test_no_dependence_on_hash_seed(family, tmp_path: Path, run_script) -> None:
    """Law 19: weights, config and tokenizer are the same for any PYTHONHASHSEED."""
    contents = []
    for seed in ("0", "5"):
        out = tmp_path / seed
        models = f"{family['a']},{family['b']}"
        done = run_script(
            "merge.py", "--method", "linear", "--models_to_merge", models, "--save_path", out, PYTHONHASHSEED=seed
        )
        assert done.returncode == 0, done.stderr
        names = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json")
        contents.append([(out / name).read_bytes() for name in names])
    assert contents[0] == contents[1]


def hub_cache(folder: Path, **models: Path) -> None:
    """Lay local models out as the hub's cache does: models--org--name/snapshots/COMMIT, with refs/main."""
    import shutil

    for name, source in models.items():
        home = folder / f"models--org--{name}"
        commit = f"{len(name):040x}"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text(commit)
        shutil.copytree(source, home / "snapshots" / commit)


def test_cached_hub_ids_offline(family, tmp_path: Path, run_script) -> None:
    """Hub ids that are in the hub's cache work without internet, with @revision too, and their commit is recorded."""
    hub_cache(tmp_path / "hub", base=family["base"], a=family["a"])
    out = tmp_path / "out"
    done = run_script(
        "merge.py", "--method", "ties", "--base_model", "org/base@main", "--models_to_merge", "org/a",
        "--save_path", out, HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    local = merged("ties", family["base"], [family["a"]], tmp_path / "local")
    assert (out / "model.safetensors").read_bytes() == (local / "model.safetensors").read_bytes()
    inputs = json.loads((out / "run_record.json").read_text())["inputs"]
    assert {i["name"]: i["commit"] for i in inputs} == {"org/base@main": f"{4:040x}", "org/a": f"{1:040x}"}
    assert "base_model:\n- org/base\n- org/a\n" in (out / "README.md").read_text()


# vocabulary


def test_alignment_by_hand() -> None:
    """Rows follow token strings: reordered, missing, extra and padding rows, worked by hand."""
    template_model = {"a": 0, "b": 1, "c": 2}
    alignment = align(template_model, 5, {"b": 0, "a": 1, "d": 2}, 5)
    assert alignment is not None
    assert alignment.rows == (1, 0, -1, 3, 4)
    assert (alignment.missing, alignment.extra) == (("c",), ("d",))
    rows = torch.tensor([[10.0], [11], [12], [13], [14]])
    fill = torch.tensor([[0.0], [0], [7], [0], [0]])
    aligned = AlignedRows(rows, alignment, lambda wanted: fill[wanted])
    assert aligned[0:5].flatten().tolist() == [11, 10, 7, 13, 14]
    assert torch.cat([aligned[i : i + 2] for i in range(0, 5, 2)]).equal(aligned[0:5])
    same = align(template_model, 3, {**template_model, "pad": 3}, 4)
    assert same is not None
    assert same.rows is None
    assert same.extra == ("pad",)


def test_vocabulary_of_the_original_trio(family, tmp_path: Path, capsys) -> None:
    """Law 18, the original's own trio in miniature: base of 320 rows; models with [PAD] and with <pad> at row 320;
    one whose tokenizer lists a token without a row. The result has the base's rows and tokenizer, and it is said."""
    a = fine_tune(family["base"], tmp_path / "a", seed=1, extra=("[PAD]",))
    b = fine_tune(family["base"], tmp_path / "b", seed=2, extra=("<pad>",))
    c = fine_tune(family["base"], tmp_path / "c", seed=3)
    tokenizer = AutoTokenizer.from_pretrained(c)
    tokenizer.add_tokens(["<ghost>"])
    tokenizer.save_pretrained(c)
    recipe = make_recipe({"method": "task_arithmetic", "base_model": str(family["base"]),
                          "models_to_merge": f"{a},{b},{c}"}, {})  # fmt: skip
    out = merge(recipe, OutputConfig(tmp_path / "out"))
    said = capsys.readouterr().err
    assert "has 321 rows" in said
    assert "'[PAD]'" in said
    assert "'<pad>'" in said
    assert json.loads((out / "config.json").read_text())["vocab_size"] == VOCABULARY
    base, result = weights(family["base"]), weights(out)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        expected = base[name].float()
        for model in (a, b, c):
            expected = expected + (weights(model)[name][:VOCABULARY].float() - base[name].float())
        assert torch.equal(result[name], expected.bfloat16()), name
    assert len(AutoTokenizer.from_pretrained(out)) <= VOCABULARY


def test_model_with_fewer_rows(tmp_path: Path) -> None:
    """Law 18: a model that lacks a token of the base leaves that row as the base has it, and says so."""
    base = make_llama(tmp_path / "base", vocab=321, extra=("[PAD]",))
    small = make_llama(tmp_path / "small", seed=5, vocab=320)
    out = merged("task_arithmetic", base, [small], tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(weights(out)[name][320], weights(base)[name][320])
        assert torch.equal(weights(out)[name][:320], weights(small)[name])


def test_reordered_tokens_are_followed(family, tmp_path: Path) -> None:
    """Two tokenizers with two tokens exchanged: rows are exchanged with them, not matched by number."""
    other = fine_tune(family["base"], tmp_path / "other", seed=3)
    file = other / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["vocab"]["w10"], data["model"]["vocab"]["w11"] = 11, 10
    file.write_text(json.dumps(data))
    state = weights(other)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name][[10, 11]] = state[name][[11, 10]]
    save_file(state, other / "model.safetensors", {"format": "pt"})
    straight = fine_tune(family["base"], tmp_path / "straight", seed=3)
    one = merged("ties", family["base"], [other], tmp_path / "1")
    two = merged("ties", family["base"], [straight], tmp_path / "2")
    assert all(torch.equal(weights(one)[name], tensor) for name, tensor in weights(two).items())


# what is refused


def broken(folder: Path, how: str) -> Path:
    """Break a copy of a model in one way."""
    import shutil

    copy = folder / how.replace(" ", "_")
    shutil.copytree(folder / "base", copy)
    file = copy / "model.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "wrong header length":
        file.write_bytes((10**12).to_bytes(8, "little") + file.read_bytes()[8:])
    elif how == "no weights":
        file.unlink()
    elif how == "no config":
        (copy / "config.json").unlink()
    elif how == "missing shard":
        index = {"weight_map": {"x": "model-00002-of-00002.safetensors"}}
        file.unlink()
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "pickled code":
        file.unlink()
        torch.save({"x": Path("evil")}, copy / "pytorch_model.bin")
    elif how == "other shape":
        state = load_file(file)
        state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(5, 48, dtype=torch.bfloat16)
        save_file(state, file)
    elif how.startswith("fewer layers"):
        state = {k: v for k, v in load_file(file).items() if "layers.1" not in k}
        save_file(state, file)
        if how == "fewer layers in the config too":
            config = json.loads((copy / "config.json").read_text())
            (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    elif how == "other vocabulary in the config":
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "vocab_size": 7}))
    elif how == "other width in the config":
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    elif how == "one tensor in two shards":
        state = load_file(file)
        save_file(state, copy / "model-00001-of-00002.safetensors")
        save_file({"model.norm.weight": state["model.norm.weight"]}, copy / "model-00002-of-00002.safetensors")
        file.unlink()
    elif how == "index of a missing tensor":
        file.rename(copy / "model-00001-of-00001.safetensors")
        index = {"weight_map": {"ghost": "model-00001-of-00001.safetensors"}}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "other names":
        save_file({name.removeprefix("model."): t for name, t in load_file(file).items()}, file)
    elif how == "fp8":
        state = load_file(file)
        name = "model.layers.0.mlp.up_proj.weight"
        save_file({**state, name: state[name].to(torch.float8_e4m3fn)}, file)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    elif how == "packed":
        state = load_file(file)
        del state["model.layers.0.mlp.up_proj.weight"]
        packed = torch.zeros(12, 48, dtype=torch.int32)
        save_file({**state, "model.layers.0.mlp.up_proj.qweight": packed}, file)
    elif how == "empty folder":
        shutil.rmtree(copy)
        copy.mkdir()
    elif how == "extra tensor":
        save_file({**load_file(file), "value_head.weight": torch.zeros(3)}, file)
    elif how == "NaN inside":
        state = load_file(file)
        state["model.norm.weight"][3] = float("nan")
        save_file(state, file)
    return copy


REFUSED = [
    ("truncated", "cut short"),
    ("wrong header length", "its header claims"),
    ("no weights", "holds no weights"),
    ("no config", "has no config.json"),
    ("missing shard", "model-00002-of-00002.safetensors, which is not in the folder"),
    ("pickled code", "is not unpickled"),
    ("other shape", r"model\.layers\.0\.mlp\.up_proj\.weight is \[96, 48\] in .* and \[5, 48\]"),
    ("fewer layers", r"config\.json says 2 layers and the weights have 1"),
    (
        "fewer layers in the config too",
        r"has 2 layers \(model\.layers\.\*\), .*_too 1; choose the layers in a recipe with slices",
    ),
    ("other vocabulary in the config", "config.json says vocab_size 7 and the input embedding has 320 rows"),
    ("other width in the config", "config.json says hidden_size 64 and the input embedding has 48 columns"),
    ("one tensor in two shards", "model.norm.weight is in both"),
    ("index of a missing tensor", "names tensor ghost"),
    ("other names", r"names its tensors otherwise than .* \(its first is .*, there it is "),
    ("fp8", "up_proj.weight is quantized and .*up_proj.weight_scale_inv is missing"),
    ("packed", "qweight"),
    ("empty folder", "has no config.json"),
    ("extra tensor", "has a tensor value_head.weight, which"),
    (
        "NaN inside",
        "not finite: 1 entry is NaN or infinite in model.norm.weight of .*NaN_inside; download that model again",
    ),
]


@pytest.mark.parametrize(("how", "message"), REFUSED)
def test_broken_input_is_named_and_nothing_written(tmp_path: Path, how: str, message: str) -> None:
    """Each broken checkpoint is refused with a sentence that names the file or tensor; no folder is left behind."""
    base = make_llama(tmp_path / "base")
    model = broken(tmp_path, how)
    with pytest.raises(CheckpointError, match=message):
        merged("task_arithmetic", base, [model], tmp_path / "out")
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


def test_nan_is_named_by_trimming_too(tmp_path: Path) -> None:
    """TIES, which ranks magnitudes before it writes, names a tensor with NaN as well: few of them, or most."""
    base = make_llama(tmp_path / "base")
    few = broken(tmp_path, "NaN inside")
    with pytest.raises(CheckpointError, match=r"Tensor model\.norm\.weight of the result is not finite"):
        merged("ties", base, [few], tmp_path / "out")
    state = weights(few)
    state["model.norm.weight"][:] = float("nan")
    save_file(state, few / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"Tensor model\.norm\.weight holds NaN and .*: 48 entries are .* of .*NaN_inside;"
    ):
        merged("ties", base, [few], tmp_path / "out")


def test_overflow_is_not_blamed_on_an_input(tmp_path: Path) -> None:
    """Where every input is finite and the result is not, the dtype and the weights are named instead of a model."""
    base, model = make_llama(tmp_path / "base"), make_llama(tmp_path / "model", seed=1)
    recipe = make_recipe(
        {"method": "task_arithmetic", "base_model": str(base), "models_to_merge": str(model), "dtype": "float16",
         "weights": 1e9}, {},
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="while the inputs are: float16 cannot hold it, or a weight is"):
        merge(recipe, OutputConfig(tmp_path / "out"))


def test_broken_tokenizer_is_named(family, tmp_path: Path) -> None:
    """A tokenizer file that is no JSON is an error that names its folder, before any weight is read."""
    model = fine_tune(family["base"], tmp_path / "model", seed=1)
    (model / "tokenizer.json").write_text("{broken")
    with pytest.raises(CheckpointError, match=r"The tokenizer in .*model cannot be loaded by transformers"):
        merged("ties", family["base"], [model], tmp_path / "out")


def test_no_space(family, tmp_path: Path, monkeypatch) -> None:
    """A disk that is too full is refused before the first byte."""
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(FailureError, match="No space for the output"):
        merged("ties", family["base"], [family["a"]], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_result_is_as_open_as_any_folder(family, tmp_path: Path) -> None:
    """Folder and files of the result have the permissions that a new folder and file get, no tighter ones."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    out = merged("linear", None, [family["a"]], tmp_path / "out")
    assert out.stat().st_mode == (tmp_path / "folder").stat().st_mode
    assert {file.stat().st_mode for file in out.iterdir()} == {(tmp_path / "file").stat().st_mode}


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    """An error of the inputs in the middle of writing leaves neither the target nor the stage beside it."""
    base = make_llama(tmp_path / "models" / "base")
    model = broken(tmp_path / "models", "NaN inside")
    (tmp_path / "outs").mkdir()
    with pytest.raises(CheckpointError, match="not finite"):
        merged("linear", None, [base, model], tmp_path / "outs" / "out")
    assert list((tmp_path / "outs").iterdir()) == []


def test_overwrite_replaces_the_whole_folder(family, tmp_path: Path) -> None:
    """A non-empty target is refused without --overwrite, and replaced whole with it: no stale file stays."""
    out = merged("linear", None, [family["a"]], tmp_path / "out", size="40KB")
    with pytest.raises(UsageError, match="not empty"):
        merged("linear", None, [family["b"]], out)
    recipe = make_recipe({"method": "linear", "models_to_merge": str(family["b"])}, {})
    merge(recipe, OutputConfig(out, overwrite=True))
    assert [f.name for f in out.glob("*.safetensors*")] == ["model.safetensors"]
    opened = open_checkpoint(str(out))
    assert torch.equal(opened.read("lm_head.weight"), weights(family["b"])["lm_head.weight"])


def test_overwrite_never_touches_an_input(tmp_path: Path) -> None:
    """A target that is, contains or lies in an input is refused, with --overwrite too, and every input stays whole."""
    models = tmp_path / "models"
    base = make_llama(models / "base")
    a = fine_tune(base, models / "a", seed=1)
    for folder in (models, base, a):  # as if all had been written here, and so could be replaced
        (folder / "run_record.json").write_text("{}")
    before = {f: f.read_bytes() for f in models.rglob("*") if f.is_file()}
    recipe = make_recipe({"method": "ties", "base_model": str(base), "models_to_merge": str(a)}, {})
    link = tmp_path / "link"
    link.symlink_to(a)
    for target in (a, base, models, a / "inside", link, models / "." / "a"):
        with pytest.raises(UsageError, match="would write over or into the input"):
            merge(recipe, OutputConfig(target, overwrite=True))
    assert {f: f.read_bytes() for f in models.rglob("*") if f.is_file()} == before


def test_overwrite_replaces_only_what_was_written_here(family, tmp_path: Path) -> None:
    """--overwrite refuses a folder without a run record: it may hold somebody's work."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    recipe = make_recipe({"method": "linear", "models_to_merge": str(family["a"])}, {})
    with pytest.raises(UsageError, match="no checkpoint written here"):
        merge(recipe, OutputConfig(mine, overwrite=True))
    assert (mine / "thesis.txt").read_text() == "years"


def test_symlinked_target(family, tmp_path: Path) -> None:
    """A link as --save_path keeps pointing to its folder, which is replaced; nothing else is left beside it."""
    real = merged("linear", None, [family["a"]], tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    recipe = make_recipe({"method": "linear", "models_to_merge": str(family["b"])}, {})
    merge(recipe, OutputConfig(tmp_path / "link", overwrite=True))
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(weights(real)["lm_head.weight"], weights(family["b"])["lm_head.weight"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_tied_head_stored_twice(tmp_path: Path) -> None:
    """A base that ties its head and stores both matrices, as .bin files do, gives a tied result with one matrix."""
    base = make_llama(tmp_path / "base", tied=True)
    a = fine_tune(base, tmp_path / "a", seed=1)
    plain = merged("dare_ties", base, [a], tmp_path / "plain")
    for folder in (base, a):
        state = weights(folder)
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    out = merged("dare_ties", base, [a], tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_end_tokens_follow_their_string(family, tmp_path: Path) -> None:
    """End-of-sequence ids are united by token: a model whose </s> has another number adds nothing, one whose end is
    another token adds that token as the base numbers it."""
    other = fine_tune(family["base"], tmp_path / "other", seed=3)
    data = json.loads((other / "tokenizer.json").read_text())
    data["model"]["vocab"]["</s>"], data["model"]["vocab"]["w7"] = 7, 2
    for added in data["added_tokens"]:
        if added["content"] == "</s>":
            added["id"] = 7
    (other / "tokenizer.json").write_text(json.dumps(data))
    for ids, expected in ((7, 2), ([7, 9], [2, 9])):
        (other / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        out = merged("ties", family["base"], [other], tmp_path / f"out{ids}")
        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == expected


def test_tokenizers_of_different_families(family, tmp_path: Path) -> None:
    """A model that shares hardly any token with the base is refused, rather than its embedding thrown away."""
    other = fine_tune(family["base"], tmp_path / "other", seed=3)
    data = json.loads((other / "tokenizer.json").read_text())
    data["model"]["vocab"] = {"<unk>": 0}
    data["added_tokens"] = []
    (other / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="not of one family"):
        merged("ties", family["base"], [other], tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pytorch_model.bin", b"", "is not a whole PyTorch file"),
        ("pytorch_model.bin", b"cut" * 50, "is not"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"{}", "holds no|has no tensor"),
        ("model.safetensors", (14).to_bytes(8, "little") + b'{"x":{"a":[]}}', "is not a whole safetensors file"),
        ("model.safetensors.index.json", b'{"weight_map": ["x"]}', "has no weight_map"),
        ("model.safetensors.index.json", b"[]", "should hold a JSON object"),
    ],
)
def test_broken_files_are_named(family, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """Files that are empty, cut or of another form are named, in one sentence."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((family["a"] / "config.json").read_text())
    (model / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        merged("ties", family["base"], [model], tmp_path / "out")


def test_bin_of_something_else(family, tmp_path: Path) -> None:
    """A .bin that nests its state dict is no mapping of names to tensors, and is refused."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((family["a"] / "config.json").read_text())
    torch.save({"state_dict": {"x": torch.zeros(2)}}, model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="should map names to tensors"):
        merged("ties", family["base"], [model], tmp_path / "out")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1GiB", 2**30), ("200mb", 2 * 10**8), ("7", 7)])
def test_sizes(text: str, size: int) -> None:
    """GB counts in powers of ten, GiB in powers of two."""
    assert parse_size(text) == size


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux's account of memory")
def test_file_larger_than_the_memory(tmp_path: Path) -> None:
    """A safetensors file of three times the machine's memory (a hole, which takes no disk) opens, and any rows of it
    are read."""
    total = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    rows = 3 * total // 2048
    header = json.dumps({"w": {"dtype": "BF16", "shape": [rows, 1024], "data_offsets": [0, rows * 2048]}}).encode()
    header += b" " * (-len(header) % 8)
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.seek(rows * 2048 - 2048, 1)
        stream.write(torch.full((1024,), 1.5, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    (tmp_path / "config.json").write_text("{}")
    tensor = open_checkpoint(str(tmp_path)).rows("w")
    assert tensor.shape == (rows, 1024)
    assert torch.equal(tensor[-1], torch.full((1024,), 1.5, dtype=torch.bfloat16))
    assert not tensor[:2].any()
