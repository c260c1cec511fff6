"""What is refused before anything is planned or written: the same model twice, a config that lies, a full disk."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from common.errors import CheckpointError, FailureError, UsageError
from merging.checkpoints.checkpoint import Checkpoint
from merging.plan.prediction import main_depths
from merging.tokenizers.choice import embedding_rows, embedding_width, extra_rows

WIDTHS = ("hidden_size", "n_embd", "n_embed", "d_model", "dim", "model_dim", "emb_dim", "embedding_size",
          "word_embed_proj_dim")  # fmt: skip
"""Keys of a config of which one is the number of columns of the input embedding."""


def check_distinct(base: Checkpoint | None, models: Sequence[Checkpoint]) -> None:
    """Refuse the base among the models, and one model listed twice. Raises UsageError."""
    seen: dict[str, str] = {}
    for model in models:
        key = model.exact_name
        if base is not None and key == base.exact_name:
            raise UsageError(f"The base model {base.name} is listed among the models to merge; take it out of them.")
        if key in seen:
            also = f" (also as {seen[key]})" if seen[key] != model.name else ""
            raise UsageError(f"{model.name} is listed twice among the models to merge{also}.")
        seen[key] = model.name


def check_config(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose config contradicts its weights. Raises CheckpointError."""
    config = checkpoint.text_config
    rows = embedding_rows(checkpoint)
    said = config.get("vocab_size")
    if rows is not None and isinstance(said, int) and said != rows - extra_rows(checkpoint):
        raise CheckpointError(
            f"{checkpoint.name}: config.json says vocab_size {said} and the input embedding has {rows} rows; "
            "correct config.json."
        )
    width = embedding_width(checkpoint)
    widths = {key: config[key] for key in WIDTHS if isinstance(config.get(key), int)}
    if width is not None and widths and width not in widths.values():
        (key, told), *_ = widths.items()
        raise CheckpointError(
            f"{checkpoint.name}: config.json says {key} {told} and the input embedding has {width} columns; correct "
            "config.json or download the weights again."
        )
    layers = next((config[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if key in config), None)
    stacks = {stack: depth for stack, depth in main_depths(checkpoint).items() if "vision" not in stack}
    if len(stacks) == 1 and isinstance(layers, int) and layers not in stacks.values():
        (stack, depth), *_ = stacks.items()
        raise CheckpointError(
            f"{checkpoint.name}: config.json says {layers} layers and the weights have {depth} ({stack}*); "
            "correct config.json or download the weights again."
        )


def check_space(folder: Path, size: int, written: int = 0) -> None:
    """Refuse before the first byte where the disk cannot hold the output.

    Args:
        folder: Where the output will be.
        size: Bytes of the output.
        written: Bytes that an interrupted run has written of it, which are taken up or given back.

    Raises:
        FailureError: With what is needed and what is free.
    """
    free, needed = free_space(folder), max(0, size - written)
    if free < needed:
        more = " more" if written else ""
        raise FailureError(
            f"No space for the output at {folder}: it needs {needed / 1e9:.2f} GB{more} and {free / 1e9:.2f} GB are "
            "free."
        )


def free_space(folder: Path) -> int:
    """Return the bytes that are free where `folder` is or will be."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free
