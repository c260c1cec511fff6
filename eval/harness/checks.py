"""Checks of a model before its weights are loaded: files, tokenizer, chat template, maximum length."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UsageError
from common.files.bounded_reading import read_json
from eval.harness.identity import WEIGHTS
from eval.harness.references import ADAPTER_CONFIG, ModelReference
from eval.settings import PAPER_LENGTH

if TYPE_CHECKING:
    from common.files.json_values import JsonObject

HUB_ID = re.compile(r"[\w][\w.-]*(?:/[\w][\w.-]*)?(?:@[\w./-]+)?")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
UNSAID_LENGTH = 2048
"""lm-eval's own default for a model that does not say its length."""
LENGTH_KEYS = ("max_position_embeddings", "n_positions", "n_ctx")


def check_model(model: str, apply_chat_template: bool, max_model_len: int | None) -> None:
    """Raise UsageError, one sentence, for a model that cannot be evaluated; a hub id is checked when it is read."""
    reference = ModelReference.parse(model)
    if reference.adapter is not None:
        _check_adapter(reference.adapter)
        model = reference.base
    folder = Path(model)
    if not folder.is_dir():
        if folder.exists():
            raise UsageError(f"--model {model} is a file; give the folder that holds config.json.")
        if model.startswith((".", "/", "~")) or not HUB_ID.fullmatch(model):
            raise UsageError(f"--model {model} does not exist, and is no hub id (organization/name) either.")
        return
    if not (folder / "config.json").is_file() and (folder / ADAPTER_CONFIG).is_file():
        base = _json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "BASE"
        raise UsageError(f"--model {model} is an adapter; give it with its base as {base}+{model}.")
    if not (folder / "config.json").is_file():
        raise UsageError(f"--model {model} has no config.json; give the folder of one checkpoint.")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UsageError(
            f"--model {model} has no tokenizer ({', '.join(TOKENIZER_FILES[:3])}, ...); copy the base model's "
            "tokenizer files into it."
        )
    if not any(True for pattern in WEIGHTS for _ in folder.glob(pattern)):
        raise UsageError(f"--model {model} holds no weights (model.safetensors, or shards with an index).")
    if apply_chat_template and not _has_template(folder):
        raise UsageError(f"--model {model} has no chat template; leave out --apply_chat_template.")
    check_length(config_length(_json(folder / "config.json")), max_model_len, model)


def _check_adapter(name: str) -> None:
    if Path(name).is_dir():
        if not (Path(name) / ADAPTER_CONFIG).is_file():
            raise UsageError(f"{name} is not an adapter: it has no {ADAPTER_CONFIG}.")
    elif name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        raise UsageError(f"The adapter {name} does not exist, and is no hub id (organization/name) either.")


def check_length(model_length: int | None, max_length: int | None, model: str) -> None:
    """Raise UsageError where more tokens are asked for than the model has positions."""
    if model_length is not None and max_length is not None and max_length > model_length:
        raise UsageError(f"--max_model_len {max_length} is more than the {model_length} positions of {model}.")


def config_length(config: JsonObject) -> int | None:
    """Return the longest sequence that a model's configuration allows; None where it has no such key."""
    text = config.get("text_config") or config
    lengths = [text[key] for key in LENGTH_KEYS if isinstance(text.get(key), int)]
    return lengths[0] if lengths else None


def usable_length(model_length: int | None, max_length: int | None, preset: str = "paper") -> int:
    """The sequence length to evaluate with: as asked, else the model's own, at most 4096 in the paper's preset."""
    if max_length:
        return max_length
    return min(PAPER_LENGTH, model_length or PAPER_LENGTH) if preset == "paper" else model_length or UNSAID_LENGTH


def _has_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    config = folder / "tokenizer_config.json"
    return (folder / "chat_templates").is_dir() or (config.is_file() and bool(_json(config).get("chat_template")))


def _json(path: Path) -> JsonObject:
    try:
        data = read_json(path)
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} is not readable JSON ({error}).") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} is not a JSON object.")
    return data
