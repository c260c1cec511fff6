"""The result's configs: ids of special tokens in its numbering, what an older config says of generation, layers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerFast

from common.errors import CheckpointError
from merging.pipeline import merge
from merging.plan.merge_plan import OutputConfig
from merging.recipe import make_recipe
from merging.tokenizers.config_ids import Numbering, renumber
from tests.helpers.architectures import ARCHITECTURES, ENDS, VOCAB, Architecture, fine_tuned, load, logits, save
from tests.helpers.tiny import VOCABULARY, fine_tune, make_llama

OLD = Numbering({"a": 0, "b": 1, "c": 2, "<image>": 3}, {"b": 0, "a": 1, "new": 2, "<image>": 4}, 5, 6)
"""b and a change places, c is gone and a new token has its number, <image> moves; row 4 of the model pads it."""


@pytest.mark.parametrize(
    ("key", "value", "expected", "lost"),
    [
        ("bos_token_id", 0, 1, False),
        ("mask_token_id", 2, None, True),
        ("pad_token_id", -1, -1, False),
        ("eos_token_id", [0, 2, 1], [1, 0], True),
        ("eos_token_id", [2], None, True),
        ("eos_token_id", [], None, False),
        ("eos_token_id", 4, None, True),  # the model's padding, where the result has a token
        ("eos_token_id", 7, None, True),
        ("forced_bos_token_id", 1, 0, False),
        ("decoder_start_token_id", 2, None, True),
        ("sep_token_id", None, None, False),
        ("image_token_index", 3, 4, False),
        ("image_token_id", 99, 99, False),  # no row and no token of the model either
        ("boi_token_id", -200, -200, False),
        ("suppress_tokens", [0, 2, 1], [1, 0], True),
        ("suppress_tokens", [], [], False),
        ("begin_suppress_tokens", [2], "gone", True),
        ("bad_words_ids", [[0, 1], [0, 2], [1]], [[1, 0], [0]], True),
        ("bad_words_ids", [[2]], "gone", True),
        ("force_words_ids", [[[0], [2]], [[1]]], [[[1]], [[0]]], True),
        ("forced_decoder_ids", [[1, 0], [2, 2], [3, None]], [[1, 1], [3, None]], True),
        ("sequence_bias", [[[0, 1], 2.0], [[2], -1.0]], [[[1, 0], 2.0]], True),
        ("lang_to_id", {"<|en|>": 0, "<|fr|>": 2}, {"<|en|>": 1}, True),
        ("codebook_pad_token_id", 2, 2, False),  # of another vocabulary
        ("tokenizer_class", "c", "c", False),
        ("hidden_size", 2, 2, False),
    ],
)
def test_ids_follow_the_numbering(key: str, value: Any, expected: Any, lost: bool) -> None:
    """By hand: an id becomes the result's for the same token; what the result lacks becomes null, or leaves its list
    with the word or pair that it is part of; an empty list is none; numbers that are no token's stay."""
    config = {key: value}
    assert renumber(config, OLD, "model") == ([key] if lost else [])
    assert config == ({} if expected == "gone" else {key: expected})


def test_an_id_that_a_model_needs() -> None:
    """A placeholder that the result has no token for is refused by its key."""
    with pytest.raises(CheckpointError, match="model: image_token_id 2 in its config has no row in the result"):
        renumber({"image_token_id": 2}, OLD, "model")


def test_ids_without_a_tokenizer() -> None:
    """Where tokens are not known, ids stay while they have a row."""
    config = {"bos_token_id": 1, "eos_token_id": [2, 6]}
    renumber(config, Numbering(None, None, 8, 5), "model")
    assert config == {"bos_token_id": 1, "eos_token_id": [2]}


def merged(base: Path, other: Path, out: Path, load_check: bool = True, **more: object) -> dict[str, dict[str, Any]]:
    """Merge, with what is said, and return the two configs."""
    flags = {"method": "task_arithmetic", "base_model": str(base), "models_to_merge": str(other), "dtype": "float32"}
    merge(make_recipe({**flags, **more}, {}), OutputConfig(out, load_check=load_check))
    return {name: json.loads((out / name).read_text()) for name in ("config.json", "generation_config.json")}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and a fine-tuned model, float32."""
    folder = tmp_path_factory.mktemp("pair")
    base = make_llama(folder / "base", dtype=torch.float32, hidden=16, layers=1)
    return {"base": base, "tuned": fine_tune(base, folder / "tuned", seed=1)}


def changed(folder: Path, out: Path, config: dict[str, Any], generation: dict[str, Any] | None) -> Path:
    """The model with more in its configs; without a generation config where that is None."""
    shutil.copytree(folder, out)
    for name, more in (("config.json", config), ("generation_config.json", generation)):
        file = out / name
        if more is None:
            file.unlink()
        else:
            file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
    return out


def test_every_id_of_both_configs_moves(pair, tmp_path: Path, capsys) -> None:
    """A tokenizer that numbers the tokens backwards, without w9: ids of config, of the configs inside it that speak of
    the same vocabulary, and of the generation config follow; others stay; what is lost is said by its key."""
    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY) if i != 9)]
    ids = {token: i for i, token in enumerate(reversed(names))}
    raw = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(tmp_path / "tokenizer")
    inner = {"vocab_size": VOCABULARY, "mask_token_id": 5}
    config = {"sep_token_id": 7, "cls_token_id": 9, "text_config": {"pad_token_id": 5}, "thinker": inner,
              "vision_config": {"vocab_size": 5, "pad_token_id": 1}}  # fmt: skip
    base = changed(pair["base"], tmp_path / "base", {}, {"suppress_tokens": [8, 9], "pad_token_id": 9})
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    found = merged(base, pair["tuned"], tmp_path / "out", load_check=False, tokenizer=str(tmp_path / "tokenizer"))
    written = found["config.json"]
    assert (written["bos_token_id"], written["sep_token_id"], written["cls_token_id"]) == (ids["<s>"], ids["w7"], None)
    assert written["text_config"] == {"pad_token_id": ids["w5"]}
    assert written["thinker"] == {"vocab_size": VOCABULARY - 1, "mask_token_id": ids["w5"]}
    assert written["vision_config"] == {"vocab_size": 5, "pad_token_id": 1}
    generation = found["generation_config.json"]
    assert (generation["suppress_tokens"], generation["pad_token_id"]) == ([ids["w8"]], None)
    assert generation["eos_token_id"] == ids["</s>"]
    said = capsys.readouterr().err
    assert "\nconfig.json: cls_token_id named tokens without a row in the result" in said
    assert "\ngeneration_config.json: suppress_tokens, pad_token_id named tokens" in said


def test_no_empty_list_of_ends(pair, tmp_path: Path) -> None:
    """Where no end-of-sequence id has a row, the result has none: null, which transformers loads, and no empty list."""
    base = changed(pair["base"], tmp_path / "base", {"eos_token_id": [VOCABULARY]}, {"eos_token_id": [VOCABULARY + 1]})
    tuned = changed(pair["tuned"], tmp_path / "tuned", {"eos_token_id": []}, {"eos_token_id": []})
    found = merged(base, tuned, tmp_path / "out")
    assert [config["eos_token_id"] for config in found.values()] == [None, None]
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id is None


def test_generation_of_an_older_config(pair, tmp_path: Path) -> None:
    """A base without a generation config: the result's says what transformers reads from such a base's config."""
    told = {"num_beams": 3, "min_length": 2, "decoder_start_token_id": 1, "bad_words_ids": [[5]], "do_sample": False}
    base = changed(pair["base"], tmp_path / "base", told, None)
    merged(base, pair["tuned"], tmp_path / "out", load_check=False)
    old = transformers.__version__.startswith("4.")
    config = AutoConfig.from_pretrained(base) if old else json.loads((base / "config.json").read_text())
    theirs = GenerationConfig.from_model_config(config).to_dict()
    ours = GenerationConfig.from_pretrained(tmp_path / "out").to_dict()
    assert {key: ours[key] for key in told} == told
    assert {key: ours.get(key) for key in theirs if key in told or key.endswith("_token_id")} == {
        key: value for key, value in theirs.items() if key in told or key.endswith("_token_id")
    }


# slices of a part

PAIRED = {
    "bart": Architecture(
        "BartForConditionalGeneration",
        "BartConfig",
        {
            **ENDS, "vocab_size": VOCAB, "d_model": 16, "encoder_layers": 3, "decoder_layers": 3,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
            "max_position_embeddings": VOCAB, "decoder_start_token_id": 2,
        },
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration", "T5Config", {**ARCHITECTURES["t5"].values, "num_layers": 3}
    ),
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            **ARCHITECTURES["llava"].values,
            "text_config": {**ARCHITECTURES["llava"].values["text_config"], "num_hidden_layers": 3},
            "vision_config": {**ARCHITECTURES["llava"].values["vision_config"], "num_hidden_layers": 3},
        },
    ),
}  # fmt: skip
"""Models with two stacks of three layers."""


def _inner(tower: Any) -> Any:
    """The part of a vision tower with its layers, which transformers 4 wraps once more."""
    return getattr(tower, "vision_model", tower)


STACKS = {
    ("bart", "encoder"): lambda model: model.model.encoder.layers,
    ("bart", "decoder"): lambda model: model.model.decoder.layers,
    ("t5", "encoder"): lambda model: model.encoder.block,
    ("t5", "decoder"): lambda model: model.decoder.block,
    ("llava", "vision_tower"): lambda model: _inner(model.model.vision_tower).encoder.layers,
    ("llava", "text_decoder"): lambda model: model.model.language_model.layers,
}


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Make a model of two stacks and save it, and a fine-tuned one, once each."""
    folder, made = tmp_path_factory.mktemp("paired"), {}

    def get(name: str) -> tuple[Any, Path, Path]:
        if name not in made:
            model = PAIRED[name].build()
            made[name] = model, save(model, folder / name), save(fine_tuned(model, 1), folder / f"{name}-tuned")
        return made[name]

    return get


@pytest.mark.parametrize(("name", "part"), STACKS)
def test_slices_of_one_of_two_stacks(paired, tmp_path: Path, name: str, part: str) -> None:
    """Layers 0 and 2 of one stack, the other whole, with weight 0: the result loads with that many layers in each and
    computes what the base does without that layer."""
    _, base, tuned = paired(name)
    whole = {"models": [{"model": str(tuned), "parameters": {"weight": 0.0}}]}
    sources = [{"model": str(one), "parameters": {"weight": 0.0}} for one in (tuned, base)]
    slices = [{"sources": [{**source, "layer_range": [i, i + 1]} for source in sources]} for i in (0, 2)]
    others = [other for owner, other in STACKS if owner == name and other != part]
    modules = {**dict.fromkeys(others, whole), part: {"slices": slices}}
    if name == "llava":
        modules["multi_modal_projector"] = whole
    recipe = {"merge_method": "task_arithmetic", "base_model": str(base), "modules": modules, "dtype": "float32"}
    merge(make_recipe({}, recipe), OutputConfig(tmp_path / "out"))
    result, told = load(tmp_path / "out")
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected, _ = load(base)
    for other in (part, *others):
        assert len(STACKS[name, other](result)) == (2 if other == part else 3)
    del STACKS[name, part](expected)[1]
    torch.testing.assert_close(logits(result, PAIRED[name]), logits(expected, PAIRED[name]))


def test_a_config_without_words_for_its_layers(paired, tmp_path: Path) -> None:
    """Where no key tells how many layers the stack has, slices are refused by its name before anything is written."""
    _, base, tuned = paired("bart")
    silent = changed(base, tmp_path / "silent", {"decoder_layers": 7}, {})
    source = {"layer_range": [0, 2], "parameters": {"weight": 1.0}}
    slices = [{"sources": [{"model": str(model), **source} for model in (tuned, silent)]}]
    modules = {"encoder": {"models": [{"model": str(tuned)}]}, "decoder": {"slices": slices}}
    recipe = {"merge_method": "task_arithmetic", "base_model": str(silent), "modules": modules,
              "parameters": {"weight": 1.0}}  # fmt: skip
    with pytest.raises(CheckpointError, match=r"Slices of model\.decoder\.layers\.\*.*no key that holds"):
        merge(make_recipe({}, recipe), OutputConfig(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
