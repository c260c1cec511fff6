"""Writing a safetensors file into a stream: no memory map, whose writes a full disk would end by a signal."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor

CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""torch's name of a dtype -> safetensors' name."""


def write_safetensors(stream: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors with metadata, in an order that depends on nothing but names and dtypes.

    Args:
        stream: Where the file goes, from its first byte on.
        tensors: Tensors by name, on any device.
        metadata: Texts for the header.
    """
    import torch

    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps large elements aligned
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        dtype = CODES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    stream.write(struct.pack("<Q", len(encoded)) + encoded)
    for name in names:
        if tensors[name].numel():
            flat = tensors[name].detach().cpu().contiguous().flatten()
            stream.write(flat.view(torch.uint8).numpy().data)
