"""Text models merged into the language part of a vision-language model: their tensors under its names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import CheckpointError
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.storage import TensorInfo, Weights
from merging.checkpoints.tensor_names import PARTS, layer_of, role_of

if TYPE_CHECKING:
    from merging.checkpoints.storage import Rows


@dataclass(frozen=True)
class TextPart:
    """The tensors of a text model under the names of a larger model's language part.

    names: {name in the larger model: stored name}.
    """

    text: Weights
    names: Mapping[str, str]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype of every tensor by its name in the larger model."""
        return {name: self.text.tensors[stored] for name, stored in self.names.items()}

    @property
    def files(self) -> Sequence[Path]:
        """The text model's files."""
        return self.text.files

    def rows(self, name: str) -> Rows:
        """Return a tensor to be read in blocks. Raises CheckpointError where it cannot be read."""
        return self.text.rows(self.names[name])

    def close(self) -> None:
        """Release open files and memory."""
        self.text.close()


def is_text_part(checkpoint: Checkpoint) -> bool:
    """Return True for a text model whose tensors were renamed to the language part of another model."""
    return isinstance(checkpoint.weights, TextPart)


def with_text_parts(template: Checkpoint, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return the checkpoints, text models renamed to the language part of the template model where that has one.

    Raises:
        CheckpointError: The layers of a text model fit several parts of the template model, or none.
    """
    if not _has_text_part(template):
        return list(checkpoints)
    return [_renamed_to_part(template, other) if _is_foreign(template, other) else other for other in checkpoints]


def _has_text_part(checkpoint: Checkpoint) -> bool:
    nested = [key for key, value in checkpoint.config.items() if key.endswith("_config") and isinstance(value, Mapping)]
    if not set(nested) - {"quantization_config", "compression_config"}:
        return False  # without importing transformers
    return isinstance(checkpoint.parsed_config.values.get("text_config"), Mapping)


def _is_foreign(template: Checkpoint, other: Checkpoint) -> bool:
    """Return True for a text model whose layer names the template model does not have."""
    layers = [name for name in other.tensors if layer_of(name)]
    return not _has_text_part(other) and not any(name in template.tensors for name in layers)


def _renamed_to_part(template: Checkpoint, text: Checkpoint) -> Checkpoint:
    stack, rest = _first_layer(text)
    last = stack.rstrip(".").rpartition(".")[2]
    ending = f"{last}.0{rest}"
    prefixes = [
        name.removesuffix(ending) for name in template.tensors
        if name.endswith(f".{ending}") and not _is_tower(name)
    ]  # fmt: skip
    if len(prefixes) != 1:
        what = f"several parts of it ({', '.join(f'{p}*' for p in prefixes[:3])})" if prefixes else "no part of it"
        raise CheckpointError(
            f"{text.name} is a text model and {template.name} has a language part: the layers {stack}* fit {what}; "
            "load and save the text model under the names of that part with transformers first."
        )
    prefix = stack.removesuffix(f"{last}.")  # "model." in most text models
    names: dict[str, str] = {}
    for name in text.tensors:
        target = (
            f"{prefixes[0]}{name.removeprefix(prefix)}"
            if name.startswith(prefix)
            else _name_in_template(template, name)
        )
        names[target] = name
    return replace(text, weights=TextPart(text.weights, names))


def _first_layer(text: Checkpoint) -> tuple[str, str]:
    """Return the stack of layers of a text model, and the rest of a tensor name in its first layer."""
    for name in text.tensors:
        layer = layer_of(name)
        if layer and layer[1] == 0:
            return layer[0], layer[2]
    raise CheckpointError(f"{text.name} has no layers that match a language part.")


def _name_in_template(template: Checkpoint, name: str) -> str:
    """Return the template model's name for a tensor outside the layers, such as the output head."""
    role = role_of(name)
    heads = [other for other in template.tensors if role is not None and role_of(other) == role]
    fitting = [other for other in heads if other == name or other.endswith(f".{name}")]
    return fitting[0] if len(fitting) == 1 else name


def _is_tower(name: str) -> bool:
    return any(PARTS[word].search(name) for word in ("vision_tower", "audio_tower", "multi_modal_projector"))
