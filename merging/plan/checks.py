"""Checks before planning and writing: repeated models, configs that contradict the weights, disk space."""

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
"""Config keys for the number of columns of the input embedding."""


def check_distinct(base: Checkpoint | None, models: Sequence[Checkpoint]) -> None:
    """Raise UsageError where the base is among the models, or one model is listed twice."""
    names: dict[str, str] = {}
    for model in models:
        key = model.exact_name
        if base is not None and key == base.exact_name:
            raise UsageError(f"The base model {base.name} is listed among the models to merge; take it out of them.")
        if key in names:
            also = f" (also as {names[key]})" if names[key] != model.name else ""
            raise UsageError(f"{model.name} is listed twice among the models to merge{also}.")
        names[key] = model.name


def check_config(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where a checkpoint's config contradicts its weights."""
    config = checkpoint.text_config
    rows = embedding_rows(checkpoint)
    vocab_size = config.get("vocab_size")
    if rows is not None and isinstance(vocab_size, int) and vocab_size != rows - extra_rows(checkpoint):
        raise CheckpointError(
            f"{checkpoint.name}: config.json says vocab_size {vocab_size} and the input embedding has {rows} rows; "
            "correct config.json."
        )
    width = embedding_width(checkpoint)
    widths = {key: config[key] for key in WIDTHS if isinstance(config.get(key), int)}
    if width is not None and widths and width not in widths.values():
        (key, value), *_ = widths.items()
        raise CheckpointError(
            f"{checkpoint.name}: config.json says {key} {value} and the input embedding has {width} columns; correct "
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
    """Check that the disk has space for the output.

    Args:
        folder: Folder of the output.
        size: Bytes of the output.
        written: Bytes of it that an interrupted run has written; they are reused or removed.

    Raises:
        FailureError: The disk has too little space; names needed and free bytes.
    """
    free, required = free_space(folder), max(0, size - written)
    if free < required:
        more = " more" if written else ""
        raise FailureError(
            f"No space for the output at {folder}: it needs {required / 1e9:.2f} GB{more} and {free / 1e9:.2f} GB are "
            "free."
        )


def free_space(folder: Path) -> int:
    """Return the free bytes of the file system that holds `folder`, which need not exist yet."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free
