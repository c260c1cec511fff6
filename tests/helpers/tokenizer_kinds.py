"""Tokenizers of each kind, trained on the spot: what their decoders do with the first space of a text differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SPECIAL = ["<unk>", "<s>", "</s>"]
KINDS = ("byte-level", "metaspace", "metaspace without dummy prefix", "llama-2", "unigram", "wordpiece")


def make_tokenizer(kind: str, texts: Sequence[str], size: int = 1200) -> Any:
    """A fast tokenizer of a kind, trained on `texts`, that holds each character of them."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    characters = sorted({c for text in texts for c in text})
    blank = "\u2581"
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=size, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    elif kind.startswith("metaspace"):
        scheme = "never" if "without" in kind else "always"
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=SPECIAL, initial_alphabet=[*characters, blank], max_token_length=8
        )
    elif kind == "llama-2":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(blank), normalizers.Replace(" ", blank)])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(blank, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        known = [c for c in characters if ord(c) < 128 and c != "~"]  # others go through bytes
        trainer = trainers.BpeTrainer(
            vocab_size=size + 256, special_tokens=[*SPECIAL, *bytes_], initial_alphabet=[*known, blank],
            limit_alphabet=len(known) + 1, max_token_length=8,
        )  # fmt: skip
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=[*characters, blank]
        )
    else:  # a WordPiece tokenizer that keeps white space: each word of it begins a new piece
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=10**6))
        tokenizer.normalizer = normalizers.Replace(" ", blank)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{blank}+|\\w+|\\n+|."), "isolated")
        tokenizer.decoder = decoders.Sequence(
            [decoders.WordPiece(prefix="##", cleanup=False), decoders.Replace(" ", ""), decoders.Replace(blank, " ")]
        )
        trainer = trainers.WordPieceTrainer(
            vocab_size=size + 2 * len(characters), special_tokens=SPECIAL, initial_alphabet=[*characters, blank],
            continuing_subword_prefix="##",
        )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    if kind == "llama-2":
        _as_bytes(tokenizer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=[], clean_up_tokenization_spaces=True,
    )  # fmt: skip


def _as_bytes(tokenizer: Any) -> None:
    """Byte tokens are ordinary ones; the trainer knows special ones only."""
    import json

    from tokenizers import Tokenizer

    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer.__setstate__(Tokenizer.from_str(json.dumps(data)).__getstate__())
