"""FP8 weights with one scale per tensor, per output channel, or per block (DeepSeek-V3, Qwen3, FBGEMM, ModelOpt)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from merging.checkpoints.quantized.converter import QuantizedTensor, StoredTensors, power_scale

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("float8_e4m3fn", "float8_e5m2")
SCALES = ("{0}_scale_inv", "{0}_scale", "{1}scale", "{1}weight_scale_inv", "{1}weight_scale")
"""Names of a weight's scale: {0} is the weight's name, {1} its module with a dot. All of them multiply."""
BLOCK = 128


class Fp8:
    """theta = weight * scale, the scale repeated over its block (DeepSeek-V3, arXiv:2412.19437, section 3.3)."""

    label = "FP8"

    def validate(self, stored: StoredTensors) -> list[QuantizedTensor]:
        """Return every FP8 tensor with its scale; without a scale the stored numbers are the weights."""
        weights = []
        for name, info in stored.tensors.items():
            if info.dtype not in DTYPES or name.endswith(("weight_scale", "_scale")):
                continue
            module = name.rpartition(".")[0]
            names = (pattern.format(name, f"{module}." if module else "") for pattern in SCALES)
            scale = next((s for s in names if s in stored.tensors and s != name), None)
            if scale is None:
                if stored.settings:
                    stored.part(f"{name}_scale_inv", name)
                weights.append(QuantizedTensor(name, info.shape, {"weight": name}))
                continue
            block = self._block(stored, name, scale)
            weights.append(QuantizedTensor(name, info.shape, {"weight": name, "scale": scale}, {"block": block}))
        return weights

    def process(self, tensor: QuantizedTensor, parts: Mapping[str, Tensor], rows: slice) -> Tensor:
        """Return rows of weight * scale in fp32."""
        import torch

        start, stop, _ = rows.indices(tensor.shape[0])
        weight = parts["weight"][start:stop].to(torch.float32)
        if "scale" not in parts:
            return weight
        scale = power_scale(parts["scale"])
        if scale.numel() == 1:
            return weight * scale.reshape(())
        block = tensor.settings["block"]
        if len(tensor.shape) == 3:  # experts stacked: rows are experts
            scale = scale[start:stop]
            lines = torch.arange(tensor.shape[1]) // block[0]
        else:
            lines = torch.arange(start, stop) // block[0]
        scale = scale.index_select(-2, lines).index_select(-1, torch.arange(tensor.shape[-1]) // block[1])
        return weight * scale

    @staticmethod
    def _block(stored: StoredTensors, name: str, scale: str) -> tuple[int, int]:
        """Return (rows, columns) that share a scale. Raises CheckpointError where the shapes do not fit."""
        shape, grid = stored.tensors[name].shape, stored.tensors[scale].shape
        if math.prod(grid) == 1:
            return 1, 1
        if len(grid) == 1 and len(shape) == 2:  # one scale per output channel
            grid = (grid[0], 1)
        if len(shape) not in (2, 3) or len(grid) != len(shape) or grid[:-2] != shape[:-2]:
            raise stored.refuse(scale, f"a scale for {name} {list(shape)}")
        block_size = stored.settings.get("weight_block_size") or (None, None)
        if not isinstance(block_size, list | tuple) or len(block_size) != 2:
            block_size = (None, None)
        block = []
        for size, scales, width in zip(shape[-2:], grid[-2:], block_size, strict=True):
            fitting = [n for n in (width, size // max(1, scales), BLOCK) if isinstance(n, int) and n > 0]
            block.append(next((n for n in fitting if math.ceil(size / n) == scales), 0))
        if 0 in block:
            raise stored.refuse(scale, f"blocks of {list(block_size)} over {name} {list(shape)}")
        return block[0], block[1]
