"""The result's tokenizer files: byte for byte those of their source, or with tokens added and taken out.

What comes out is loaded as its users will load it, and refused where a token has another id than planned.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import CheckpointError
from common.files.paths import read_json
from common.terminal_text import quoted
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.tokenizer_files import tokenizer_files
from merging.tokenizers.loading import CUTTING, Tokenizer
from merging.tokenizers.token_ids import read_tokenizer
from merging.tokenizers.vocabulary import Vocabulary

Entry = Mapping[str, Any]
"""What tokenizer files say of one added token: its string, and how it is cut from text."""


def write_tokenizer(vocabulary: Vocabulary, sources: Sequence[Checkpoint], folder: Path) -> None:
    """Write the tokenizer files: byte for byte those of `vocabulary.folder` unless tokens are added or taken out.

    sources: models that the added tokens come from. Raises CheckpointError for files that cannot be read.
    """
    for file in tokenizer_files(vocabulary.folder):
        shutil.copyfile(file, folder / file.name)
    if not (vocabulary.added or vocabulary.tokens_without_rows):
        return
    ids, own = vocabulary.tokens, read_tokenizer(vocabulary.folder)
    assert ids is not None
    assert own is not None
    new = {token: _entry(token, sources) for token in vocabulary.added}
    entries = {token: entry for token, entry in {**own.added, **new}.items() if token in ids}
    _change_fast(folder / "tokenizer.json", ids, entries, set(vocabulary.tokens_without_rows))
    _change_settings(folder, ids, entries, set(vocabulary.tokens_without_rows), own.named)


def check_tokenizer(folder: Path, vocabulary: Vocabulary, rows: int | None) -> None:
    """Load the tokenizer in the result's folder, beside its config, and compare it with the plan.

    rows: of the result's embedding. Raises CheckpointError where a token is lacking, too many, or has another id than
    planned, and where the tokenizer writes an id that has no row.
    """
    planned = vocabulary.tokens
    if planned is None:
        return
    try:
        found = read_tokenizer(folder) or Tokenizer({})
    except CheckpointError as error:
        raise CheckpointError(
            f"The tokenizer of {vocabulary.name} cannot be loaded by transformers in the result, beside its config "
            f"({' '.join(str(error.__cause__).split())[:200]}); choose another --tokenizer."
        ) from error
    tokens = found.tokens or {}
    trouble = _difference(planned, tokens)
    end = max((*tokens.values(), *found.written), default=-1) + 1
    if trouble is None and rows is not None and end > rows:
        trouble = f"it writes the id {end - 1}, and the result has {rows} rows"
    if trouble:
        raise CheckpointError(
            f"The tokenizer of {vocabulary.name} does not fit the result: {trouble}; choose another --tokenizer, or "
            "give more rows with --pad_to_multiple_of."
        )


def _difference(planned: Mapping[str, int], tokens: Mapping[str, int]) -> str | None:
    """The first difference between planned ids and those that a tokenizer gives, in words."""
    for token, i in tokens.items():
        if token not in planned:
            return f"it lists {quoted(token)} with the id {i}, which has no row, and that cannot be taken out of it"
    for token, i in planned.items():
        if tokens.get(token) != i:
            return f"{quoted(token)} should have the id {i} in it and gets {tokens.get(token, 'none')}"
    return None


def _entry(token: str, sources: Sequence[Checkpoint]) -> Entry:
    """How an added token is cut from text: as in the first model that cuts it before others."""
    for source in sources:
        found = read_tokenizer(source.folder)
        if found is not None and token in found.added:
            return found.added[token]
    return {"content": token, **dict.fromkeys(CUTTING, False)}


def _change_fast(file: Path, ids: Mapping[str, int], entries: Mapping[str, Entry], gone: set[str]) -> None:
    """Change the added tokens of a tokenizer.json, and what it pads with."""
    if not file.is_file():
        return
    data = read_json(file, "")
    data["added_tokens"] = sorted(
        ({"id": ids[token], **entry} for token, entry in entries.items()), key=lambda entry: entry["id"]
    )
    if (data.get("padding") or {}).get("pad_token") in gone:
        data["padding"] = None
    _write(file, data)


def _change_settings(
    folder: Path, ids: Mapping[str, int], entries: Mapping[str, Entry], gone: set[str], named: Mapping[str, str]
) -> None:
    """Change the settings beside the vocabulary. named: the special tokens by setting, also those of the class."""
    files = {name: folder / name for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")}
    held = {name: read_json(file, "") if file.is_file() else {} for name, file in files.items()}
    main, others, added = (_without(content, gone) for content in held.values())
    main |= {key: None for key, token in named.items() if token in gone}  # unsaid, the class may name it again
    if "added_tokens_decoder" in main:
        ordered = sorted(entries.items(), key=lambda entry: ids[entry[0]])
        main["added_tokens_decoder"] = {str(ids[token]): entry for token, entry in ordered}
    if added or not (folder / "tokenizer.json").is_file():
        added = {token: ids[token] for token in entries}
    for file, before, after in zip(files.values(), held.values(), (main, others, added), strict=True):
        if after != before:
            _write(file, after)


def _without(value: Any, gone: set[str]) -> Any:
    """Settings without everything that names one of the tokens that are gone."""

    def names_gone(value: Any) -> bool:
        content = value.get("content") if isinstance(value, dict) else value
        return isinstance(content, str) and content in gone

    if isinstance(value, dict):
        return {k: _without(v, gone) for k, v in value.items() if k not in gone and not names_gone(v)}
    if isinstance(value, list):
        return [_without(entry, gone) for entry in value if not names_gone(entry)]
    return value


def _write(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
