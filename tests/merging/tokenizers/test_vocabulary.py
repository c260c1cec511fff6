"""Whose vocabulary, tokenizer, chat template and output head the result has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from common.errors import CheckpointError, UsageError
from merging.pipeline import merge
from merging.plan.merge_plan import OutputConfig
from merging.recipe import make_recipe
from tests.helpers.tiny import VOCABULARY, fine_tune, make_llama, make_tokenizer, weights

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def merged(base: Path, models: list[Path], out: Path, method: str = "task_arithmetic", **more: object) -> Path:
    """Merge with the project, in float32 unless asked."""
    flags = {"method": method, "base_model": str(base), "models_to_merge": ",".join(map(str, models))}
    return merge(make_recipe({"dtype": "float32", **flags, **more}, {}), OutputConfig(out))


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The original's trio in miniature, float32: a with [PAD] at row 320, b with <pad> there, c without."""
    folder = tmp_path_factory.mktemp("trio")
    base = make_llama(folder / "base", dtype=torch.float32)
    return {
        "base": base,
        "a": fine_tune(base, folder / "a", seed=1, extra=("[PAD]",)),
        "b": fine_tune(base, folder / "b", seed=2, extra=("<pad>",)),
        "c": fine_tune(base, folder / "c", seed=3),
    }


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_union_keeps_every_token(trio, tmp_path: Path, capsys, name: str) -> None:
    """Union: the base's rows as with policy base; a token that one model has keeps that model's row exactly; ids, rows,
    config and tokenizer agree."""
    models = [trio["a"], trio["b"], trio["c"]]
    out = merged(trio["base"], models, tmp_path / "out", tokenizer="union")
    assert "2 tokens ('[PAD]', '<pad>') added" in capsys.readouterr().err
    result, plain = weights(out)[name], weights(merged(trio["base"], models, tmp_path / "plain"))[name]
    assert result.shape[0] == 322
    assert torch.equal(result[:VOCABULARY], plain)
    assert torch.equal(result[320], weights(trio["a"])[name][320])
    assert torch.equal(result[321], weights(trio["b"])[name][320])
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "<pad>", "w7"]) == [320, 321, 7]
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 322
    assert AutoModelForCausalLM.from_pretrained(out)(torch.tensor([[1, 320, 321]])).logits.shape[-1] == 322


def test_union_of_a_shared_token(trio, tmp_path: Path) -> None:
    """A token that two models have and the base lacks: task arithmetic from the mean of the two gives that mean."""
    d = fine_tune(trio["base"], tmp_path / "d", seed=4, extra=("<x>", "[PAD]"))
    result = weights(merged(trio["base"], [trio["a"], d], tmp_path / "out", tokenizer="union"))[EMBEDDING]
    mean = (weights(trio["a"])[EMBEDDING][320] + weights(d)[EMBEDDING][321]) / 2
    assert torch.allclose(result[320], mean, atol=1e-6)
    assert torch.equal(result[321], weights(d)[EMBEDDING][320])


def test_union_uses_padding_rows_first(tmp_path: Path) -> None:
    """A base with 10 rows of padding after its 320 tokens has room: its number of rows stays, the padding after the
    added token stays the base's."""
    base = make_llama(tmp_path / "base", vocab=330, dtype=torch.float32)
    make_tokenizer(base, VOCABULARY)
    a = fine_tune(base, tmp_path / "a", seed=1)
    make_tokenizer(a, VOCABULARY, ("<new>",))
    out = merged(base, [a], tmp_path / "out", tokenizer="union")
    result = weights(out)[EMBEDDING]
    assert result.shape[0] == 330
    assert torch.equal(result[:321], weights(a)[EMBEDDING][:321])
    assert torch.equal(result, weights(a)[EMBEDDING])  # both pad the same rows
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<new>") == 320


def test_named_tokenizer(trio, tmp_path: Path) -> None:
    """--tokenizer MODEL: its files byte for byte, its rows in its order; the base's lacking row takes that model's."""
    out = merged(trio["base"], [trio["a"], trio["c"]], tmp_path / "out", tokenizer=str(trio["a"]))
    assert (out / "tokenizer.json").read_bytes() == (trio["a"] / "tokenizer.json").read_bytes()
    result = weights(out)[EMBEDDING]
    assert result.shape[0] == 321
    assert torch.equal(result[320], weights(trio["a"])[EMBEDDING][320])
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 321


def test_named_tokenizer_in_another_order(trio, tmp_path: Path) -> None:
    """A tokenizer from elsewhere that numbers the tokens backwards: each token's row follows its string, the special
    ids of config and generation config follow too, and the model computes what it did on the renumbered text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
    backwards = {token: i for i, token in enumerate(reversed(names))}
    raw = Tokenizer(models.WordLevel(backwards, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(tmp_path / "tokenizer")
    plain = merged(trio["base"], [trio["c"]], tmp_path / "plain")
    out = merged(trio["base"], [trio["c"]], tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"))
    assert torch.equal(weights(out)[EMBEDDING].flip(0), weights(plain)[EMBEDDING])
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (backwards["<s>"], backwards["</s>"])
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == backwards["</s>"]
    text = "w5 w9 w200"
    old = AutoModelForCausalLM.from_pretrained(plain)(**AutoTokenizer.from_pretrained(plain)(text, return_tensors="pt"))
    new = AutoModelForCausalLM.from_pretrained(out)(**AutoTokenizer.from_pretrained(out)(text, return_tensors="pt"))
    assert torch.allclose(new.logits.flip(-1), old.logits, atol=1e-5)


def test_tokenizer_that_nobody_has_rows_for(trio, tmp_path: Path) -> None:
    """A tokenizer with a token that no model has a row for is refused by name."""
    make_tokenizer(tmp_path / "other", VOCABULARY, ("<mystery>",))
    with pytest.raises(UsageError, match=r"lists 1 token \('<mystery>'\) that none of the models"):
        merged(trio["base"], [trio["c"]], tmp_path / "out", tokenizer=str(tmp_path / "other"))


@pytest.mark.parametrize("policy", ["base", "union"])
def test_no_id_without_a_row(trio, tmp_path: Path, capsys, policy: str) -> None:
    """A base whose own tokenizer lists a token without a row: the result's tokenizer does not list it, nor any setting
    of it; every id has a row. Other files stay byte for byte."""
    base = fine_tune(trio["base"], tmp_path / "base", seed=0, std=0.0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<ghost>"})
    tokenizer.save_pretrained(base)
    out = merged(base, [trio["a"]], tmp_path / "out", tokenizer=policy)
    assert "1 token ('<ghost>') without a row left out" in capsys.readouterr().err
    written = AutoTokenizer.from_pretrained(out)
    assert "<ghost>" not in written.get_vocab()
    assert written.pad_token is None
    assert max(written.get_vocab().values()) < weights(out)[EMBEDDING].shape[0]


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_rows_up_to_a_multiple(trio, tmp_path: Path, capsys, name: str) -> None:
    """--pad_to_multiple_of 96: 320 rows become 384, in config and tensors; the new ones are the mean of the others, as
    the method merges it, and the tokenizer's files stay byte for byte; a multiple that fits changes nothing."""
    out = merged(trio["base"], [trio["c"]], tmp_path / "out", pad_to_multiple_of=96)
    assert "384 rows, a multiple of 96" in capsys.readouterr().err
    plain = weights(merged(trio["base"], [trio["c"]], tmp_path / "plain"))[name]
    result = weights(out)[name]
    assert result.shape[0] == json.loads((out / "config.json").read_text())["vocab_size"] == 384
    assert torch.equal(result[:VOCABULARY], plain)
    torch.testing.assert_close(result[VOCABULARY:], plain.mean(0).expand(64, -1), rtol=0, atol=1e-6)
    assert (out / "tokenizer.json").read_bytes() == (trio["base"] / "tokenizer.json").read_bytes()
    fitting = merged(trio["base"], [trio["c"]], tmp_path / "fitting", pad_to_multiple_of=64)
    assert torch.equal(weights(fitting)[name], plain)


def test_a_multiple_gives_rows_to_tokens(trio, tmp_path: Path) -> None:
    """A token that the base lists without a row keeps its id once rows are rounded up, and takes the row of a model
    that has it; one that nobody has a row for gets the mean."""
    base = fine_tune(trio["base"], tmp_path / "base", seed=0, std=0.0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<ghost>", "[PAD]"])
    tokenizer.save_pretrained(base)
    out = merged(base, [trio["a"]], tmp_path / "out", pad_to_multiple_of=64)
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids(["<ghost>", "[PAD]"]) == [320, 321]
    result, theirs = weights(out)[EMBEDDING], weights(trio["a"])[EMBEDDING]
    assert result.shape[0] == 384
    assert torch.equal(result[321], theirs[320])
    torch.testing.assert_close(result[320], theirs.mean(0), rtol=0, atol=1e-6)


# chat templates


@pytest.fixture(scope="module")
def templated(trio, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models with chat templates: base X, a and b Y, c none."""
    import shutil

    folder = tmp_path_factory.mktemp("templated")
    for name, path in trio.items():
        shutil.copytree(path, folder / name)
    for name, text in (("base", "X{{ messages }}"), ("a", "Y{{ messages }}"), ("b", "Y{{ messages }}")):
        (folder / name / "chat_template.jinja").write_text(text)
    return {name: folder / name for name in trio}


@pytest.mark.parametrize(
    ("policy", "expected", "said"),
    [
        ("base", "X{{ messages }}", "base."),
        ("auto", "Y{{ messages }}", "2 of 4 models have it"),
        ("b", "Y{{ messages }}", "b."),
        ("Z{{ messages }}", "Z{{ messages }}", "given as Jinja"),
    ],
)
def test_chat_template(templated, tmp_path: Path, capsys, policy: str, expected: str, said: str) -> None:
    """The base's, the commonest, a named model's or a written template; transformers reads it; the choice is said."""
    asked = str(templated[policy]) if policy in templated and policy != "base" else policy
    models = [templated[name] for name in "abc"]
    out = merged(templated["base"], models, tmp_path / "out", chat_template=asked)
    assert AutoTokenizer.from_pretrained(out).chat_template == expected
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("Chat template"))
    assert line.rstrip().endswith((said, said + ".", said + ")."))


def test_chat_template_of_a_model_without_one(templated, tmp_path: Path) -> None:
    """A model without a template, or one that is not among the inputs, is refused."""
    for asked, message in (
        (str(templated["c"]), "has no chat template"),
        ("org/other", "must be base, auto, .*the name of one of the models"),
    ):
        with pytest.raises(UsageError, match=message):
            merged(templated["base"], [templated["a"], templated["c"]], tmp_path / "out", chat_template=asked)


# tied and untied


def untied(folder: Path, out: Path, seed: int) -> Path:
    """An untied model from a tied one: its head a copy of the embedding that went its own way."""
    model = LlamaForCausalLM.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(seed)
    state[HEAD] = state[EMBEDDING] + 0.01 * torch.randn(state[EMBEDDING].shape)
    out.mkdir()
    save_file(state, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    make_tokenizer(out)
    return out


@pytest.mark.parametrize("which", ["tied base", "untied base"])
def test_mixed_tied_and_untied(tmp_path: Path, capsys, which: str) -> None:
    """The stated rule: the result ties only if every input does. A tied model's embedding stands for its head, the
    result stores a head and its config says so; it is announced."""
    tied = make_llama(tmp_path / "tied", tied=True, dtype=torch.float32)
    own = untied(tied, tmp_path / "own", seed=1)
    base, model = (tied, own) if which == "tied base" else (own, tied)
    out = merged(base, [model], tmp_path / "out")
    said = capsys.readouterr().err
    assert f"its {EMBEDDING} serves as {HEAD}" in said
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    stored = {"base": weights(base), "model": weights(model)}
    head = {name: state.get(HEAD, state[EMBEDDING]) for name, state in stored.items()}
    assert torch.equal(weights(out)[HEAD], head["base"] + (head["model"] - head["base"]))
    loaded = LlamaForCausalLM.from_pretrained(out)
    assert torch.equal(loaded.lm_head.weight, weights(out)[HEAD])
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight) or which == "untied base"


def test_all_tied_stay_tied(tmp_path: Path) -> None:
    """Tied inputs give a tied result: no head stored, as many parameters as the base."""
    base = make_llama(tmp_path / "base", tied=True)
    out = merged(base, [fine_tune(base, tmp_path / "a", seed=1)], tmp_path / "out", dtype="bfloat16")
    assert HEAD not in weights(out)
    assert sum(t.numel() for t in weights(out).values()) == sum(t.numel() for t in weights(base).values())


def test_config_that_says_tied_beside_another_head(tmp_path: Path) -> None:
    """A config that ties a head which the weights hold differently contradicts itself, and is refused by name."""
    base = make_llama(tmp_path / "base", tied=True, dtype=torch.float32)
    own = untied(base, tmp_path / "own", seed=1)
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"says that lm_head\.weight is tied"):
        merged(base, [own], tmp_path / "out")


@pytest.mark.parametrize("how", ["decoder", "named", "list", "pad id"])
def test_tokens_that_only_settings_list(trio, tmp_path: Path, how: str) -> None:
    """Tokens without a row that stand only in a tokenizer's settings (its decoder, a special token that is named, a
    list) are left out of the result too, and an id of a special token without a row is no id of its configs."""
    base = fine_tune(trio["base"], tmp_path / "base", seed=0, std=0.0)
    file = base / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    entry = {"content": "<ghost>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
             "special": True}  # fmt: skip
    changed = {
        "decoder": {"added_tokens_decoder": {str(VOCABULARY): entry}},
        "named": {"pad_token": "<ghost>"},
        "list": {"additional_special_tokens": ["<ghost>", "<x>"]},
        "pad id": {"pad_token": "<ghost>"},
    }
    file.write_text(json.dumps({**settings, **changed[how]}))
    if how == "pad id":
        for name in ("config.json", "generation_config.json"):
            config = json.loads((base / name).read_text())
            (base / name).write_text(json.dumps({**config, "pad_token_id": VOCABULARY}))
    assert len(AutoTokenizer.from_pretrained(base)) > VOCABULARY
    out = merged(base, [trio["c"]], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == VOCABULARY
    assert max(tokenizer.get_vocab().values()) < weights(out)[EMBEDDING].shape[0]
    for name in ("config.json", "generation_config.json"):
        assert (json.loads((out / name).read_text()).get("pad_token_id") or 0) < VOCABULARY


def test_union_sees_tokens_that_only_settings_list(trio, tmp_path: Path) -> None:
    """A model whose added token stands in added_tokens.json alone keeps its trained row in the union, as far as the
    installed transformers reads that file."""
    model = fine_tune(trio["base"], tmp_path / "model", seed=5, extra=("<late>",))
    make_tokenizer(model, VOCABULARY)
    (model / "added_tokens.json").write_text(json.dumps({"<late>": VOCABULARY}))
    if "<late>" not in AutoTokenizer.from_pretrained(model).get_vocab():
        pytest.skip("transformers 4 does not read it beside tokenizer.json")
    out = merged(trio["base"], [model], tmp_path / "out", tokenizer="union")
    assert torch.equal(weights(out)[EMBEDDING][VOCABULARY], weights(model)[EMBEDDING][VOCABULARY])
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<late>") == VOCABULARY
