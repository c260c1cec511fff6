"""Tokenizer folders as they are found, made on the spot: common ones, and those that load otherwise than they read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.tiny import make_tokenizer

SIZE = 24
"""Tokens in the plain tokenizer: <unk>, <s>, </s>, w3, ..., w23."""
Edit = Callable[[Path], None]


def entry(content: str, **more: Any) -> dict[str, Any]:
    """An added token as tokenizer files describe it."""
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, **plain, **more}


def change(folder: Path, name: str, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file of a folder, an empty one where there is none."""
    file = folder / name
    data = json.loads(file.read_text()) if file.is_file() else {}
    edit(data)
    file.write_text(json.dumps(data))


def settings(**values: Any) -> Edit:
    """Add to tokenizer_config.json; a value of None takes a key out."""

    def edit(data: dict[str, Any]) -> None:
        data.update(values)
        for key in [key for key, value in values.items() if value is None]:
            del data[key]

    return lambda folder: change(folder, "tokenizer_config.json", edit)


def added(*pairs: tuple[str, int]) -> Edit:
    """Add tokens to tokenizer.json with the ids stated."""
    more = [{**entry(token), "id": i} for token, i in pairs]
    return lambda folder: change(folder, "tokenizer.json", lambda data: data["added_tokens"].extend(more))


def beside(name: str, **values: Any) -> Edit:
    """Write another JSON file beside."""
    return lambda folder: change(folder, name, lambda data: data.update(values))


def model(**values: Any) -> Edit:
    """Write a config.json."""
    return beside("config.json", **values)


def vocabulary(**tokens: int) -> Edit:
    """Put tokens into the own vocabulary of tokenizer.json."""
    return lambda folder: change(folder, "tokenizer.json", lambda data: data["model"]["vocab"].update(tokens))


def padding(token: str) -> Edit:
    """Make tokenizer.json pad with a token."""
    told = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": SIZE,
            "pad_type_id": 0, "pad_token": token}  # fmt: skip
    return lambda folder: change(folder, "tokenizer.json", lambda data: data.update(padding=told))


def older_file(folder: Path) -> None:
    """A tokenizer file for transformers from version 4 on, with other ids, that the settings list."""
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.4.0.0.json").write_text(text.replace('"w7"', '"seven"'))
    settings(fast_tokenizer_files=["tokenizer.json", "tokenizer.4.0.0.json"])(folder)


LAYOUTS: dict[str, tuple[Edit, ...]] = {
    "plain": (),
    "no settings": (lambda folder: (folder / "tokenizer_config.json").unlink(),),
    "beside a model": (model(model_type="llama"),),
    "class of the model": (settings(tokenizer_class="LlamaTokenizer"), model(model_type="llama")),
    "added with a row each": (added(("<x>", SIZE), ("<y>", SIZE + 1)),),
    "a special token named only": (settings(pad_token="<pad>"),),
    "a special token described": (settings(pad_token={"__type": "AddedToken", **entry("<pad>")}),),
    "a list of special tokens": (settings(additional_special_tokens=["<x>", "<y>"]),),
    "a decoder": (settings(added_tokens_decoder={str(SIZE): entry("<x>")}),),
    "older settings": (settings(tokenizer_class=None), beside("special_tokens_map.json", pad_token="<pad>")),
    # unusual
    "a key of its own": (settings(image_token="<image>"),),
    "extra tokens by name": (settings(extra_special_tokens={"boi_token": "<boi>", "eoi_token": "<eoi>"}),),
    "model-specific tokens": (settings(model_specific_special_tokens={"ear": "<ear>"}),),
    "padding of tokenizer.json": (padding("[PAD]"),),
    "a decoder with gaps": (settings(added_tokens_decoder={str(SIZE + 4): entry("<x>"), str(SIZE + 9): entry("<y>")}),),
    "a decoder that takes a word's id": (settings(added_tokens_decoder={"5": entry("<x>")}),),
    "gaps in tokenizer.json": (added(("<x>", SIZE + 4), ("<y>", SIZE + 9)),),
    "ids in another order": (added(("<x>", SIZE + 1), ("<y>", SIZE)),),
    "decoder against tokenizer.json": (
        added(("<x>", SIZE), ("<y>", SIZE + 1)),
        settings(added_tokens_decoder={str(SIZE): entry("<y>"), str(SIZE + 1): entry("<x>")}),
    ),
    "added_tokens.json": (beside("added_tokens.json", **{"<x>": SIZE}),),
    "added_tokens.json with a gap": (beside("added_tokens.json", **{"<x>": SIZE + 4}),),
    "added_tokens.json beside a decoder": (
        beside("added_tokens.json", **{"<x>": SIZE}),
        settings(added_tokens_decoder={str(SIZE): entry("<y>")}),
    ),
    "a map beside a decoder": (
        beside("special_tokens_map.json", pad_token="<pad>"),
        settings(added_tokens_decoder={"0": entry("<unk>")}),
    ),
    "a vocabulary with a gap": (vocabulary(far=SIZE + 6), added(("<x>", SIZE + 7))),
    "a class with tokens of its own": (settings(tokenizer_class="BertTokenizer"),),
    "a model with tokens of its own": (model(model_type="qwen2"),),
    "an unknown class": (settings(tokenizer_class="NoSuchTokenizer"),),
    "code of its own, not needed": (settings(auto_map={"AutoTokenizer": ["code.Own", None]}),),
    "files by version": (older_file,),
    "another vocabulary beside": (beside("vocab.json", a=0, b=1),),
    "an empty token": (settings(pad_token=""),),
}
"""What is changed in a plain tokenizer's folder, by name."""


def make_layout(name: str, folder: Path) -> Path:
    """Make one of LAYOUTS in a folder that may hold a model already."""
    make_tokenizer(folder, SIZE)
    for edit in LAYOUTS[name]:
        edit(folder)
    return folder


def make_wordpiece(folder: Path) -> Path:
    """BERT's form without a fast one: vocab.txt alone, which lacks a token that its class names."""
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(4, SIZE))]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return folder


def make_byte_level(folder: Path) -> Path:
    """GPT-2's form without a fast one: vocab.json and merges.txt, whose class names <|endoftext|>."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "Ġ": 3}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return folder


def make_sentencepiece(folder: Path) -> Path:
    """Llama 2's form without a fast one: tokenizer.model, and a token in added_tokens.json."""
    import io

    import sentencepiece

    folder.mkdir()
    made = io.BytesIO()
    words = [" ".join(f"word{i % 7}{j % 5}" for j in range(9)) for i in range(40)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=made, vocab_size=40, model_type="bpe", minloglevel=2, num_threads=1
    )
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": 40}))
    return folder


def make_bytes(folder: Path) -> Path:
    """ByT5's form: no vocabulary at all, ids are bytes."""
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer", "extra_ids": 2}))
    return folder


SLOW = {"wordpiece": make_wordpiece, "byte level": make_byte_level, "sentencepiece": make_sentencepiece,
        "bytes": make_bytes}  # fmt: skip
"""Tokenizers without tokenizer.json, each made by a function of its folder."""
