"""Tokens have the ids that transformers gives them, in what is read and in what is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoTokenizer

from common.errors import CheckpointError, UsageError
from merging.checkpoints.model_folder import SETTINGS, VOCABULARIES, tokenizer_files
from merging.pipeline import merge
from merging.plan.merge_plan import OutputConfig
from merging.recipe import make_recipe
from merging.tokenizers.loading import load_in_subprocess
from merging.tokenizers.token_ids import token_ids, tokenizer_digest
from tests.helpers.architectures import quiet
from tests.helpers.tiny import fine_tune, make_llama, weights
from tests.helpers.tokenizer_layouts import LAYOUTS, SIZE, SLOW, make_layout, model, settings

EMBEDDING = "model.embed_tokens.weight"
FILES = re.compile(r"VOCAB_FILES_NAMES = \{(.*?)\}", re.DOTALL)


def loaded(folder: Path) -> dict[str, int]:
    """What a user's program gets; where the installed transformers cannot load it, so can token_ids not."""
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(folder).get_vocab()
        except Exception as error:
            with pytest.raises(CheckpointError, match="cannot be loaded by transformers"):
                token_ids(folder)
            pytest.skip(f"transformers {transformers.__version__} cannot load it: {error}")


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each layout."""
    folder = tmp_path_factory.mktemp("layouts")
    fast = {name: make_layout(name, folder / f"fast{i}") for i, name in enumerate(LAYOUTS)}
    return fast | {name: make(folder / name.replace(" ", "_")) for name, make in SLOW.items()}


@pytest.mark.parametrize("name", [*LAYOUTS, *SLOW])
def test_ids_are_those_of_transformers(layouts, name: str) -> None:
    """For every layout of a folder, token_ids is the vocabulary that AutoTokenizer gives, ids and all."""
    wanted = loaded(layouts[name])
    assert token_ids(layouts[name]) == wanted


def test_ids_without_torch(layouts) -> None:
    """The process without torch, which serves where transformers is not imported, gives the same for every layout."""
    found = load_in_subprocess(list(layouts.values()))
    assert len(found) > 30
    for folder in layouts.values():
        if folder in found:
            assert found[folder].tokens == token_ids(folder)
        else:  # left to the process with torch, which tells why
            with pytest.raises(CheckpointError):
                token_ids(folder)


def test_no_tokenizer(tmp_path: Path) -> None:
    """A folder without a vocabulary has no tokenizer, whatever settings lie in it: a class that makes up three tokens
    for want of its file is none either."""
    assert token_ids(tmp_path) is None
    for name in ("NoSuchTokenizer", "LlamaTokenizer"):
        settings(tokenizer_class=name)(tmp_path)
        assert token_ids(tmp_path) is None


def test_equal_tokenizers_are_one(tmp_path: Path) -> None:
    """Chat template, folder and what config.json says of the model's size have no part in the ids; the tokenizer's
    class and its tokens have."""
    folders = {
        name: make_layout("plain", tmp_path / name) for name in ("one", "same", "class", "token", "architecture")
    }
    settings(chat_template="{{ messages }}", model_max_length=9)(folders["same"])
    (folders["same"] / "chat_template.jinja").write_text("{{ messages }}")
    model(hidden_size=64)(folders["same"])
    model()(folders["one"])
    settings(tokenizer_class="LlamaTokenizer")(folders["class"])
    settings(pad_token="<pad>")(folders["token"])
    model(model_type="qwen2")(folders["architecture"])
    digests = {name: tokenizer_digest(folder) for name, folder in folders.items()}
    assert digests.pop("same") == digests["one"]
    assert len(set(digests.values())) == 4


def test_every_file_of_a_tokenizer_is_copied() -> None:
    """Whatever vocabulary file a tokenizer class of transformers names is taken for one of the tokenizer's."""
    sources = [file.read_text() for file in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py")]
    named = {name for text in sources for table in FILES.findall(text) for name in re.findall(r': "([^"]+)"', table)}
    assert len(named) > 15
    assert {name for name in named if not any(Path(name).match(p) for p in (*VOCABULARIES, *SETTINGS))} == set()


# what is merged


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base of SIZE rows with the plain tokenizer, and a fine-tuned model with two rows more."""
    folder = tmp_path_factory.mktemp("family")
    base = make_llama(folder / "base", vocab=SIZE, dtype=torch.float32, hidden=16, layers=1)
    make_layout("plain", base)
    return {"base": base, "more": fine_tune(base, folder / "more", seed=1, vocab=SIZE + 2)}


def copy_of(folder: Path, name: str, out: Path) -> Path:
    """The model with the tokenizer of a layout, beside its own config."""
    shutil.copytree(folder, out)
    for file in tokenizer_files(out):
        file.unlink()
    config = json.loads((out / "config.json").read_text())
    make_layout(name, out)
    if json.loads((out / "config.json").read_text()).get("model_type") != "llama":
        config["model_type"] = "qwen2"
        config["architectures"] = ["Qwen2ForCausalLM"]
    (out / "config.json").write_text(json.dumps(config))
    return out


def merged(base: Path, other: Path, out: Path, **more: object) -> Path:
    """The base merged with another model, in float32."""
    flags = {"method": "task_arithmetic", "base_model": str(base), "models_to_merge": str(other), "dtype": "float32"}
    flags |= {"allow_config_mismatch": True}  # a layout may name another model type, for its tokenizer class
    return merge(make_recipe({**flags, **more}, {}), OutputConfig(out, load_check=False))


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "files by version"])
def test_rows_go_by_the_ids_that_are_loaded(family, tmp_path: Path, name: str) -> None:
    """A union with a model of any layout: each token of the model that has a row there has that very row in the
    result, at the id that the result's tokenizer gives it; every id has a row."""
    other = copy_of(family["more"], name, tmp_path / "other")
    theirs = loaded(other)
    out = merged(family["base"], other, tmp_path / "out", tokenizer="union")
    ours, rows, before = loaded(out), weights(out)[EMBEDDING], weights(other)[EMBEDDING]
    assert max(ours.values()) < len(rows)
    kept = {token: i for token, i in theirs.items() if i < len(before)}
    assert kept.keys() <= ours.keys()
    for token, i in kept.items():
        torch.testing.assert_close(rows[ours[token]], before[i], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "a vocabulary with a gap"])
def test_no_id_without_a_row_in_any_layout(family, tmp_path: Path, name: str) -> None:
    """A base of any layout whose tokenizer lists more than its rows: the result's lists exactly those with a row, at
    their ids, and reads text into them."""
    base = copy_of(family["base"], name, tmp_path / "base")
    wanted = {token: i for token, i in loaded(base).items() if i < SIZE}
    out = merged(base, family["more"], tmp_path / "out")
    assert loaded(out) == wanted
    assert all(i < SIZE for i in AutoTokenizer.from_pretrained(out)("w3 w9 <x> [PAD] <pad>")["input_ids"])


@pytest.mark.parametrize("policy", ["base", "union"])
def test_a_tokenizer_that_cannot_be_changed(family, tmp_path: Path, run_script, policy: str) -> None:
    """A token without a row in the tokenizer's own vocabulary is refused from the headers: the dry run and the run say
    the same sentence, which names it, and the run fails before it looks at weights that would fail too."""
    base = copy_of(family["base"], "a vocabulary with a gap", tmp_path / "base")
    spoiled = shutil.copytree(family["more"], tmp_path / "spoiled")
    state = {name: torch.full_like(tensor, float("nan")) for name, tensor in weights(spoiled).items()}
    save_file(state, spoiled / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lists 'far' with the id 30, which has no row.*another --token") as told:
        merged(base, spoiled, tmp_path / "out", tokenizer=policy)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
    if policy == "base":
        command = ["merge.py", "--method", "task_arithmetic", "--base_model", base, "--models_to_merge", spoiled]
        dry = run_script(*command, "--dry_run")
        assert (dry.returncode, dry.stdout) == (1, "")
        assert str(told.value) in dry.stderr


@pytest.mark.parametrize("name", ["wordpiece", "byte level", "sentencepiece"])
@pytest.mark.parametrize("policy", ["base", "union"])
def test_slow_tokenizers_change_too(tmp_path: Path, name: str, policy: str) -> None:
    """A base whose tokenizer has no fast form and lists one token more than rows: it is taken out, in a union together
    with an added token, by the files that such a tokenizer has; or it is refused."""
    folder = SLOW[name](tmp_path / "tokenizer")
    size = max(loaded(folder).values())
    kind = json.loads((folder / "config.json").read_text())["model_type"] if (folder / "config.json").is_file() else ""
    base = make_llama(tmp_path / "base", vocab=size, dtype=torch.float32, hidden=16, layers=1)
    other = fine_tune(base, tmp_path / "other", seed=1, vocab=size + 1)
    for place in (base, other):
        for file in tokenizer_files(place):
            file.unlink()
        for file in tokenizer_files(folder):
            shutil.copyfile(file, place / file.name)
        if kind:
            settings(tokenizer_class="GPT2Tokenizer")(place)
    settings(additional_special_tokens=["<new>"])(other)
    before = loaded(other)
    out = merged(base, other, tmp_path / "out", tokenizer=policy)
    ours, rows = loaded(out), weights(out)[EMBEDDING]
    assert max(ours.values()) < len(rows)
    assert {token for token, i in before.items() if i < size} <= ours.keys()
    if policy == "union":
        last = next(token for token, i in before.items() if i == size)
        torch.testing.assert_close(rows[ours[last]], weights(other)[EMBEDDING][size], rtol=0, atol=1e-6)


def test_a_tokenizer_of_its_own_code(family, tmp_path: Path, capsys) -> None:
    """A tokenizer that only its own code can make: that is not run; models with the same files of it merge row by row,
    which is said, others are refused, and so is a union."""
    own = settings(tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]})
    folders = {name: Path(shutil.copytree(family["base"], tmp_path / name)) for name in ("base", "same", "other")}
    for folder in folders.values():
        own(folder)
    (folders["other"] / "tokenizer.json").write_text((folders["other"] / "tokenizer.json").read_text() + " ")
    assert token_ids(folders["base"]) is None
    out = merged(folders["base"], folders["same"], tmp_path / "out")
    said = capsys.readouterr().err
    assert "is defined by custom code, which is not run" in said
    assert f"put the .py files of {folders['base']} beside" in said
    assert torch.equal(weights(out)[EMBEDDING], weights(folders["base"])[EMBEDDING])
    with pytest.raises(CheckpointError, match="that transformers reads their rows cannot be matched by token"):
        merged(folders["base"], folders["other"], tmp_path / "two")
    with pytest.raises(UsageError, match="whose tokenizer is defined by custom code"):
        merged(folders["base"], folders["same"], tmp_path / "three", tokenizer="union")
