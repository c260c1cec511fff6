"""A model folder's tokenizer as transformers loads it, since that is what users of the folder get.

What the files say is not enough: ids that are stated with gaps are closed up, tokens are added that only a setting or
the tokenizer's class names, and files are ignored beside others.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import CheckpointError
from common.files.bounded_reading import MAX_TOKENIZER_VALUES, parse_json
from common.processes.child_process import run_python
from common.quiet_transformers import quiet_transformers, silent_descriptors
from common.terminal_text import foreign
from merging.checkpoints.tokenizer_files import vocabulary_files

CUTTING = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""What tokenizer files say of an added token besides its string."""
APART = "sys.modules['torch'] = None; from merging.tokenizers.loading import main; main(sys.argv[1:])"
SECONDS, MEMORY = 300.0, 4 << 30
"""Limits of the process that loads tokenizers: the largest take seconds and less than 2 GiB."""


@dataclass(frozen=True)
class Tokenizer:
    """What transformers makes of a model folder's tokenizer.

    tokens: {token string: id}, None where the tokenizer is made by code of its own, which is not run. written: the ids
    that it puts around every text. named: {setting: token} of the special tokens, also those that its class names.
    added: how each token that is cut from text before all others is cut, by its string.
    """

    tokens: Mapping[str, int] | None
    written: Sequence[int] = ()
    named: Mapping[str, str] = field(default_factory=dict)
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer in a model folder, None where there is none.

    Raises CheckpointError for a tokenizer that transformers cannot load.
    """
    whole = bool(vocabulary_files(folder, settings=False))
    try:
        from transformers import AutoTokenizer

        with quiet_transformers(), silent_descriptors():
            made: Any = AutoTokenizer.from_pretrained(folder.absolute(), trust_remote_code=False, local_files_only=True)
            ids = made.get_vocab()
    except Exception as error:  # the readers raise whatever a broken file makes them stumble over
        if "trust_remote_code" in str(error):
            return Tokenizer(None)
        if not whole:
            return None  # settings alone, of a tokenizer that needs more
        text = foreign(str(error), 200) or type(error).__name__
        raise CheckpointError(f"The tokenizer in {folder} cannot be loaded by transformers ({text}).") from error
    if not whole and getattr(made, "vocab_files_names", None):
        return None  # a class that made up a vocabulary for want of its files
    tokens = {str(token): int(ids[token]) for token in sorted(ids, key=lambda token: (ids[token], token))}
    named = {key: value for key, value in made.special_tokens_map.items() if isinstance(value, str)}
    added = {
        token.content: {"content": token.content, **{key: getattr(token, key) for key in CUTTING}}
        for token in made.added_tokens_decoder.values()
    }
    return Tokenizer(tokens, _written(made), named, added)


def _written(made: Any) -> tuple[int, ...]:
    """The ids that a tokenizer puts around a text, and around two."""
    found: set[int] = set()
    with suppress(Exception):  # some take more than text
        found.update(made("")["input_ids"])
        found.update(made("", "")["input_ids"])
    return tuple(sorted(found))


def load_tokenizers(folders: Sequence[Path], apart: bool = True) -> list[Tokenizer | None]:
    """Return the tokenizers of several folders, as `load_tokenizer` does.

    apart: where transformers is not imported yet, a process without torch loads them. With torch the import takes five
    times as long and holds several hundred MB; tokenizers have no use for it, but a check that loads the model has.
    """
    found = load_apart(folders) if apart and "transformers" not in sys.modules else {}
    return [found[folder] if folder in found else load_tokenizer(folder) for folder in folders]


def load_apart(folders: Sequence[Path]) -> dict[Path, Tokenizer | None]:
    """Return the tokenizers that a process of its own, without torch, could load; what it stumbles over is left out."""
    try:
        output = run_python(APART, [str(folder.absolute()) for folder in folders], SECONDS, MEMORY)
        answer = parse_json(output, "The list of tokenizers", MAX_TOKENIZER_VALUES * len(folders))
    except subprocess.TimeoutExpired as error:
        names = ", ".join(map(str, folders))
        raise CheckpointError(
            f"The tokenizers of {names} were not loaded within {SECONDS:.0f} seconds by transformers."
        ) from error
    except subprocess.CalledProcessError as error:
        if error.returncode < 0:  # out of memory in the tokenizers library, which ends the process
            names = ", ".join(map(str, folders))
            raise CheckpointError(
                f"The tokenizers of {names} cannot be loaded by transformers: the process that loads them was ended by "
                f"signal {-error.returncode} (its memory is limited to {MEMORY >> 30} GiB)."
            ) from error
        return {}
    except (OSError, ValueError):
        return {}
    told = {folder: entry for folder, entry in zip(folders, answer, strict=True) if entry != "failed"}
    return {folder: None if entry is None else Tokenizer(**entry) for folder, entry in told.items()}


def main(folders: Sequence[str]) -> None:
    """Print the tokenizers of several folders as JSON, for the process that asked."""
    answer: list[Any] = []
    for folder in folders:
        try:
            found = load_tokenizer(Path(folder))
            answer.append(None if found is None else vars(found))
        except CheckpointError:
            answer.append("failed")
    print(json.dumps(answer))
