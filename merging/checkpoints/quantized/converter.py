"""The contract of a quantization format, and helpers that several formats share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from common.errors import CheckpointError
from merging.checkpoints.storage import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the 4-bit float E2M1 by code (OCP Microscaling Formats, version 1.0, section 5.3.3)."""


@dataclass(frozen=True)
class QuantizedTensor:
    """One weight that a format stores in several tensors.

    name, shape: of the dequantized weight; parts: {role: name of the stored tensor}, the packed numbers under
    "weight"; settings: what the format needs besides (bits, group size, block size).
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)


class Converter(Protocol):
    """A quantization format: finds its weights among the stored tensors, and dequantizes rows of one of them."""

    label: str
    """The format as messages and the model card call it."""

    def validate(self, stored: StoredTensors) -> list[QuantizedTensor]:
        """Return the weights of this format; reads headers only, unless the format keeps shapes in tensors.

        Raises CheckpointError where parts are missing or their shapes contradict each other.
        """

    def process(self, tensor: QuantizedTensor, parts: Mapping[str, Tensor], rows: slice) -> Tensor:
        """Return rows `rows` of the dequantized weight in fp32; `parts` are the stored tensors by role."""


@dataclass(frozen=True)
class StoredTensors:
    """The stored tensors of a checkpoint, as converters see them.

    label: the checkpoint's name in messages; tensors: headers by name; settings: config.json's quantization_config
    (an empty mapping where there is none); read: returns a stored tensor by name.
    """

    label: str
    tensors: Mapping[str, TensorInfo]
    settings: Mapping[str, Any]
    read: Callable[[str], Tensor]

    def ending(self, suffix: str) -> list[str]:
        """Return the beginnings of the names that end with `suffix`, in the checkpoint's order."""
        return [name.removesuffix(suffix) for name in self.tensors if name.endswith(suffix)]

    def part(self, name: str, beside: str) -> str:
        """Return `name`, a tensor that `beside` cannot be read without. Raises CheckpointError where it is missing."""
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.label}: tensor {beside} is quantized and {name} is missing; download the checkpoint again."
            )
        return name

    def refuse(self, name: str, expected: str) -> CheckpointError:
        """Return the error for a stored tensor of another shape or dtype than its format has."""
        info = self.tensors[name]
        return CheckpointError(
            f"{self.label}: tensor {name} has shape {list(info.shape)} and dtype {info.dtype}, expected {expected}; "
            "the quantization format is not one that is read here, so give the unquantized checkpoint."
        )

    def bits(self, default: int = 4) -> int:
        """Return the bits per weight that the quantization_config states. Raises CheckpointError for an odd value."""
        bits = self.settings.get("bits", self.settings.get("w_bit", default))
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
            raise CheckpointError(
                f"{self.label}: quantization_config states {bits!r} bits; expected a number from 1 to 8."
            )
        return bits


def unpack_bits(packed: Tensor, bits: int, dim: int, count: int) -> Tensor:
    """Return `count` unsigned numbers of `bits` bits along `dim` of an int32 tensor, the lowest bits first.

    packed: (..., words, ...) int32, a little-endian bit stream along `dim`; numbers may cross words (3, 5, 6, 7 bits).
    Returns an int32 tensor with `count` in the place of `words`.
    """
    import torch

    words = packed.movedim(dim, -1).to(torch.int64) & 0xFFFFFFFF
    first = torch.arange(count) * bits
    index, offset = first // 32, first % 32
    values = words.index_select(-1, index) >> offset
    crossing = offset + bits > 32
    if bool(crossing.any()):
        following = words.index_select(-1, (index + 1).clamp(max=words.shape[-1] - 1))
        values = torch.where(crossing, values | (following << (32 - offset)), values)
    return (values & ((1 << bits) - 1)).to(torch.int32).movedim(-1, dim)


def unpack_slice(packed: Tensor, bits: int, dim: int, start: int, stop: int) -> Tensor:
    """Return numbers start:stop along `dim` as `unpack_bits` does, from the words that hold them alone."""
    first = start // 32 * 32  # 32 numbers fill whole words at any width
    words = packed.narrow(dim, first * bits // 32, math.ceil(stop * bits / 32) - first * bits // 32)
    return unpack_bits(words, bits, dim, stop - first).narrow(dim, start - first, stop - start)


def unpack_fp4(packed: Tensor) -> Tensor:
    """Return E2M1 values in fp32, twice as many along the last axis: the low four bits of each byte first."""
    import torch

    values = torch.tensor(FP4_VALUES)
    return torch.stack([values[(packed & 0xF).long()], values[(packed >> 4).long()]], dim=-1).flatten(-2)


def power_scale(scale: Tensor) -> Tensor:
    """Return scales in fp32; bytes are E8M0 exponents, 2 ** (byte - 127)."""
    import torch

    if scale.dtype == torch.uint8:
        return torch.exp2(scale.to(torch.float32) - 127)
    return scale.to(torch.float32)


def per_column(scale: Tensor, columns: int, width: int) -> Tensor:
    """Repeat group scales (rows, groups) along columns: (rows, columns), column j of group j // width."""
    import torch

    return scale.index_select(-1, torch.arange(columns) // width)
