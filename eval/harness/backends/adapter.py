"""LoRA adapters beside their base: their tensors are compared with the base's shapes before a weight is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import BadInputError, first_line
from common.files.bounded_reading import UnreadableError, check_regular, read_json
from common.files.json_types import Each, Fields, Maybe, OneOf, check_shape
from common.processes.bounded_regex import check_pattern
from common.processes.execution_limits import time_limit
from common.terminal_text import foreign, quoted
from eval.harness.references import ADAPTER_CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from common.files.json_values import JsonObject

SHOWN = 3
PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern")
"""Keys with regular expressions that peft matches with the names of modules; lists of the first two hold names."""
PATTERN_SECONDS = 1.0
"""Time of one pattern for all modules; real ones take milliseconds."""
SECONDS = 120.0
"""Time in which peft builds an adapter without memory."""
SHAPE = Fields(
    {"peft_type": str},
    {**dict.fromkeys(PATTERNS[:4], Maybe(OneOf((str, list)))), "rank_pattern": Maybe(Each(int)),
     "alpha_pattern": Maybe(Each(float)), "base_model_name_or_path": Maybe(str)},
)  # fmt: skip
"""Types of the keys of adapter_config.json that are used before peft reads it."""


def check_adapter(config: PreTrainedConfig, folder: Path, label: str, *, trusts_remote_code: bool = False) -> None:
    """Build base and adapter without memory, and compare the adapter's tensors with what they expect.

    Args:
        config: transformers configuration of the base.
        folder: The adapter's folder.
        label: Name of base and adapter, for messages.
        trusts_remote_code: True where the base's own code may run.

    Raises:
        BadInputError: The adapter is of another base: tensors without a place, missing ones, or other shapes.
    """
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    content = _read_config(folder)
    kind: Any = AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM
    try:
        with time_limit(SECONDS, f"peft takes more than {SECONDS:.0f} s"), torch.device("meta"):
            base = kind.from_config(config, trust_remote_code=trusts_remote_code)
            _check_patterns(content, [name for name, _ in base.named_modules()], str(folder / ADAPTER_CONFIG))
            adapter = PeftConfig.from_pretrained(str(folder))
            expected = get_peft_model_state_dict(get_peft_model(base, adapter))
    except UnreadableError as error:
        raise BadInputError(f"The adapter of {label} does not fit its base: {error}") from error
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
        trained_on = content.get("base_model_name_or_path")
        trained = f"; it was trained on {foreign(trained_on)}" if trained_on else ""
        raise BadInputError(
            f"The adapter of {label} does not fit its base: {'; '.join(problems[:SHOWN])}{more}{trained}."
        )


def _read_config(folder: Path) -> JsonObject:
    """Return adapter_config.json. Raises BadInputError where it is no adapter's."""
    file = folder / ADAPTER_CONFIG
    try:
        content = read_json(file)
        check_shape(content, SHAPE, str(file))
    except UnreadableError as error:
        raise BadInputError(str(error)) from error
    return dict(content)


def _check_patterns(content: JsonObject, names: list[str], source: str) -> None:
    """Match the regular expressions of an adapter once within a time limit. Raises UnreadableError naming the key."""
    for key in PATTERNS:
        value = content.get(key)
        is_names = isinstance(value, list) and key in PATTERNS[:2]
        patterns = [value] if isinstance(value, str) else [] if is_names else list(value or ())
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise UnreadableError(f"{source}: {key} should hold text, found {quoted(pattern)}.")
            check_pattern(pattern, f"{source}: {key}")
            slow = f"{source}: the pattern {quoted(pattern)} of {key} takes more than {PATTERN_SECONDS} s; simplify it."
            with time_limit(PATTERN_SECONDS, slow):  # of the module re, as peft uses it
                for name in names:
                    re.match(rf"(.*\.)?({pattern})$", name)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's tensors, from the header of a safetensors file where there is one."""
    file = folder / "adapter_model.safetensors"
    try:
        check_regular(file if file.exists() else folder / "adapter_model.bin")
        if file.is_file():
            from safetensors import safe_open

            with safe_open(file, "pt") as tensors:
                return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        import torch

        loaded = torch.load(folder / "adapter_model.bin", map_location="meta", weights_only=True)
        return {name: tuple(tensor.shape) for name, tensor in loaded.items()}
    except Exception as error:  # safetensors and pickle have exceptions of their own
        raise BadInputError(f"The weights of the adapter {folder} cannot be read: {first_line(error)}") from error
