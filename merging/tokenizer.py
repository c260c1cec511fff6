"""The result's tokenizer: the base's, the union of all, or a named model's; written so that no id lacks a row."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from console.errors import CheckpointError, UsageError
from console.files import read_json
from merging.checkpoint import Checkpoint
from merging.hub import CheckpointRef, locate
from merging.names import role_of
from merging.tokenizer_files import tokenizer_files
from merging.vocabulary import Vocabulary, listed, own_vocabulary, token_ids


def embedding_rows(checkpoint: Checkpoint) -> int | None:
    """Return the number of rows of the input embedding, or None where no tensor is known as one."""
    return next((info.shape[0] for name, info in checkpoint.tensors.items() if role_of(name) == "input"), None)


def choose_vocabulary(policy: str, donor: Checkpoint, others: Sequence[Checkpoint]) -> Vocabulary:
    """Return the result's vocabulary: policy is "base" (the donor's), "union", or a model's folder or hub id.

    Union keeps the donor's rows and adds each token that another model has a row for, after the donor's last token
    (rows that pad the donor's matrix are used first). Raises UsageError where a tokenizer is missing, or names tokens
    that no model has a row for.
    """
    tokens, rows = token_ids(donor.folder), embedding_rows(donor)
    if policy == "base" or (tokens is None and policy == "union"):
        if policy == "union":
            raise UsageError(f"--tokenizer union needs a tokenizer in {donor.name}, which has none.")
        kept, rowless = _split(tokens, rows)
        return Vocabulary(donor.folder, donor.name, kept, rowless=rowless)
    if policy == "union":
        kept, rowless = _split(tokens, rows)
        assert kept is not None
        first = max(kept.values(), default=-1) + 1
        theirs = dict.fromkeys(token for other in others for token in _with_row(other))
        added = tuple(token for token in theirs if token not in kept)
        united = {**kept, **{token: first + i for i, token in enumerate(added)}}
        return Vocabulary(donor.folder, donor.name, united, least_rows=first + len(added), added=added, rowless=rowless)
    return _named(policy, donor, others)


def _named(policy: str, donor: Checkpoint, others: Sequence[Checkpoint]) -> Vocabulary:
    """The vocabulary of one of the models, or of another folder or hub id that has a tokenizer."""
    for model in (donor, *others):
        if policy in (model.name, model.ref.path):
            kept, rowless = _split(token_ids(model.folder), embedding_rows(model))
            if kept is None:
                raise UsageError(f"--tokenizer {policy}: that model has no tokenizer.")
            return Vocabulary(model.folder, model.name, kept, given_rows=embedding_rows(model), rowless=rowless)
    folder = locate(CheckpointRef.parse(policy))
    tokens = token_ids(folder)
    if tokens is None:
        raise UsageError(f"--tokenizer {policy}: there is no tokenizer in it.")
    known = {token for model in (donor, *others) for token in _with_row(model)}
    unknown = tuple(token for token in tokens if token not in known)
    if unknown:
        raise UsageError(f"--tokenizer {policy} lists {listed(unknown)} that none of the models has a row for.")
    return Vocabulary(folder, policy, tokens, given_rows=max(tokens.values()) + 1)


def _split(tokens: Mapping[str, int] | None, rows: int | None) -> tuple[dict[str, int] | None, tuple[str, ...]]:
    """The tokens that have a row, and those that have none."""
    if tokens is None or rows is None:
        return (None if tokens is None else dict(tokens)), ()
    return {t: i for t, i in tokens.items() if i < rows}, tuple(t for t, i in tokens.items() if i >= rows)


def _with_row(checkpoint: Checkpoint) -> list[str]:
    """The checkpoint's tokens that have a row, by id."""
    kept, _ = _split(token_ids(checkpoint.folder), embedding_rows(checkpoint))
    return sorted(kept, key=kept.__getitem__) if kept else []


def write_tokenizer(vocabulary: Vocabulary, sources: Sequence[Checkpoint], folder: Path) -> list[str]:
    """Write the tokenizer files: byte for byte those of `vocabulary.folder` unless tokens are added or taken out.

    Returns their names (empty where there are none). Raises CheckpointError where the tokenizer cannot be changed so.
    """
    for file in tokenizer_files(vocabulary.folder):
        shutil.copyfile(file, folder / file.name)
    if vocabulary.added or vocabulary.rowless:
        _change(vocabulary, sources, folder)
    return [file.name for file in tokenizer_files(folder)]


def _change(vocabulary: Vocabulary, sources: Sequence[Checkpoint], folder: Path) -> None:
    """Add and take out tokens in the files of `folder`, and check that every token has the planned id."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():  # only a slow tokenizer: transformers knows how to make a fast one of it
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(vocabulary.folder).save_pretrained(folder)
    data = read_json(file, f"The tokenizer in {vocabulary.folder} has no fast form, so that tokens cannot be changed.")
    gone = set(vocabulary.rowless)
    assert vocabulary.tokens is not None
    entries = [entry for entry in data.get("added_tokens", []) if entry["content"] not in gone]
    stored = {*own_vocabulary(data), *(entry["content"] for entry in entries)}
    entries += [_entry(token, i, sources) for token, i in vocabulary.tokens.items() if token not in stored]
    data["added_tokens"] = sorted(entries, key=lambda entry: entry["id"])
    _write(file, data)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            _write(folder / name, _without(read_json(folder / name, ""), gone, data["added_tokens"]))
    found = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    wrong = next((t for t in {*found, *vocabulary.tokens} if found.get(t) != vocabulary.tokens.get(t)), None)
    if wrong is not None:
        raise CheckpointError(
            f"The tokenizer of {vocabulary.name} cannot be changed so that token {wrong!r} has the id "
            f"{vocabulary.tokens.get(wrong, 'none')} (it gets {found.get(wrong, 'none')}); choose another --tokenizer."
        )


def _entry(token: str, number: int, sources: Sequence[Checkpoint]) -> dict[str, Any]:
    """What tokenizer.json says of an added token: as in the first model that has it."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    for source in sources:
        file = source.folder / "tokenizer.json"
        listing = read_json(file, "").get("added_tokens", []) if file.is_file() else []
        for entry in listing:
            if entry["content"] == token:
                return {**plain, **entry, "id": number}
    return {"id": number, "content": token, **plain}


def _without(settings: dict[str, Any], gone: set[str], entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Settings of a tokenizer without the tokens that are gone, and with the added ones where it lists them."""

    def names_gone(value: Any) -> bool:
        content = value.get("content") if isinstance(value, dict) else value
        return isinstance(content, str) and content in gone

    kept = {
        key: [entry for entry in value if not names_gone(entry)] if isinstance(value, list) else value
        for key, value in settings.items()
        if key not in gone and not names_gone(value)
    }
    if "added_tokens_decoder" in kept:
        kept["added_tokens_decoder"] = {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in entries
        }
    return kept


def _write(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
