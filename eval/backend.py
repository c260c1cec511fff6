"""The model behind an evaluation: device, tokenizer, and batch size. Imports no lm-eval."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from console.errors import EvaluationError, UsageError
from eval.settings import Settings

CPU_BATCH_BYTES = 2 << 30
CPU_BATCH_LENGTH = 1024
MOST_ROWS = 64


def place(settings: Settings, model: Any) -> Settings:
    """Return the settings with backend, device and number of GPUs decided. Raises UsageError for a GPU not there."""
    import torch

    if not isinstance(model, str):
        if settings.backend == "vllm":
            raise UsageError("The vllm backend loads the model itself: give a folder or a hub id.")
        return replace(settings, backend="hf", device=str(next(model.parameters()).device), n_gpu=1)
    visible = torch.cuda.device_count()
    kind, _, index = settings.device.partition(":")
    if settings.n_gpu is not None and settings.n_gpu > visible:
        raise UsageError(f"--n_gpu {settings.n_gpu} is more than the {visible} GPUs visible here.")
    if kind == "cuda" and (not visible or int(index or 0) >= visible):
        raise UsageError(f"--device {settings.device} is not here: {visible} GPUs are visible.")
    gpu = kind != "cpu" and visible > 0 and settings.n_gpu != 0
    if kind == "cuda" and not gpu:
        raise UsageError(f"--device {settings.device} and --n_gpu 0 contradict each other.")
    backend = settings.backend
    if backend == "auto":
        backend = "vllm" if gpu and find_spec("vllm") and not index else "hf"
    if backend == "vllm" and (not gpu or not find_spec("vllm")):
        raise UsageError(
            "--backend vllm needs a GPU and the package vllm (`pip install vllm`); --backend hf needs neither."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("Start this script once, not by a launcher: it uses the GPUs that --n_gpu says.")
    count = 0 if not gpu else 1 if index else settings.n_gpu or visible
    return replace(
        settings, backend=backend, device=(settings.device if index else "cuda") if gpu else "cpu", n_gpu=count
    )


def load_tokenizer(model: str) -> Any:
    """Load the tokenizer of a folder or hub id. Raises EvaluationError where there is none to load."""
    from transformers import AutoTokenizer

    name, revision = split(model)
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except Exception as error:  # OSError, ValueError, or whatever a broken file raises in the Rust reader
        raise EvaluationError(f"The tokenizer of {model} could not be loaded: {first_line(error)}") from error


def load_config(model: str) -> Any:
    """Load the configuration of a folder or hub id. Raises EvaluationError where there is none to load."""
    from transformers import AutoConfig

    name, revision = split(model)
    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except Exception as error:  # as above
        raise EvaluationError(f"The configuration of {model} could not be loaded: {first_line(error)}") from error


def show_only(settings: Settings) -> None:
    """Hide the GPUs beyond --n_gpu from the libraries; works because CUDA has not been started yet."""
    import torch

    if settings.n_gpu and settings.n_gpu < torch.cuda.device_count() and settings.device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[: settings.n_gpu])


def rows_per_batch(settings: Settings, config: Mapping[str, Any]) -> int | str:
    """The batch size as asked; `auto` is left to lm-eval and vLLM on a GPU and decided here on a CPU."""
    if settings.batch_size != "auto":
        return int(settings.batch_size)
    return cpu_batch_size(config) if settings.device == "cpu" else "auto"


def cpu_batch_size(config: Mapping[str, Any]) -> int:
    """Rows per batch on a CPU, in place of lm-eval's probing: a power of two, at most 64, for which the logits (fp32)
    and the key-value cache (2 bytes) of 1024 tokens stay within 2 GiB. 64 for a tiny model, 8 for 49k words."""
    text = config.get("text_config") or config
    heads = text.get("num_attention_heads") or 1
    head_size = text.get("head_dim") or (text.get("hidden_size") or 0) // heads
    cache = 2 * 2 * (text.get("num_hidden_layers") or 0) * (text.get("num_key_value_heads") or heads) * head_size
    row = CPU_BATCH_LENGTH * (4 * (text.get("vocab_size") or 0) + cache)
    rows = max(1, min(MOST_ROWS, CPU_BATCH_BYTES // max(1, row)))
    return 1 << (rows.bit_length() - 1)


def split(model: str) -> tuple[str, str]:
    """Split `organisation/name@revision`; a folder has no revision."""
    if Path(model).is_dir():
        return model, "main"
    name, _, revision = model.partition("@")
    return name, revision or "main"


def first_line(error: Exception) -> str:
    """The error's kind and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no details'}"
