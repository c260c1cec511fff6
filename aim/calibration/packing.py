"""Calibration texts as blocks of token ids, by AutoAWQ's recipe: drop what is long, keep the first n, join, cut."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from common.errors import CalibrationError
from common.files.json_values import JsonObject, JsonValue
from common.processes.execution_limits import TEMPLATE_MEMORY, TEMPLATE_SECONDS, memory_limit, time_limit
from common.terminal_text import foreign

if TYPE_CHECKING:
    from torch import Tensor

    from aim.calibration.config import Calibration
    from aim.calibration.text_sources import Chat, Texts

COUNTS = ("read", "too_long", "empty", "kept")


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here; `apply_chat_template` only for chats."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return token ids, with the tokenizer's own special tokens unless they are declined."""

    @property
    def apply_chat_template(self) -> Callable[..., object]:
        """Function of a chat that returns its text, with `tokenize=False`."""


@dataclass(frozen=True)
class Sample:
    """Packed calibration set: blocks (n_blocks, block_size) of token ids, and counts of the texts."""

    blocks: Tensor
    account: JsonObject


def cut(texts: Iterable[Texts], tokenizer: Tokenizer, calibration: Calibration) -> Sample:
    """Encode each source's texts, drop long ones, keep as many as it should give, join them, cut, drop the tail.

    Blocks of several sources stand one source after the other, and none holds text of two. Raises CalibrationError
    where a source gives no block, or fewer texts than its weight asks for, saying how much text there is.
    """
    import torch

    tokens: list[int] = []
    accounts = []
    for source in texts:
        ids, account = _take(source, tokenizer, calibration.block_size)
        tokens += ids
        accounts.append(account)
    if calibration.weights is not None:
        _check_shares(accounts, calibration)
    blocks = torch.tensor(tokens).reshape(-1, calibration.block_size)
    account = {
        **calibration.recorded(),
        **{f"texts_{key}": sum(account[key] for account in accounts) for key in COUNTS},
        "sources": accounts,
        "digest": hashlib.sha256(blocks.numpy().tobytes()).hexdigest(),
        "blocks": len(blocks),
        "tokens": blocks.numel(),
        "tokens_dropped_at_the_end": sum(account["tokens_dropped_at_the_end"] for account in accounts),
    }
    return Sample(blocks, account)


def _take(texts: Texts, tokenizer: Tokenizer, block_size: int) -> tuple[list[int], JsonObject]:
    """Return the ids of a source's blocks, joined, and its account: counts, and which rows were kept.

    A blank text of the Pile is kept where a token comes of it (the first one of Llama's), as the original does.
    """
    source = texts.source
    tokens: list[int] = []
    positions: list[int] = []
    read = too_long = empty = 0
    for position, row in enumerate(texts.order):
        if len(positions) == source.count:
            break
        read += 1
        text = texts.sample(row)
        blank = not text or (isinstance(text, str) and not text.strip())
        ids = [] if text is None or (blank and source.spec != "pile") else _encoded(text, tokenizer, texts, row)
        if len(ids) > block_size:
            too_long += 1
        elif not ids:
            empty += 1
        else:
            tokens += ids
            positions.append(position)
    blocks, tail = divmod(len(tokens), block_size)
    account = {
        **texts.about,
        "asked": source.count,
        "read": read,
        "too_long": too_long,
        "empty": empty,
        "kept": len(positions),
        "positions": positions,
        "row_ids": [int(texts.order[position]) for position in positions],
        "blocks": blocks,
        "tokens": blocks * block_size,
        "tokens_dropped_at_the_end": tail,
    }
    if blocks == 0:
        raise CalibrationError(
            f"Too little calibration text: {source.name} has {_counts(account, block_size)}, which give {len(tokens)} "
            "tokens, less than one block; give more text or a smaller --block_size."
        )
    return tokens[: blocks * block_size], account


def _encoded(text: str | Chat, tokenizer: Tokenizer, texts: Texts, row: int) -> list[int]:
    """Token ids of a text, or of a chat in the base's template, which brings the special tokens itself."""
    if isinstance(text, str):
        _check_encodable(text, texts.where(row))
        return list(tokenizer.encode(text.strip()))
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"The base has no chat template, which the chats in {texts.source.name} need; give text, or a base that "
            "has one."
        )
    try:
        with (
            time_limit(TEMPLATE_SECONDS, f"it takes more than {TEMPLATE_SECONDS:.0f} s"),
            memory_limit(TEMPLATE_MEMORY),
        ):
            rendered = str(tokenizer.apply_chat_template(text, tokenize=False))
    except Exception as error:  # a template is a program: it refuses roles and orders in its own ways
        reason = foreign(str(error) or type(error).__name__, 200)
        raise CalibrationError(f"{texts.where(row)}: the base's chat template refuses this chat ({reason}).") from error
    _check_encodable(rendered, texts.where(row))
    return list(tokenizer.encode(rendered, add_special_tokens=False))


def _check_encodable(text: str, where: str) -> None:
    """Raise CalibrationError for half of a surrogate pair, which no tokenizer encodes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{where}: the text has half of a surrogate pair (U+{ord(text[error.start]):04X}), which no tokenizer "
            "encodes; correct it."
        ) from None


def _check_shares(accounts: Sequence[Mapping[str, JsonValue]], calibration: Calibration) -> None:
    """Refuse sources that give fewer texts than their weights ask for. Raises CalibrationError."""
    short = next((account for account in accounts if account["kept"] < account["asked"]), None)
    if short is not None:
        most = calibration.fitting([account["kept"] for account in accounts])
        advice = f"lower --n_samples to {most}" if most else "change --calibration_weights"
        raise CalibrationError(
            f"{short['source']} cannot give the {short['asked']} texts of its --calibration_weights: "
            f"{_counts(short, calibration.block_size)}; {advice}, or give more text."
        )


def _counts(account: Mapping[str, JsonValue], block_size: int) -> str:
    dropped = f"{account['too_long']} longer than {block_size} tokens"
    if account["empty"]:
        dropped += f", {account['empty']} empty"
    requested = f", {account['asked']} asked for" if account["kept"] < account["asked"] else ""
    return f"{account['kept']} texts kept of {account['read']} read ({dropped}{requested})"


def without_ids(account: Mapping[str, JsonValue]) -> JsonObject:
    """Return an account without the lists of samples, which the importance file keeps."""
    sources = [{k: v for k, v in s.items() if k not in ("positions", "row_ids")} for s in account.get("sources", [])]
    return {**account, "sources": sources}


def summary(account: Mapping[str, JsonValue]) -> str:
    """Return what was used, one line for each source where there are several."""
    lines = [
        f"{source['source']}: {_counts(source, account['block_size'])}, {source['blocks']} blocks, "
        f"{source['tokens']} tokens"
        + (f" ({source['files_left_out']} files of other kinds left out)" if source.get("files_left_out") else "")
        + "."
        for source in account.get("sources", [])
    ]
    if not lines:
        return "The importance file does not say what text it was measured on."
    if len(lines) == 1:
        return f"Calibration on {lines[0]}"
    total = f"Calibration on {len(lines)} sources: {account['blocks']} blocks, {account['tokens']} tokens."
    return "\n  ".join([total, *lines])
