"""Writer of the result's tokenizer files: copies of their source, with tokens added and removed where needed.

The written tokenizer is loaded again, and refused where a token has another id than planned.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.errors import CheckpointError
from common.files.json_values import JsonValue
from common.files.paths import read_json
from common.terminal_text import quoted
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.model_folder import tokenizer_files
from merging.tokenizers.loading import CUTTING, Tokenizer
from merging.tokenizers.token_ids import read_tokenizer
from merging.tokenizers.vocabulary import Vocabulary

Entry = Mapping[str, JsonValue]
"""Attributes of one added token: its string and the flags of CUTTING."""


def write_tokenizer(vocabulary: Vocabulary, sources: Sequence[Checkpoint], folder: Path) -> None:
    """Write the tokenizer files: copies of those of `vocabulary.folder`, with tokens added and removed where needed.

    Args:
        vocabulary: The vocabulary of the result.
        sources: Models that the added tokens come from.
        folder: Folder that the files are written to.

    Raises:
        CheckpointError: A file cannot be read.
    """
    for file in tokenizer_files(vocabulary.folder):
        shutil.copyfile(file, folder / file.name)
    if not (vocabulary.added or vocabulary.tokens_without_rows):
        return
    ids, source_tokenizer = vocabulary.tokens, read_tokenizer(vocabulary.folder)
    assert ids is not None
    assert source_tokenizer is not None
    new = {token: _entry(token, sources) for token in vocabulary.added}
    entries = {token: entry for token, entry in {**source_tokenizer.added, **new}.items() if token in ids}
    _change_tokenizer_json(folder / "tokenizer.json", ids, entries, set(vocabulary.tokens_without_rows))
    _change_settings(folder, ids, entries, set(vocabulary.tokens_without_rows), source_tokenizer.special_tokens)


def check_tokenizer(folder: Path, vocabulary: Vocabulary, rows: int | None) -> None:
    """Load the tokenizer of the result's folder and compare it with the plan.

    Args:
        folder: Folder with the written tokenizer and config.
        vocabulary: The planned vocabulary.
        rows: Rows of the result's input embedding; None where unknown.

    Raises:
        CheckpointError: A token is missing, unexpected, or has another id than planned, or the tokenizer inserts an id
            without a row.
    """
    planned_ids = vocabulary.tokens
    if planned_ids is None:
        return
    try:
        tokenizer = read_tokenizer(folder) or Tokenizer({})
    except CheckpointError as error:
        raise CheckpointError(
            f"The tokenizer of {vocabulary.name} cannot be loaded by transformers in the result, beside its config "
            f"({' '.join(str(error.__cause__).split())[:200]}); choose another --tokenizer."
        ) from error
    tokens = tokenizer.tokens or {}
    problem = _difference(planned_ids, tokens)
    end = max((*tokens.values(), *tokenizer.inserted_ids), default=-1) + 1
    if problem is None and rows is not None and end > rows:
        problem = f"it writes the id {end - 1}, and the result has {rows} rows"
    if problem:
        raise CheckpointError(
            f"The tokenizer of {vocabulary.name} does not fit the result: {problem}; choose another --tokenizer, or "
            "give more rows with --pad_to_multiple_of."
        )


def _difference(planned_ids: Mapping[str, int], tokens: Mapping[str, int]) -> str | None:
    """Return a description of the first difference between planned and loaded ids; None where they are equal."""
    for token, i in tokens.items():
        if token not in planned_ids:
            return f"it lists {quoted(token)} with the id {i}, which has no row, and that cannot be taken out of it"
    for token, i in planned_ids.items():
        if tokens.get(token) != i:
            return f"{quoted(token)} should have the id {i} in it and gets {tokens.get(token, 'none')}"
    return None


def _entry(token: str, sources: Sequence[Checkpoint]) -> Entry:
    """Return the attributes of an added token, from the first model that has it as an added token."""
    for source in sources:
        tokenizer = read_tokenizer(source.folder)
        if tokenizer is not None and token in tokenizer.added:
            return tokenizer.added[token]
    return {"content": token, **dict.fromkeys(CUTTING, False)}


def _change_tokenizer_json(file: Path, ids: Mapping[str, int], entries: Mapping[str, Entry], removed: set[str]) -> None:
    """Change the added tokens of a tokenizer.json; padding with a removed token is removed."""
    if not file.is_file():
        return
    data = read_json(file, "")
    data["added_tokens"] = sorted(
        ({"id": ids[token], **entry} for token, entry in entries.items()), key=lambda entry: entry["id"]
    )
    if (data.get("padding") or {}).get("pad_token") in removed:
        data["padding"] = None
    _write(file, data)


def _change_settings(
    folder: Path,
    ids: Mapping[str, int],
    entries: Mapping[str, Entry],
    removed: set[str],
    special_tokens: Mapping[str, str],
) -> None:
    """Change the settings next to the vocabulary; special_tokens: {setting: token}, including those of the class."""
    files = {name: folder / name for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")}
    contents = {name: read_json(file, "") if file.is_file() else {} for name, file in files.items()}
    settings, token_map, added = (_without(content, removed) for content in contents.values())
    settings |= {
        key: None for key, token in special_tokens.items() if token in removed
    }  # an absent setting would take the default of the tokenizer's class
    if "added_tokens_decoder" in settings:
        ordered = sorted(entries.items(), key=lambda entry: ids[entry[0]])
        settings["added_tokens_decoder"] = {str(ids[token]): entry for token, entry in ordered}
    if added or not (folder / "tokenizer.json").is_file():
        added = {token: ids[token] for token in entries}
    for file, before, after in zip(files.values(), contents.values(), (settings, token_map, added), strict=True):
        if after != before:
            _write(file, after)


def _without(value: JsonValue, removed: set[str]) -> JsonValue:
    """Return settings without the entries that name a removed token."""

    def names_removed(value: object) -> bool:
        content = value.get("content") if isinstance(value, dict) else value
        return isinstance(content, str) and content in removed

    if isinstance(value, dict):
        return {k: _without(v, removed) for k, v in value.items() if k not in removed and not names_removed(v)}
    if isinstance(value, list):
        return [_without(entry, removed) for entry in value if not names_removed(entry)]
    return value


def _write(file: Path, data: Mapping[str, JsonValue]) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
