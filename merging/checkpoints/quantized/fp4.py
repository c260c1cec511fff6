"""FP4 weights (E2M1): gpt-oss' MXFP4 experts, NVFP4 of ModelOpt and compressed-tensors, packed MXFP4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from merging.checkpoints.quantized.converter import (
    QuantizedTensor,
    StoredTensors,
    per_column,
    power_scale,
    unpack_fp4,
)

if TYPE_CHECKING:
    from torch import Tensor


class Mxfp4Experts:
    """gpt-oss' stacked experts: blocks (experts, out, groups, 16), scales (experts, out, groups), both uint8.

    theta[e, i, o] = E2M1 value * 2 ** (scale - 127), stored transposed (experts, in, out) as the bf16 checkpoint has it
    (OCP Microscaling Formats, version 1.0).
    """

    label = "MXFP4"

    def validate(self, stored: StoredTensors) -> list[QuantizedTensor]:
        """Return each pair NAME_blocks, NAME_scales as NAME."""
        weights = []
        for name in stored.ending("_blocks"):
            blocks, scales = f"{name}_blocks", stored.part(f"{name}_scales", f"{name}_blocks")
            shape = stored.tensors[blocks].shape
            if stored.tensors[blocks].dtype != "uint8" or len(shape) != 4 or shape[3] != 16:
                raise stored.refuse(blocks, "(experts, out, groups, 16) of uint8")
            if stored.tensors[scales].dtype != "uint8" or stored.tensors[scales].shape != shape[:3]:
                raise stored.refuse(scales, f"{list(shape[:3])} of uint8")
            experts, out, groups, _ = shape
            weights.append(QuantizedTensor(name, (experts, groups * 32, out), {"weight": blocks, "scale": scales}))
        return weights

    def process(self, tensor: QuantizedTensor, parts: Mapping[str, Tensor], rows: slice) -> Tensor:
        """Return experts `rows`, (n, in, out) in fp32."""
        values = unpack_fp4(parts["weight"][rows])  # (n, out, groups, 32)
        values *= power_scale(parts["scale"][rows])[..., None]
        return values.flatten(-2).transpose(1, 2).contiguous()


class Fp4:
    """weight_packed or weight (out, in / 2) uint8 with a scale per 16 (NVFP4) or 32 (MXFP4) columns.

    NVFP4 scales are FP8, and themselves divided by weight_global_scale (compressed-tensors) or multiplied by
    weight_scale_2 (ModelOpt); MXFP4 scales are E8M0 exponents.
    """

    label = "FP4"

    def validate(self, stored: StoredTensors) -> list[QuantizedTensor]:
        """Return each module's weight whose packed numbers are bytes with a scale per group of columns."""
        weights = []
        for packed in ("weight_packed", "weight"):
            for module in stored.ending(f".{packed}"):
                key, scale = f"{module}.{packed}", f"{module}.weight_scale"
                info = stored.tensors[key]
                if (
                    info.dtype != "uint8"
                    or len(info.shape) != 2
                    or (packed == "weight" and scale not in stored.tensors)
                ):
                    continue
                stored.part(scale, key)
                out, columns = info.shape[0], 2 * info.shape[1]
                grid = stored.tensors[scale].shape
                if len(grid) != 2 or grid[0] != out or not grid[1] or columns % grid[1]:
                    raise stored.refuse(scale, f"({out}, groups)")
                floats = stored.tensors[scale].dtype.startswith("float8_e4")
                if columns // grid[1] != (16 if floats else 32):
                    raise stored.refuse(key, f"{16 if floats else 32} numbers of 4 bits for each of {grid[1]} scales")
                parts = {"weight": key, "scale": scale}
                for role, name in (("divisor", "weight_global_scale"), ("factor", "weight_scale_2")):
                    if f"{module}.{name}" in stored.tensors:
                        parts[role] = f"{module}.{name}"
                if floats and len(parts) == 2:
                    stored.part(f"{module}.weight_global_scale", key)
                settings = {"width": columns // grid[1]}
                weights.append(QuantizedTensor(f"{module}.weight", (out, columns), parts, settings))
        return weights

    def process(self, tensor: QuantizedTensor, parts: Mapping[str, Tensor], rows: slice) -> Tensor:
        """Return rows of values * group scale in fp32."""
        import torch

        values = unpack_fp4(parts["weight"][rows])
        scale = power_scale(parts["scale"][rows])
        if "divisor" in parts:
            scale = scale / parts["divisor"].to(torch.float32).reshape(())
        if "factor" in parts:
            scale = scale * parts["factor"].to(torch.float32).reshape(())
        return values * per_column(scale, tensor.shape[1], tensor.settings["width"])
