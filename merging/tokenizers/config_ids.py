"""The token ids in configs, as the result numbers the tokens that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from common.errors import CheckpointError

DROPPED = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id",
           "unk_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")  # fmt: skip
"""Ids that a model can do without: where the result lacks the token, they become null. Others are refused then."""
SINGLE = ("_token_id", "_token_index")
LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "forced_decoder_ids",
         "sequence_bias", "lang_to_id", "task_to_id")  # fmt: skip
OTHER_VOCABULARIES = ("codebook_", "codec_", "tts_codec_", "t2u_")
"""Beginnings of the keys whose ids are not of the text's tokens."""


@dataclass(frozen=True)
class Numbering:
    """How one model's token ids are called in the result.

    theirs, ours: {token: id} of the model and of the result, None where not known; had, rows: how many rows the model's
    embedding has, and the result's.
    """

    theirs: Mapping[str, int] | None
    ours: Mapping[str, int] | None
    had: int | None
    rows: int | None

    @cached_property
    def _tokens(self) -> Mapping[int, str]:
        return {i: token for token, i in (self.theirs or {}).items()}

    @cached_property
    def _taken(self) -> frozenset[int]:
        return frozenset((self.ours or {}).values())

    def of(self, number: int) -> int | None:
        """Return the result's id of what the model calls `number`; None where the result has no row for it.

        A number that is no token's keeps its row, unless a token of the result has taken it.
        """
        if number < 0:
            return number  # stands for nothing in the vocabulary
        known = self.theirs is not None and self.ours is not None
        token = self._tokens.get(number) if known else None
        found = number if token is None else (self.ours or {}).get(token)
        if found is None or (known and token is None and found in self._taken):
            return None
        return found if self.rows is None or found < self.rows else None

    def means_nothing(self, number: int) -> bool:
        """Whether a number is neither a token nor a row of the model, nor a token of the result."""
        return self.had is not None and number >= self.had and not {number} & (self._tokens.keys() | self._taken)


def renumber(config: dict[str, Any], numbering: Numbering, name: str) -> list[str]:
    """Give every token id in a config the result's number; returns the keys of which the result lacks something.

    Such a single id becomes null; in a list it is left out, together with the word or pair that it is part of; a list
    that is empty then is taken out, but for end-of-sequence ids, which become null. Raises CheckpointError for an id
    that a model cannot do without, naming the key; `name` is the model's.
    """
    touched = []
    for key, value in list(config.items()):
        if value is None or not _tells_ids(key):
            continue
        try:
            changed = _changed(key, value, numbering)
        except (TypeError, ValueError):
            continue  # no ids, whatever it is called
        if changed is None and key not in DROPPED:
            if numbering.means_nothing(value):
                continue  # of a part that this model has not
            raise CheckpointError(
                f"{name}: {key} {value} in its config has no row in the result; choose another --tokenizer, or give it "
                "a row with --pad_to_multiple_of."
            )
        if changed == [] and key in DROPPED:
            config[key] = None
        elif changed in ([], {}) and changed != value:
            del config[key]
        else:
            config[key] = changed
        if _leaves(changed) < _leaves(value):
            touched.append(key)
    return touched


def _tells_ids(key: str) -> bool:
    if key.startswith(OTHER_VOCABULARIES):
        return False
    return key.endswith((*SINGLE, *(f"{ending}s" for ending in SINGLE))) or key in LISTS


def _changed(key: str, value: Any, numbering: Numbering) -> Any:
    """The value of a key in the result's numbers. Raises TypeError for what should be an id and is none."""
    if isinstance(value, dict):  # a name for each id
        named = {name: _id(number, numbering) for name, number in value.items()}
        return {name: number for name, number in named.items() if number is not None}
    if not isinstance(value, list):
        return _id(value, numbering)
    if key == "forced_decoder_ids":  # (position, id or null)
        pairs = [(at, number, None if number is None else _id(number, numbering)) for at, number in value]
        return [[at, new] for at, old, new in pairs if new is not None or old is None]
    if key == "sequence_bias":  # (ids, bias)
        words = [(_words(ids, numbering), bias) for ids, bias in value]
        return [[ids, bias] for ids, bias in words if ids is not None]
    if all(isinstance(entry, list) for entry in value):
        return [word for entry in value if (word := _words(entry, numbering)) is not None]
    return [found for entry in value if (found := _id(entry, numbering)) is not None]


def _words(value: list[Any], numbering: Numbering) -> list[Any] | None:
    """A word as its ids, None where one of them is lost; or a list of words, None where all are."""
    if all(isinstance(entry, list) for entry in value):
        return [word for entry in value if (word := _words(entry, numbering)) is not None] or None
    found = [_id(entry, numbering) for entry in value]
    return None if None in found else found


def _id(number: Any, numbering: Numbering) -> int | None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError
    return numbering.of(number)


def _leaves(value: Any) -> int:
    """How many numbers a value holds."""
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_leaves, value)) if isinstance(value, list) else int(value is not None)
