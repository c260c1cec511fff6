"""Integer weights with a scale and a zero point per group of inputs: GPTQ, AWQ and compressed-tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from common.errors import HeadersUnknownError
from merging.checkpoints.quantized.converter import (
    QuantizedTensor,
    StoredTensors,
    per_column,
    unpack_bits,
    unpack_slice,
)

if TYPE_CHECKING:
    from torch import Tensor

AWQ_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Position of output channel 0, 1, ... among the eight numbers of a word (Lin et al. 2023, arXiv:2306.00978)."""


def _quantized_modules(stored: StoredTensors) -> Iterator[tuple[str, str, str, str]]:
    """Yield (module, qweight, scales, qzeros) of GPTQ's and AWQ's modules. Raises CheckpointError for missing parts."""
    for module in stored.ending(".qweight"):
        packed = f"{module}.qweight"
        yield module, packed, stored.part(f"{module}.scales", packed), stored.part(f"{module}.qzeros", packed)


class Gptq:
    """theta[o, i] = scales[g_idx[i], o] * (code[i, o] - zero[g_idx[i], o]) (Frantar et al. 2022, arXiv:2210.17323).

    qweight (in * bits / 32, out) is packed along the inputs, qzeros (groups, out * bits / 32) along the outputs. The
    first format of checkpoints stores zero - 1; checkpoint_format gptq_v2 stores the zero itself.
    """

    label = "GPTQ"

    def validate(self, stored: StoredTensors) -> list[QuantizedTensor]:
        """Return each module's weight whose scales are as wide as its qweight."""
        weights = []
        for module, packed, scales, zeros in _quantized_modules(stored):
            shape, grid = stored.tensors[packed].shape, stored.tensors[scales].shape
            if len(shape) != 2 or len(grid) != 2 or shape[1] != grid[1]:
                continue  # AWQ packs along the outputs
            bits = stored.bits()
            inputs = shape[0] * 32 // bits
            if stored.tensors[packed].dtype != "int32" or shape[0] * 32 % bits:
                raise stored.refuse(packed, f"{bits}-bit numbers in int32")
            if stored.tensors[zeros].shape != (grid[0], math.ceil(grid[1] * bits / 32)):
                raise stored.refuse(zeros, f"{[grid[0], math.ceil(grid[1] * bits / 32)]} of int32")
            if stored.settings.get("desc_act") and f"{module}.g_idx" not in stored.tensors:
                stored.part(f"{module}.g_idx", packed)
            parts = {"weight": packed, "scale": scales, "zero": zeros}
            if f"{module}.g_idx" in stored.tensors:
                parts["group"] = f"{module}.g_idx"
                if stored.tensors[parts["group"]].shape != (inputs,):
                    raise stored.refuse(parts["group"], f"[{inputs}]")
            elif inputs % grid[0]:
                raise stored.refuse(scales, f"groups that divide {inputs} inputs")
            offset = 0 if stored.settings.get("checkpoint_format") == "gptq_v2" else 1
            settings = {"bits": bits, "offset": offset}
            weights.append(QuantizedTensor(f"{module}.weight", (grid[1], inputs), parts, settings))
        return weights

    def process(self, tensor: QuantizedTensor, parts: Mapping[str, Tensor], rows: slice) -> Tensor:
        """Return output channels `rows`, (n, in) in fp32."""
        import torch

        bits, (outputs, inputs) = tensor.settings["bits"], tensor.shape
        start, stop, _ = rows.indices(outputs)
        codes = unpack_bits(parts["weight"][:, rows], bits, 0, inputs)
        zeros = unpack_slice(parts["zero"], bits, 1, start, stop) + tensor.settings["offset"]
        zeros &= (1 << bits) - 1
        scales = parts["scale"][:, rows].to(torch.float32)
        group = parts["group"].long() if "group" in parts else torch.arange(inputs) // (inputs // len(scales))
        result: Tensor = (scales[group] * (codes - zeros[group])).T.contiguous()
        return result


class Awq:
    """theta[o, i] = scales[g, o] * (code[i, o] - zero[g, o]), group g of inputs (Lin et al. 2023, arXiv:2306.00978).

    qweight (in, out / 8) and qzeros (groups, out / 8) hold eight outputs a word, interleaved.
    """

    label = "AWQ"

    def validate(self, stored: StoredTensors) -> list[QuantizedTensor]:
        """Return each module's weight whose scales are eight times as wide as its qweight."""
        weights = []
        for module, packed, scales, zeros in _quantized_modules(stored):
            shape, grid = stored.tensors[packed].shape, stored.tensors[scales].shape
            if len(shape) == 2 and len(grid) == 2 and shape[1] == grid[1]:
                continue  # GPTQ
            if stored.tensors[packed].dtype != "int32" or len(shape) != 2 or len(grid) != 2 or stored.bits() != 4:
                raise stored.refuse(packed, "4-bit numbers in a matrix of int32 (AWQ, version gemm)")
            if shape[1] * 8 != grid[1] or not grid[0] or shape[0] % grid[0]:
                raise stored.refuse(scales, f"(groups, {shape[1] * 8}) with groups that divide {shape[0]} inputs")
            if stored.tensors[zeros].shape != (grid[0], shape[1]):
                raise stored.refuse(zeros, f"{[grid[0], shape[1]]} of int32")
            parts = {"weight": packed, "scale": scales, "zero": zeros}
            weights.append(QuantizedTensor(f"{module}.weight", (grid[1], shape[0]), parts))
        return weights

    def process(self, tensor: QuantizedTensor, parts: Mapping[str, Tensor], rows: slice) -> Tensor:
        """Return output channels `rows`, (n, in) in fp32."""
        import torch

        start, stop, _ = rows.indices(tensor.shape[0])
        words = slice(start // 8, math.ceil(stop / 8))
        within = slice(start - 8 * words.start, stop - 8 * words.start)

        def channels(packed: Tensor) -> Tensor:
            part = packed[:, words]
            codes = unpack_bits(part, 4, 1, 8 * part.shape[1]).unflatten(1, (-1, 8))
            result: Tensor = codes[..., list(AWQ_COLUMNS)].flatten(1)[:, within]
            return result

        codes, zeros = channels(parts["weight"]), channels(parts["zero"])
        scales = parts["scale"][:, rows].to(torch.float32)
        group = torch.arange(tensor.shape[1]) // (tensor.shape[1] // len(scales))
        return (scales[group] * (codes - zeros[group])).T.contiguous()


class CompressedInt:
    """compressed-tensors' integers: theta = (code - zero) * scale per tensor, output channel or group of columns.

    pack-quantized keeps codes + 2 ** (bits - 1) in weight_packed (out, in * bits / 32) and zero points packed along the
    outputs; int-quantized keeps int8 in weight.
    """

    label = "compressed-tensors"

    def validate(self, stored: StoredTensors) -> list[QuantizedTensor]:
        """Return each module's weight that is packed in int32, or int8 beside a weight_scale."""
        weights = []
        for module in stored.ending(".weight_packed"):
            if stored.tensors[f"{module}.weight_packed"].dtype == "int32":
                weights.append(self._packed(stored, module))
        for module in stored.ending(".weight_scale"):
            name = f"{module}.weight"
            if name in stored.tensors and stored.tensors[name].dtype == "int8":
                shape = stored.tensors[name].shape
                weights.append(self._tensor(stored, module, name, shape, {"bits": 8, "packed": False}))
        return weights

    def process(self, tensor: QuantizedTensor, parts: Mapping[str, Tensor], rows: slice) -> Tensor:
        """Return rows in fp32."""
        import torch

        start, stop, _ = rows.indices(tensor.shape[0])
        bits, columns = tensor.settings["bits"], tensor.shape[1]
        half = 1 << (bits - 1)
        codes = parts["weight"][start:stop]
        if tensor.settings["packed"]:
            codes = unpack_bits(codes, bits, 1, columns) - half
        scale = parts["scale"].to(torch.float32)
        zero = None
        if "zero" in parts:
            zero = parts["zero"]
            if tensor.settings["packed"] and zero.dtype == torch.int32:
                zero = unpack_bits(zero, bits, 0, tensor.shape[0]) - half
        groups = parts["group"].long() if "group" in parts else None

        def spread(values: Tensor) -> Tensor:
            if values.numel() == 1:
                return values.reshape(1, 1)
            values = values.reshape(tensor.shape[0], -1)[start:stop]
            if values.shape[1] == 1:
                return values
            return values[:, groups] if groups is not None else per_column(values, columns, columns // values.shape[1])

        weight = codes.to(torch.float32)
        if zero is not None:
            weight = weight - spread(zero).to(torch.float32)
        return weight * spread(scale)

    def _packed(self, stored: StoredTensors, module: str) -> QuantizedTensor:
        packed, shape_name = f"{module}.weight_packed", f"{module}.weight_shape"
        stored.part(shape_name, packed)
        if not stored.tensors[shape_name].file.exists():
            raise HeadersUnknownError(
                f"{stored.label}: the shapes of packed weights are in the weight files; download them first."
            )
        shape = tuple(int(n) for n in stored.read(shape_name).flatten().tolist())
        info = stored.tensors[packed]
        fitting = [
            bits
            for bits in range(1, 9)
            if len(shape) == 2 and info.shape == (shape[0], math.ceil(shape[1] * bits / 32)) and shape[1] > 0
        ]
        config_bits = self._config_bits(stored)
        bits = next((b for b in config_bits if b in fitting), fitting[0] if len(fitting) == 1 else None)
        if bits is None:
            raise stored.refuse(
                packed, f"numbers of {sorted(config_bits) or 'as many'} bits for a weight {list(shape)}"
            )
        return self._tensor(stored, module, packed, shape, {"bits": bits, "packed": True})

    @staticmethod
    def _config_bits(stored: StoredTensors) -> list[int]:
        """Return num_bits of the config's groups of weights."""
        groups = stored.settings.get("config_groups")
        listed = groups.values() if isinstance(groups, Mapping) else ()
        weights = [group.get("weights") for group in listed if isinstance(group, Mapping)]
        return [w["num_bits"] for w in weights if isinstance(w, Mapping) and isinstance(w.get("num_bits"), int)]

    @staticmethod
    def _tensor(
        stored: StoredTensors, module: str, name: str, shape: tuple[int, ...], settings: dict[str, object]
    ) -> QuantizedTensor:
        scale = stored.part(f"{module}.weight_scale", name)
        parts = {"weight": name, "scale": scale}
        if len(shape) != 2:
            raise stored.refuse(name, "a matrix")
        size = math.prod(stored.tensors[scale].shape)
        if size != 1 and (size % shape[0] or shape[1] % (size // shape[0])):
            raise stored.refuse(scale, f"one scale, or {shape[0]} x groups that divide {shape[1]} columns")
        for role, suffix in (("zero", "weight_zero_point"), ("group", "weight_g_idx")):
            if f"{module}.{suffix}" in stored.tensors:
                parts[role] = f"{module}.{suffix}"
        if "group" in parts and stored.tensors[parts["group"]].shape != (shape[1],):
            raise stored.refuse(parts["group"], f"[{shape[1]}]")
        if "zero" in parts and settings["packed"] and stored.tensors[parts["zero"]].dtype == "int32":
            bits = int(str(settings["bits"]))
            zero_shape = (math.ceil(shape[0] * bits / 32), max(1, size // shape[0]))
            if stored.tensors[parts["zero"]].shape != zero_shape:
                raise stored.refuse(parts["zero"], f"{list(zero_shape)} of int32")
        return QuantizedTensor(f"{module}.weight", shape, parts, settings)
