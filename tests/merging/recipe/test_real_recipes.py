"""Public recipes merge to what mergekit makes of them, and what has no effect in them is reported."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from common.cli import run
from common.errors import UsageError
from merge import main
from merging.recipe import make_recipe, read_config, recipe_as_yaml, remarks
from merging.recipe.reading import BUILT_IN_TEMPLATES
from merging.tokenizers.chat_template import BUILT_IN
from tests.helpers.architectures import ARCHITECTURES, fine_tuned, save
from tests.helpers.real_recipes import OTHER_PROGRAMS, RECIPES, REPEATED, TOKENS, UPPER_LAYERS
from tests.helpers.tiny import fine_tune, make_llama, train, weights
from tests.merging.recipe.test_recipe_parity import RANDOM, assert_close, by_us

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders base, a, b, c, d, x, y, lora1 to lora3 and copies of a, in float32, in the working directory."""
    folder = tmp_path_factory.mktemp("real")
    base = make_llama(folder / "base", dtype=torch.float32, layers=4, hidden=32, vocab=64)
    for seed, name in enumerate("abcd", 1):
        fine_tune(base, folder / name, seed=seed)
    fine_tune(base, folder / "x", seed=5, extra=("<|im_start|>", "<|im_end|>"))
    fine_tune(base, folder / "y", seed=6, extra=("<pad>", "<|im_end|>"))
    for name in ("a2", "a3", "a4"):
        shutil.copytree(folder / "a", folder / name)
    for seed, name in enumerate(("lora1", "lora2", "lora3"), 7):
        train(base, folder / name, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def comparable(text: str) -> str:
    """The recipe in float32, and at density 1 where masks are drawn, since two programs draw different ones."""
    text = re.sub(r"dtype: (bfloat16|float16)", "dtype: float32", text)
    if yaml.safe_load(text)["merge_method"] in RANDOM:
        text = re.sub(r"density: (\[.*?\]|[\d.]+)", "density: 1.0", text)
    return text


def by_mergekit(text: str, out: Path) -> dict[str, torch.Tensor]:
    """Merge with mergekit's package."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(
        quiet=True,
        lora_merge_cache=str(out.parent / "adapters"),
        lora_merge_dtype="float32",
        write_model_card=False,  # its card asks the hub for each name
    )
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), options)
    return weights(out)


def settings(folder: Path) -> dict[str, Any]:
    """Return the config keys that state the shape of a result."""
    config = json.loads((folder / "config.json").read_text())
    return {key: config[key] for key in ("num_hidden_layers", "vocab_size", "tie_word_embeddings", "architectures")}


def rendered(folder: Path) -> str | None:
    """A conversation in the chat template of a result; None where it has none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    talk = [
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": "w4"},
        {"role": "user", "content": "w5"},
    ]
    if tokenizer.chat_template is None:
        return None
    return tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("name", RECIPES)
def test_public_recipes(name: str, tmp_path: Path) -> None:
    """Every tensor of a public recipe agrees with mergekit 0.1.5's to 2e-6 of its largest value, tokens have the same
    ids, the configs the same shape, and the chat template renders the same conversation."""
    from transformers import AutoTokenizer

    text = comparable(RECIPES[name])
    theirs = by_mergekit(text, tmp_path / "theirs")
    mine = by_us(text, tmp_path / "mine")
    ids, expected = (AutoTokenizer.from_pretrained(tmp_path / who).get_vocab() for who in ("mine", "theirs"))
    assert ids.keys() == expected.keys()
    if "union" not in text:
        assert ids == expected
    rows = torch.tensor([expected[token] for token in sorted(ids, key=ids.__getitem__)])
    for key in VOCABULARY:  # mergekit numbers a union in the order of a set, which changes from run to run
        theirs[key] = theirs[key][rows]
    assert_close(mine, theirs)
    assert settings(tmp_path / "mine") == settings(tmp_path / "theirs")
    assert rendered(tmp_path / "mine") == rendered(tmp_path / "theirs")


def test_a_last_slice_of_more_sources(tmp_path: Path) -> None:
    """Layers are mergekit's; what follows the layers is merged from all sources of the last slice, as in a merge of
    whole models, while mergekit 0.1.5 takes as many of them as the first slice has, which is reported."""
    text = comparable(UPPER_LAYERS)
    theirs = by_mergekit(text, tmp_path / "theirs")
    mine = by_us(text, tmp_path / "mine")
    whole = by_us(
        "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\ndtype: float32\n"
        "parameters: {weight: 0.5, density: 0.6}\n",
        tmp_path / "whole",
    )
    for name in ("lm_head.weight", "model.norm.weight"):
        assert torch.equal(mine.pop(name), whole[name])
        assert torch.equal(theirs.pop(name), weights(Path("base"))[name])
    assert_close(mine, theirs)
    said = remarks(make_recipe({}, yaml.safe_load(text)))
    assert any(s.startswith("slices: tensors after the layers are merged from all 3 sources") for s in said)


def test_modules_that_list_only_the_base(tmp_path: Path) -> None:
    """Of a vision-language model the decoder is merged, and the parts that list only the base are the base's bytes."""
    model = ARCHITECTURES["llava"].build()
    for name, seed in (("base", None), ("one", 1), ("two", 2)):
        save(model if seed is None else fine_tuned(model, seed), tmp_path / name)
    base = f"base_model: {tmp_path / 'base'}\ndtype: float32\nparameters: {{weight: 0.5, density: 0.6}}\n"
    models = f"[{{model: {tmp_path / 'one'}}}, {{model: {tmp_path / 'two'}}}]"
    alone = f"[{{model: {tmp_path / 'base'}}}]"
    modules = f"text_decoder: {{models: {models}}}, vision_tower: {{models: {alone}}}, multi_modal_projector: "
    parts = by_us(f"merge_method: ties\n{base}modules: {{{modules}{{models: {alone}}}}}\n", tmp_path / "parts")
    whole = by_us(f"merge_method: ties\n{base}models: {models}\n", tmp_path / "whole")
    own = weights(tmp_path / "base")
    kept = [name for name in parts if "vision" in name or "projector" in name]
    assert len(kept) > 10
    assert all(torch.equal(tensor, (own if name in kept else whole)[name]) for name, tensor in parts.items())


CONVERSATIONS = (
    [("user", " w3 ")],
    [("system", "s "), ("user", "w3"), ("assistant", " w4"), ("user", "w5\nw6")],
    [("user", "w3"), ("assistant", "w4")],
)


@pytest.mark.parametrize("name", BUILT_IN_TEMPLATES)
def test_chat_templates_by_name(name: str) -> None:
    """Each template that mergekit has by name is here too, and renders the same text of every conversation."""
    from mergekit._data import chat_templates
    from transformers.utils.chat_template_utils import _compile_jinja_template

    folder = Path(chat_templates.__path__[0])
    assert {file.stem for file in folder.glob("*.jinja")} == set(BUILT_IN_TEMPLATES)
    assert {file.stem for file in BUILT_IN.glob("*.jinja")} == set(BUILT_IN_TEMPLATES)
    mine, theirs = (_compile_jinja_template((where / f"{name}.jinja").read_text()) for where in (BUILT_IN, folder))
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        for prompt in (True, False):
            given = {"messages": messages, "add_generation_prompt": prompt, "bos_token": "<s>", "eos_token": "</s>"}
            assert mine.render(**given) == theirs.render(**given)


@pytest.mark.parametrize("name", TOKENS)
def test_rows_by_token(name: str, tmp_path: Path) -> None:
    """tokenizer.tokens: every row is mergekit's, those that are added, forced, zero or another token's among them; the
    recipe reads back as it is, and its lock repeats it."""
    from transformers import AutoTokenizer

    text = TOKENS[name]
    theirs = by_mergekit(text, tmp_path / "theirs")
    mine = by_us(text, tmp_path / "mine")
    ids, expected = (AutoTokenizer.from_pretrained(tmp_path / who).get_vocab() for who in ("mine", "theirs"))
    assert ids.keys() == expected.keys()
    order = torch.tensor([expected[token] for token in sorted(ids, key=ids.__getitem__)])
    for key in VOCABULARY:
        assert mine[key].shape == theirs[key].shape
        theirs[key][: len(order)] = theirs[key][order]
        if len(order) < len(mine[key]):  # padding: the mean of the model's own rows there, of all of them here
            theirs[key][len(order) :] = mine[key][len(order) :]
    assert_close(mine, theirs)
    recipe = make_recipe({}, yaml.safe_load(text))
    assert make_recipe({}, recipe_as_yaml(recipe)) == recipe
    again = ["--quiet", "--from_lock", str(tmp_path / "mine"), "--save_path", str(tmp_path / "again")]
    assert run(main, again) == 0
    assert all(torch.equal(tensor, mine[key]) for key, tensor in weights(tmp_path / "again").items())


def test_a_token_of_the_base_s_tokenizer(tmp_path: Path) -> None:
    """A token that no model has, with the row of another: both models take that row, so that any average of them is
    that row (mergekit 0.1.5 ends in a KeyError here)."""
    from transformers import AutoTokenizer

    text = (
        "merge_method: linear\nmodels: [{model: base}, {model: a}]\nbase_model: base\nparameters: {weight: 1}\n"
        "tokenizer: {source: base, tokens: {<new>: {source: {kind: model_token, model: base, token: </s>}}}}\n"
    )
    mine = by_us(text, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<new>") == 64
    for key in VOCABULARY:
        assert mine[key].shape[0] == 65
        assert torch.equal(mine[key][64], weights(Path("base"))[key][2])


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        ("{nowhere: {}}", "tokenizer.tokens.nowhere: no model has this token; give its source"),
        ("{w5: {source: c}}", "tokenizer.tokens.w5.source: c must be one of the models (base, x)."),
        ("{z: {source: x}}", "tokenizer.tokens.z.source: x has no row for the token 'z'."),
        ("{z: {source: {kind: model_token, model: x, token_id: 99}}}", "token_id 99 must be below x's 66 rows."),
    ],
)
def test_tokens_that_cannot_be(tokens: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A token without a row, and a source that is none, are one sentence each."""
    file = tmp_path / "recipe.yml"
    file.write_text(f"merge_method: ties\nbase_model: base\nmodels: [{{model: x}}]\ntokenizer: {{tokens: {tokens}}}\n")
    assert run(main, ["--config", str(file), "--save_path", str(tmp_path / "out"), "--quiet"]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("name", REPEATED)
def test_repeated_models(name: str, tmp_path: Path) -> None:
    """A model that is listed several times counts each time: the result is mergekit's of copies under other names."""
    text, copies = REPEATED[name]
    names = iter(copies)
    copied = re.sub(r"(model: )\w+(?=[,}])", lambda found: found[1] + next(names), text)
    assert_close(by_us(text, tmp_path / "mine"), by_mergekit(copied, tmp_path / "theirs"))


def test_the_dtype_of_the_recipe(tmp_path: Path) -> None:
    """A recipe's dtype is the result's; without one it keeps the models' own, as mergekit's does."""
    for line, dtype in (("dtype: bfloat16", torch.bfloat16), ("dtype: float16", torch.float16), ("", torch.float32)):
        text = f"merge_method: linear\nmodels: [{{model: a}}, {{model: b}}]\nparameters: {{weight: 1}}\n{line}\n"
        out = f"out-{line[7:]}"
        assert {t.dtype for t in by_us(text, tmp_path / out).values()} == {dtype}
        assert {t.dtype for t in by_mergekit(text, tmp_path / f"{out}-theirs").values()} == {dtype}


@pytest.mark.parametrize("name", OTHER_PROGRAMS)
def test_recipes_of_other_programs(name: str) -> None:
    """A recipe of mergekit-moe, mergekit-evolve or bakllama is refused by that program's name, with what to do."""
    with pytest.raises(UsageError, match=f"recipe of {name.strip()}") as caught:
        make_recipe({}, yaml.safe_load(OTHER_PROGRAMS[name]))
    assert "\n" not in str(caught.value)


def test_several_recipes_in_one_file(tmp_path: Path) -> None:
    """A file of mergekit-multi is refused with its stages in the order in which they can be merged."""
    file = tmp_path / "multi.yml"
    file.write_text(
        "merge_method: linear\nmodels: [{model: second}, {model: c}]\n---\n"
        "name: second\nmerge_method: linear\nmodels: [{model: first}, {model: b}]\n---\n"
        "name: first\nmerge_method: linear\nmodels: [{model: a}, {model: b}]\n"
    )
    with pytest.raises(UsageError, match=r"3 recipes of mergekit-multi.*first, second, the unnamed one"):
        read_config(file)


def test_a_filter_that_matches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A filter that is part of no tensor's name is reported with its parameter, also of a part of the layers."""
    file = tmp_path / "recipe.yml"
    file.write_text(RECIPES["slerp with a filter that matches nothing"])
    assert run(main, ["--config", str(file), "--save_path", str(tmp_path / "out"), "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "The filter 'modelnorm' of t matches no tensor." in said
    assert "filter 'mlp'" not in said
    text = (
        "merge_method: ties\nbase_model: base\nmodels:\n- {model: a, parameters: {weight: [{filter: layers.9, value: "
    )
    file.write_text(text + "0.1}, {value: 1}]}}\n")
    assert run(main, ["--config", str(file), "--save_path", str(tmp_path / "out"), "--dry_run"]) == 0
    assert "The filter 'layers.9' of weight matches no tensor." in capsys.readouterr().out


def test_what_public_recipes_hold_without_effect() -> None:
    """The leftovers in public recipes are named, each by its place."""
    found = {name: remarks(make_recipe({}, yaml.safe_load(text))) for name, text in RECIPES.items()}
    for name, sentence in (
        (
            "model_stock with weights",
            "models[0].parameters.weight has no effect: model_stock has no parameter 'weight'.",
        ),
        ("model_stock with a name", "name has no effect: it is a label."),
        ("passthrough with revision", "slices[0].sources[0].revision has no effect: a is a local folder."),
        ("slerp with embed_slerp and a union", "parameters.embed_slerp has no effect: slerp has no parameter"),
        ("arcee_fusion", "parameters.normalize has no effect: arcee_fusion has no parameter 'normalize'."),
        ("ties with shared parameters in the models", "models[1].parameters.lambda has no effect: lambda is one value"),
        ("della with a weight of the base", "models[0].parameters have no effect: base is the base"),
        ("a module with only the base", "modules.default.models lists only the base base: its tensors are copied."),
    ):
        assert any(said.startswith(sentence) for said in found[name]), (name, found[name])
