"""Calibration text as blocks of token ids, sampled as the original does (AutoAWQ's recipe for the Pile)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from console.errors import CalibrationError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

PILE = "mit-han-lab/pile-val-backup"


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def encode(self, text: str) -> list[int]:
        """Return token ids, with the tokenizer's own special tokens."""


@dataclass(frozen=True)
class Calibration:
    """Which text, and how it is cut. Texts longer than a block are dropped; the first n_samples others are kept."""

    source: str = "pile"
    n_samples: int = 256
    block_size: int = 512
    seed: int = 42
    text_field: str = "text"

    def files(self) -> list[Path]:
        """Return the local files that the texts are read from."""
        return [] if self.source == "pile" else [Path(self.source)]

    def lasting(self) -> Calibration:
        """Return this with local paths as they are found from any folder."""
        return self if self.source == "pile" else replace(self, source=str(Path(self.source).resolve()))

    def check(self) -> None:
        """Raise UsageError for counts that are not positive, or a local file that is missing or of another kind."""
        if self.n_samples < 1 or self.block_size < 1:
            raise UsageError("--n_samples and --block_size must be at least 1.")
        if self.source != "pile":
            path = Path(self.source)
            if path.suffix not in (".jsonl", ".txt"):
                raise UsageError(f"--calibration must be pile or a .jsonl or .txt file, found {self.source}.")
            if not path.is_file():
                raise UsageError(f"--calibration {self.source} does not exist.")


@dataclass(frozen=True)
class Sample:
    """What the calibration set became: blocks (n_blocks, block_size) of ids and an account of the texts."""

    blocks: Tensor
    account: dict[str, Any]


def load_texts(calibration: Calibration) -> Iterable[str]:
    """Return the texts, shuffled by `datasets` with the seed. Raises CalibrationError where they cannot be had."""
    import datasets

    datasets.disable_progress_bars()
    if calibration.source == "pile":
        try:
            rows = datasets.load_dataset(PILE, split="validation")
        except Exception as error:
            raise CalibrationError(
                f"The calibration set {PILE} cannot be reached ({type(error).__name__}); pass a local file with "
                "--calibration FILE.jsonl or FILE.txt, or an importance file with --importance."
            ) from error
    elif calibration.source.endswith(".jsonl"):
        rows = _read_json_lines(calibration)
    else:
        text = _read_text(calibration.source)
        paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
        rows = datasets.Dataset.from_dict({calibration.text_field: paragraphs})
    if calibration.text_field not in rows.column_names:
        raise CalibrationError(
            f"{calibration.source} has no field {calibration.text_field!r}, it has {', '.join(rows.column_names)}."
        )
    return rows.shuffle(seed=calibration.seed)[calibration.text_field]


def _read_text(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{source} is not text in UTF-8 (byte {error.start}).") from error


def _read_json_lines(calibration: Calibration) -> Any:
    import datasets

    texts = []
    for number, line in enumerate(_read_text(calibration.source).splitlines(), 1):
        if not line.strip():
            continue
        try:
            texts.append(str(json.loads(line)[calibration.text_field]))
        except ValueError as error:
            raise CalibrationError(f"{calibration.source}, line {number} is not JSON ({error}).") from error
        except (KeyError, TypeError):
            raise CalibrationError(
                f"{calibration.source}, line {number} has no field {calibration.text_field!r}."
            ) from None
    return datasets.Dataset.from_dict({calibration.text_field: texts})


def cut(texts: Iterable[str], tokenizer: Tokenizer, calibration: Calibration) -> Sample:
    """Encode, drop long texts, keep the first n, join them, cut into blocks, drop the tail.

    Raises CalibrationError where not even one block comes together, saying how much text there is.
    """
    import torch

    kept: list[Sequence[int]] = []
    positions: list[int] = []
    read = too_long = 0
    for text in texts:
        if len(kept) == calibration.n_samples:
            break
        read += 1
        ids = tokenizer.encode(text.strip())
        if len(ids) > calibration.block_size:
            too_long += 1
        elif ids:
            kept.append(ids)
            positions.append(read - 1)
    tokens = [i for ids in kept for i in ids]
    n_blocks = len(tokens) // calibration.block_size
    if n_blocks == 0:
        raise CalibrationError(
            f"Too little calibration text: {len(kept)} texts of at most {calibration.block_size} tokens give "
            f"{len(tokens)} tokens, less than one block ({too_long} longer texts were dropped); "
            "give more text or a smaller --block_size."
        )
    blocks = torch.tensor(tokens[: n_blocks * calibration.block_size]).reshape(n_blocks, calibration.block_size)
    account = {
        **asdict(calibration),
        "source": PILE if calibration.source == "pile" else os.path.basename(calibration.source),
        "texts_read": read,
        "texts_too_long": too_long,
        "texts_kept": len(kept),
        "positions": positions,
        "digest": hashlib.sha256(blocks.numpy().tobytes()).hexdigest(),
        "blocks": n_blocks,
        "tokens": n_blocks * calibration.block_size,
        "tokens_dropped_at_the_end": len(tokens) - n_blocks * calibration.block_size,
    }
    return Sample(blocks, account)


def summary(account: dict[str, Any]) -> str:
    """Return one sentence that says what was used."""
    return (
        f"Calibration on {account['source']}: {account['texts_kept']} texts kept of {account['texts_read']} read "
        f"({account['texts_too_long']} longer than {account['block_size']} tokens), {account['blocks']} blocks, "
        f"{account['tokens']} tokens."
    )
