"""bitsandbytes' 4-bit (NF4, FP4) and 8-bit weights, as transformers saves them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from common.errors import CheckpointError, HeadersUnknownError
from common.files.json_values import JsonObject, JsonValue
from merging.checkpoints.quantized.converter import QuantizedTensor, StoredTensors

if TYPE_CHECKING:
    from torch import Tensor

STATE = ".quant_state.bitsandbytes__"


class BitsAndBytes4:
    """theta = quant_map[code] * absmax of the block (Dettmers et al. 2023, arXiv:2305.14314).

    Codes are four bits, the high ones of a byte first, over the flattened weight. With double quantization absmax is
    itself coded: nested_quant_map[code] * nested_absmax of its block + nested_offset.
    """

    label = "bitsandbytes 4-bit"

    def validate(self, stored: StoredTensors) -> list[QuantizedTensor]:
        """Return each weight that has a quantization state; its shape is in that state, which is read."""
        weights = []
        for state_name in [name for name in stored.tensors if STATE in name]:
            name = state_name.partition(STATE)[0]
            state = self._state(stored, state_name)
            parts = {"weight": stored.part(name, state_name), "state": state_name}
            for role in ("absmax", "quant_map"):
                parts[role] = stored.part(f"{name}.{role}", name)
            if "nested_blocksize" in state:
                for role in ("nested_absmax", "nested_quant_map"):
                    parts[role] = stored.part(f"{name}.{role}", name)
            count = math.prod(state["shape"])
            blocks = math.ceil(count / state["blocksize"])
            absmax = stored.tensors[parts["absmax"]].shape
            if math.prod(absmax) != blocks:
                raise stored.refuse(parts["absmax"], f"{blocks} blocks of {state['blocksize']}")
            weights.append(QuantizedTensor(name, tuple(state["shape"]), parts, state))
        return weights

    def process(self, tensor: QuantizedTensor, parts: Mapping[str, Tensor], rows: slice) -> Tensor:
        """Return rows in fp32."""
        import torch

        state, width = tensor.settings, math.prod(tensor.shape[1:])
        start, stop, _ = rows.indices(tensor.shape[0])
        first, last = start * width, stop * width
        data = parts["weight"].flatten().view(torch.uint8)[first // 2 : (last + 1) // 2]
        codes = torch.stack([data >> 4, data & 0xF], dim=-1).flatten()[first % 2 :][: last - first]
        blocks = torch.arange(first, last) // state["blocksize"]
        absmax = self._absmax(parts, state, first // state["blocksize"], int(blocks[-1]) + 1 if last > first else 0)
        values = parts["quant_map"].to(torch.float32)[codes.long()]
        values *= absmax[blocks - first // state["blocksize"]]
        return values.reshape(stop - start, *tensor.shape[1:])

    @staticmethod
    def _absmax(parts: Mapping[str, Tensor], state: Mapping[str, JsonValue], first: int, last: int) -> Tensor:
        """Return the largest magnitudes of blocks first:last in fp32."""
        import torch

        absmax = parts["absmax"].flatten()[first:last]
        if "nested_blocksize" not in state:
            return absmax.to(torch.float32)
        blocks = torch.arange(first, first + len(absmax)) // state["nested_blocksize"]
        values = parts["nested_quant_map"].to(torch.float32)[absmax.long()]
        result: Tensor = values * parts["nested_absmax"].to(torch.float32)[blocks] + state["nested_offset"]
        return result

    @staticmethod
    def _state(stored: StoredTensors, name: str) -> JsonObject:
        if not stored.tensors[name].file.exists():
            raise HeadersUnknownError(
                f"{stored.label}: the shapes of bitsandbytes' weights are in the weight files; download them first."
            )
        try:
            state = json.loads(bytes(stored.read(name).flatten().tolist()))
            shape, size = state["shape"], state["blocksize"]
            nested = state.get("nested_blocksize")
            sizes = [*shape, size, *([] if nested is None else [nested])]
            if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes) or not shape:
                raise ValueError(f"shape {shape}, block sizes {size}, {nested}")
            if nested is not None:
                float(state["nested_offset"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{stored.label}: {name} is not a quantization state of bitsandbytes ({error}); download the "
                "checkpoint again."
            ) from error
        return dict(state)


class BitsAndBytes8:
    """theta = weight * SCB / 127, SCB per output channel (Dettmers et al. 2022, arXiv:2208.07339)."""

    label = "bitsandbytes 8-bit"

    def validate(self, stored: StoredTensors) -> list[QuantizedTensor]:
        """Return each module's weight that has an SCB."""
        weights = []
        for module in stored.ending(".SCB"):
            name, scale = stored.part(f"{module}.weight", f"{module}.SCB"), f"{module}.SCB"
            info = stored.tensors[name]
            if info.dtype != "int8" or len(info.shape) != 2:
                raise stored.refuse(name, "a matrix of int8")
            if math.prod(stored.tensors[scale].shape) != info.shape[0]:
                raise stored.refuse(scale, f"{info.shape[0]} scales")
            weights.append(QuantizedTensor(name, info.shape, {"weight": name, "scale": scale}))
        return weights

    def process(self, tensor: QuantizedTensor, parts: Mapping[str, Tensor], rows: slice) -> Tensor:
        """Return rows in fp32."""
        import torch

        scale = parts["scale"].flatten()[rows].to(torch.float32) * (1 / 127)
        return parts["weight"][rows].to(torch.float32) * scale[:, None]
