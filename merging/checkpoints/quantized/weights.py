"""Weights of a quantized checkpoint, dequantized to fp32 block by block while they are read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import CheckpointError
from common.files.json_values import JsonObject, JsonValue
from merging.checkpoints.quantized.bitsandbytes import BitsAndBytes4, BitsAndBytes8
from merging.checkpoints.quantized.converter import Converter, QuantizedTensor, StoredTensors
from merging.checkpoints.quantized.fp4 import Fp4, Mxfp4Experts
from merging.checkpoints.quantized.fp8 import Fp8
from merging.checkpoints.quantized.grouped_int import Awq, CompressedInt, Gptq
from merging.checkpoints.storage import FLOATS, StoredWeights, TensorInfo, is_packed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from merging.checkpoints.storage import Rows


CONVERTERS: tuple[Converter, ...] = (
    Mxfp4Experts(), BitsAndBytes4(), BitsAndBytes8(), Gptq(), Awq(), CompressedInt(), Fp4(), Fp8(),
)  # fmt: skip
RUNTIME = re.compile(
    r"\.(input_scale|input_zero_point|input_global_scale|output_scale|activation_scale(_inv)?|act_scale|k_scale|v_scale"
    r"|q_scale|weight_format|weight_shape|g_idx|perm|workspace|kv_scale|prob_scale)$"
)
"""Tensors that only quantized inference uses: scales of activations and of the KV cache, kernel layouts."""
CONFIG_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class DequantizedRows:
    """Rows of one quantized weight in fp32."""

    label: str
    tensor: QuantizedTensor
    converter: Converter
    parts: Mapping[str, Tensor]

    @property
    def shape(self) -> torch.Size:
        """Shape of the dequantized weight."""
        import torch

        return torch.Size(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """fp32."""
        import torch

        return torch.float32

    def __getitem__(self, rows: slice) -> Tensor:
        """Return rows start:stop in fp32. Raises CheckpointError where the stored numbers contradict each other."""
        start, stop, _ = rows.indices(self.tensor.shape[0])
        try:
            return self.converter.process(self.tensor, self.parts, slice(start, max(start, stop)))
        except (IndexError, RuntimeError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{self.label}: tensor {self.tensor.name} cannot be dequantized as {self.converter.label} ({first}); "
                "download the checkpoint again."
            ) from error


class DequantizedWeights:
    """Tensors of a checkpoint, the quantized ones in fp32 under the name and shape of their weight.

    Attributes:
        formats: {name of a format: number of weights}.
        left_out: Stored tensors that only quantized inference uses.
    """

    def __init__(
        self, label: str, stored: StoredWeights, weights: Mapping[str, tuple[Converter, QuantizedTensor]]
    ) -> None:
        self._label, self._stored, self._weights = label, stored, weights
        used = {part: name for name, (_, tensor) in weights.items() for part in tensor.parts.values()}
        self.left_out: list[str] = []
        self.formats = Counter(converter.label for converter, _ in weights.values())
        tensors: dict[str, TensorInfo] = {}
        for name, info in stored.tensors.items():
            if name in used:
                weight = used[name]
                tensors[weight] = TensorInfo(weights[weight][1].shape, "float32", info.file, is_calculated=True)
            elif RUNTIME.search(name):
                self.left_out.append(name)
            else:
                tensors[name] = info
        self.tensors: Mapping[str, TensorInfo] = tensors

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, sorted."""
        return self._stored.files

    def rows(self, name: str) -> Rows:
        """Return a tensor as stored, or a quantized one in fp32. Raises CheckpointError where it cannot be read."""
        if name not in self._weights:
            return self._stored.rows(name)
        converter, tensor = self._weights[name]
        parts = {role: self._stored.rows(part) for role, part in tensor.parts.items()}
        return DequantizedRows(self._label, tensor, converter, parts)

    def close(self) -> None:
        """Release the memory maps."""
        self._stored.close()

    def note(self) -> str:
        """Return the note on these weights for the log, the run record and the model card."""
        counts = ", ".join(f"{label}: {count}" for label, count in sorted(self.formats.items()))
        dropped = f"; {len(self.left_out)} tensors for quantized inference are left out" if self.left_out else ""
        return (
            f"{self._label} is quantized ({counts} weights); they are dequantized to fp32 while they are read{dropped}."
        )


def dequantized(
    label: str, config: Mapping[str, JsonValue], stored: StoredWeights
) -> tuple[StoredWeights | DequantizedWeights, JsonObject, str | None]:
    """Return the weights of a checkpoint, dequantized where its tensors are quantized.

    The tensors decide: a quantization_config next to unquantized tensors is removed with a note.

    Args:
        label: Name of the checkpoint in messages.
        config: Content of config.json.
        stored: Tensors as stored.

    Returns:
        Weights, config without quantization_config, and a note for the user or None.

    Raises:
        CheckpointError: A format is not supported; names tensor and format.
    """
    quantization = next((config[key] for key in CONFIG_KEYS if config.get(key)), None)
    settings = quantization if isinstance(quantization, Mapping) else {}
    plain = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    may_be_quantized = any(
        info.dtype not in FLOATS or is_packed(name, info.dtype) for name, info in stored.tensors.items()
    )
    weights = _quantized_weights(label, settings, stored) if may_be_quantized else {}
    if not weights:
        _refuse_packed(label, settings, stored.tensors)
        return stored, plain if quantization else dict(config), _left_over(label, config) if quantization else None
    weights_in_fp32 = DequantizedWeights(label, stored, weights)
    _refuse_packed(label, settings, {n: i for n, i in weights_in_fp32.tensors.items() if n not in weights})
    return weights_in_fp32, plain, weights_in_fp32.note()


def _quantized_weights(
    label: str, settings: Mapping[str, JsonValue], stored: StoredWeights
) -> dict[str, tuple[Converter, QuantizedTensor]]:
    """Return the quantized weights by name, with their format. Raises CheckpointError where they are broken."""
    view = StoredTensors(label, stored.tensors, settings, stored.rows)
    weights: dict[str, tuple[Converter, QuantizedTensor]] = {}
    for converter in CONVERTERS:
        for tensor in converter.validate(view):
            if tensor.name in weights:
                first = weights[tensor.name][0].label
                raise CheckpointError(
                    f"{label}: weight {tensor.name} is stored twice, as {first} and as {converter.label}; give the "
                    "unquantized checkpoint."
                )
            weights[tensor.name] = converter, tensor
    return weights


def _left_over(label: str, config: Mapping[str, JsonValue]) -> str:
    keys = " and ".join(key for key in CONFIG_KEYS if config.get(key))
    return f"{label}: config.json has a {keys}, and the stored tensors are not quantized; the result's has none."


def _refuse_packed(label: str, settings: Mapping[str, JsonValue], tensors: Mapping[str, TensorInfo]) -> None:
    """Raise CheckpointError for the first tensor of a format that no converter reads."""
    for name, info in tensors.items():
        if is_packed(name, info.dtype):
            method = settings.get("quant_method")
            kind = f" by {method}" if isinstance(method, str) else ""
            raise CheckpointError(
                f"{label}: tensor {name} ({info.dtype}) is quantized{kind} in a format that is not read here (FP8, "
                "MXFP4, NVFP4, bitsandbytes, GPTQ, AWQ and compressed-tensors are); give the unquantized checkpoint, "
                "or a dequantized copy (in transformers: from_pretrained, dequantize(), save_pretrained)."
            )
