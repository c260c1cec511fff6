"""Tokenizers of model folders, loaded by transformers as users of the folder load them.

Reading the files is not enough: transformers closes gaps in ids, adds tokens that only a setting or the tokenizer's
class names, and ignores files when others are present.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import CheckpointError
from common.files.bounded_reading import MAX_TOKENIZER_VALUES, parse_json
from common.files.json_values import JsonValue
from common.processes.child_process import run_python
from common.quiet_transformers import quiet_transformers, silent_descriptors
from common.terminal_text import foreign
from merging.checkpoints.model_folder import vocabulary_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CUTTING = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""Attributes of an added token besides its string."""
SUBPROCESS_CODE = "sys.modules['torch'] = None; from merging.tokenizers.loading import main; main(sys.argv[1:])"
SECONDS, MEMORY = 300.0, 4 << 30
"""Limits of the process that loads tokenizers: the largest take seconds and less than 2 GiB."""


@dataclass(frozen=True)
class Tokenizer:
    """Facts about a tokenizer loaded by transformers.

    Attributes:
        tokens: {token string: id}; None where the tokenizer is defined by custom code, which is not run.
        inserted_ids: Ids that it inserts around every text.
        special_tokens: {setting: token}, including those that the tokenizer's class defines.
        added: {token string: attributes} of the added tokens.
    """

    tokens: Mapping[str, int] | None
    inserted_ids: Sequence[int] = ()
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    added: Mapping[str, Mapping[str, JsonValue]] = field(default_factory=dict)


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer of a model folder; None where there is none.

    Raises:
        CheckpointError: transformers cannot load the tokenizer.
    """
    has_vocabulary = bool(vocabulary_files(folder, settings=False))
    try:
        from transformers import AutoTokenizer

        with quiet_transformers(), silent_descriptors():
            loaded: Any = AutoTokenizer.from_pretrained(
                folder.absolute(), trust_remote_code=False, local_files_only=True
            )
            ids = loaded.get_vocab()
    except Exception as error:  # the readers raise errors of many types for broken files
        if "trust_remote_code" in str(error):
            return Tokenizer(None)
        if not has_vocabulary:
            return None  # settings without a vocabulary
        text = foreign(str(error), 200) or type(error).__name__
        raise CheckpointError(f"The tokenizer in {folder} cannot be loaded by transformers ({text}).") from error
    if not has_vocabulary and getattr(loaded, "vocab_files_names", None):
        return None  # the class invents a vocabulary where its files are missing
    tokens = {str(token): int(ids[token]) for token in sorted(ids, key=lambda token: (ids[token], token))}
    special_tokens = {key: value for key, value in loaded.special_tokens_map.items() if isinstance(value, str)}
    added = {
        token.content: {"content": token.content, **{key: getattr(token, key) for key in CUTTING}}
        for token in loaded.added_tokens_decoder.values()
    }
    return Tokenizer(tokens, _inserted_ids(loaded), special_tokens, added)


def _inserted_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that a tokenizer inserts around one text, and around two."""
    ids: set[int] = set()
    with suppress(Exception):  # some tokenizers need other inputs than text
        ids.update(tokenizer("")["input_ids"])
        ids.update(tokenizer("", "")["input_ids"])
    return tuple(sorted(ids))


def load_tokenizers(folders: Sequence[Path], in_subprocess: bool = True) -> list[Tokenizer | None]:
    """Return the tokenizers of several folders, as `load_tokenizer` does.

    Args:
        folders: Model folders.
        in_subprocess: Load them in a process without torch where transformers is not imported yet; importing
            transformers with torch takes five times as long and several hundred MB.
    """
    loaded = load_in_subprocess(folders) if in_subprocess and "transformers" not in sys.modules else {}
    return [loaded[folder] if folder in loaded else load_tokenizer(folder) for folder in folders]


def load_in_subprocess(folders: Sequence[Path]) -> dict[Path, Tokenizer | None]:
    """Return {folder: tokenizer} loaded by a child process without torch; folders where that fails are omitted."""
    try:
        output = run_python(SUBPROCESS_CODE, [str(folder.absolute()) for folder in folders], SECONDS, MEMORY)
        answer = parse_json(output, "The list of tokenizers", MAX_TOKENIZER_VALUES * len(folders))
    except subprocess.TimeoutExpired as error:
        names = ", ".join(map(str, folders))
        raise CheckpointError(
            f"The tokenizers of {names} were not loaded within {SECONDS:.0f} seconds by transformers."
        ) from error
    except subprocess.CalledProcessError as error:
        if error.returncode < 0:  # the tokenizers library aborts when memory runs out
            names = ", ".join(map(str, folders))
            raise CheckpointError(
                f"The tokenizers of {names} cannot be loaded by transformers: the process that loads them was ended by "
                f"signal {-error.returncode} (its memory is limited to {MEMORY >> 30} GiB)."
            ) from error
        return {}
    except (OSError, ValueError):
        return {}
    answers = {folder: entry for folder, entry in zip(folders, answer, strict=True) if entry != "failed"}
    return {folder: None if entry is None else Tokenizer(**entry) for folder, entry in answers.items()}


def main(folders: Sequence[str]) -> None:
    """Print the tokenizers of several folders as JSON, for the parent process."""
    answer: list[Any] = []
    for folder in folders:
        try:
            tokenizer = load_tokenizer(Path(folder))
            answer.append(None if tokenizer is None else vars(tokenizer))
        except CheckpointError:
            answer.append("failed")
    print(json.dumps(answer))
