"""Protocol of a quantization format, and functions that several formats share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from common.errors import CheckpointError
from common.files.json_values import JsonValue
from merging.checkpoints.storage import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the 4-bit float E2M1 by code (OCP Microscaling Formats, version 1.0, section 5.3.3)."""


@dataclass(frozen=True)
class QuantizedTensor:
    """One weight that a format stores in several tensors.

    Attributes:
        name, shape: Of the dequantized weight.
        parts: {role: name of the stored tensor}; the packed numbers have the role "weight".
        settings: Bits, group size, block size and other parameters of the format.
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    settings: Mapping[str, JsonValue] = field(default_factory=dict)


class Converter(Protocol):
    """A quantization format: finds its weights among the stored tensors, and dequantizes rows of one of them."""

    label: str
    """Name of the format in messages and the model card."""

    def validate(self, stored: StoredTensors) -> list[QuantizedTensor]:
        """Return the weights of this format; reads headers only, unless the format keeps shapes in tensors.

        Raises:
            CheckpointError: Parts are missing, or their shapes contradict each other.
        """

    def process(self, tensor: QuantizedTensor, parts: Mapping[str, Tensor], rows: slice) -> Tensor:
        """Return rows of the dequantized weight.

        Args:
            tensor: The weight.
            parts: Stored tensors by role.
            rows: Rows start:stop of the weight.

        Returns:
            (stop - start, ...) in fp32.
        """


@dataclass(frozen=True)
class StoredTensors:
    """Stored tensors of a checkpoint, the input of converters.

    Attributes:
        label: Name of the checkpoint in messages.
        tensors: Header entries by name.
        settings: quantization_config of config.json; empty where there is none.
        read: Function that returns a stored tensor by name.
    """

    label: str
    tensors: Mapping[str, TensorInfo]
    settings: Mapping[str, JsonValue]
    read: Callable[[str], Tensor]

    def ending(self, suffix: str) -> list[str]:
        """Return the names that end with `suffix`, without it, in the checkpoint's order."""
        return [name.removesuffix(suffix) for name in self.tensors if name.endswith(suffix)]

    def part(self, name: str, weight: str) -> str:
        """Return `name`, a tensor that `weight` needs. Raises CheckpointError where it is missing."""
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.label}: tensor {weight} is quantized and {name} is missing; download the checkpoint again."
            )
        return name

    def refuse(self, name: str, expected: str) -> CheckpointError:
        """Return the error for a stored tensor whose shape or dtype does not belong to its format."""
        info = self.tensors[name]
        return CheckpointError(
            f"{self.label}: tensor {name} has shape {list(info.shape)} and dtype {info.dtype}, expected {expected}; "
            "this quantization format is not supported; give the unquantized checkpoint."
        )

    def bits(self, default: int = 4) -> int:
        """Return the bits per weight of the quantization_config. Raises CheckpointError outside 1 to 8."""
        bits = self.settings.get("bits", self.settings.get("w_bit", default))
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
            raise CheckpointError(
                f"{self.label}: quantization_config states {bits!r} bits; expected a number from 1 to 8."
            )
        return bits


def unpack_bits(packed: Tensor, bits: int, dim: int, count: int) -> Tensor:
    """Unpack unsigned integers along an axis of an int32 tensor.

    Args:
        packed: (..., words, ...) int32, a little-endian bit stream along `dim`; numbers may cross words (3, 5, 6, 7
            bits).
        bits: Bits per number.
        dim: Axis of the words.
        count: Numbers to unpack.

    Returns:
        (..., count, ...) int32.
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
    """Return numbers start:stop along `dim` as `unpack_bits` does, reading only their words."""
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
