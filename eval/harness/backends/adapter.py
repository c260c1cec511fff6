"""LoRA adapters beside their base: their tensors are compared with the base's shapes before a weight is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.errors import BadInputError, first_line
from eval.harness.references import ADAPTER_CONFIG

SHOWN = 3


def check_adapter(config: Any, folder: Path, label: str) -> None:
    """Build base and adapter without memory, and compare the adapter's tensors with what they expect.

    Args:
        config: transformers configuration of the base.
        folder: The adapter's folder.
        label: Name of base and adapter, for messages.

    Raises:
        BadInputError: The adapter is of another base: tensors without a place, missing ones, or other shapes.
    """
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM
    try:
        adapter = PeftConfig.from_pretrained(str(folder))
        with torch.device("meta"):
            expected = get_peft_model_state_dict(get_peft_model(kind.from_config(config), adapter))
    except Exception as error:  # peft raises ValueError, TypeError or KeyError by method
        raise BadInputError(f"The adapter of {label} does not fit its base: {first_line(error)}") from error
    shapes = _shapes(folder)
    expected_shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    problems = [f"{n} has no place in the base" for n in sorted(set(shapes) - set(expected_shapes))]
    problems += [f"{n} is missing" for n in sorted(set(expected_shapes) - set(shapes))]
    problems += [
        f"{n} has shape {shapes[n]}, the base needs {expected_shapes[n]}"
        for n in sorted(set(expected_shapes) & set(shapes))
        if shapes[n] != expected_shapes[n]
    ]
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
        trained = f"; it was trained on {base}" if base else ""
        raise BadInputError(
            f"The adapter of {label} does not fit its base: {'; '.join(problems[:SHOWN])}{more}{trained}."
        )


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's tensors, from the header of a safetensors file where there is one."""
    file = folder / "adapter_model.safetensors"
    try:
        if file.is_file():
            from safetensors import safe_open

            with safe_open(file, "pt") as tensors:
                return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        import torch

        loaded = torch.load(folder / "adapter_model.bin", map_location="meta", weights_only=True)
        return {name: tuple(tensor.shape) for name, tensor in loaded.items()}
    except Exception as error:  # safetensors and pickle have exceptions of their own
        raise BadInputError(f"The weights of the adapter {folder} cannot be read: {first_line(error)}") from error
