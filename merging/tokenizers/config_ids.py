"""Token ids in configs, renumbered to the result's vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from common.errors import CheckpointError
from common.files.json_values import JsonObject, JsonValue

DROPPED = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id",
           "unk_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")  # fmt: skip
"""Optional ids, which become null where the result lacks the token; for other keys that is an error."""
SINGLE = ("_token_id", "_token_index")
LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "forced_decoder_ids",
         "sequence_bias", "lang_to_id", "task_to_id")  # fmt: skip
OTHER_VOCABULARIES = ("codebook_", "codec_", "tts_codec_", "t2u_")
"""Prefixes of keys whose ids belong to another vocabulary than the text's."""


@dataclass(frozen=True)
class Numbering:
    """Map from one model's token ids to the result's.

    Attributes:
        model_ids, result_ids: {token: id} of the model and of the result; None where unknown.
        model_rows, result_rows: Rows of the input embedding of the model and of the result; None where unknown.
    """

    model_ids: Mapping[str, int] | None
    result_ids: Mapping[str, int] | None
    model_rows: int | None
    result_rows: int | None

    @cached_property
    def _tokens(self) -> Mapping[int, str]:
        return {i: token for token, i in (self.model_ids or {}).items()}

    @cached_property
    def _result_id_set(self) -> frozenset[int]:
        return frozenset((self.result_ids or {}).values())

    def of(self, number: int) -> int | None:
        """Return the result's id for a model's token id; None where the result has no row for it.

        An id without a token stays, unless a token of the result has that id.
        """
        if number < 0:
            return number  # negative ids are no tokens (-1: none, -100: ignored)
        has_tokens = self.model_ids is not None and self.result_ids is not None
        token = self._tokens.get(number) if has_tokens else None
        new_id = number if token is None else (self.result_ids or {}).get(token)
        if new_id is None or (has_tokens and token is None and new_id in self._result_id_set):
            return None
        return new_id if self.result_rows is None or new_id < self.result_rows else None

    def means_nothing(self, number: int) -> bool:
        """Return True for an id that is neither a token nor a row of the model, nor a token of the result."""
        return (
            self.model_rows is not None
            and number >= self.model_rows
            and not {number} & (self._tokens.keys() | self._result_id_set)
        )


def renumber(config: JsonObject, numbering: Numbering, name: str) -> list[str]:
    """Replace every token id in a config by the result's id, in place.

    An id that the result lacks becomes null; in a list it is removed together with its word or pair. A list that
    becomes empty is removed, except end-of-sequence ids, which become null.

    Args:
        config: The config, which is changed.
        numbering: Map from the model's ids to the result's.
        name: Name of the model in messages.

    Returns:
        The keys that lost an id.

    Raises:
        CheckpointError: The result lacks an id that the model requires; names the key.
    """
    changed_keys = []
    for key, value in list(config.items()):
        if value is None or not _holds_ids(key):
            continue
        try:
            changed = _changed(key, value, numbering)
        except (TypeError, ValueError):
            continue  # the value holds no ids, despite its key
        if changed is None and key not in DROPPED:
            if numbering.means_nothing(value):
                continue  # belongs to a part that this model lacks
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
        if _count_ids(changed) < _count_ids(value):
            changed_keys.append(key)
    return changed_keys


def _holds_ids(key: str) -> bool:
    if key.startswith(OTHER_VOCABULARIES):
        return False
    return key.endswith((*SINGLE, *(f"{ending}s" for ending in SINGLE))) or key in LISTS


def _changed(key: str, value: JsonValue, numbering: Numbering) -> JsonValue:
    """Return the value of a key with the result's ids. Raises TypeError for a value that is no id."""
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
    return [new_id for entry in value if (new_id := _id(entry, numbering)) is not None]


def _words(value: list[JsonValue], numbering: Numbering) -> list[JsonValue] | None:
    """Return a word's ids, None where the result lacks one of them; or a list of words, None where it lacks all."""
    if all(isinstance(entry, list) for entry in value):
        return [word for entry in value if (word := _words(entry, numbering)) is not None] or None
    ids = [_id(entry, numbering) for entry in value]
    return None if None in ids else ids


def _id(number: object, numbering: Numbering) -> int | None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError
    return numbering.of(number)


def _count_ids(value: object) -> int:
    """Return the number of ids in a value."""
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_count_ids, value)) if isinstance(value, list) else int(value is not None)
