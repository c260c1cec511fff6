"""Quantized inputs are dequantized as transformers, compressed-tensors and bitsandbytes do it, block by block."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge as merge_script
from common.cli import run as run_main
from common.errors import CheckpointError
from merging.checkpoints.checkpoint import open_checkpoint
from merging.checkpoints.quantized.converter import unpack_bits, unpack_slice
from tests.helpers.tiny import fine_tune, make_llama, weights

Tensors = dict[str, torch.Tensor]
Quantize = Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]
"""(module, weight) -> (stored tensors of the module, the weight that the format's own library makes of them)."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose matrices are (64 or 96 or 128) x 64 and 64 x 128, so that groups of 32 fit and blocks do not."""
    return make_llama(tmp_path_factory.mktemp("quantized") / "base", hidden=64)


def library_scheme(bits: int, kind: str, strategy: str, symmetric: bool, group: int | None = None) -> Any:
    """A scheme of compressed-tensors for weights."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=bits, type=kind, strategy=strategy, symmetric=symmetric, group_size=group)
    return QuantizationScheme(targets=["Linear"], weights=args)


def integers(bits: int, strategy: str, symmetric: bool, packed: bool = True, order: bool = False) -> Quantize:
    """compressed-tensors' integers, packed or not; with `order` the groups of columns are interleaved."""

    def quantize(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        import compressed_tensors.compressors as library

        scheme = library_scheme(bits, "int", strategy, symmetric, 32 if strategy == "group" else None)
        rows, columns = weight.shape
        groups = {"group": columns // 32, "channel": 1, "tensor": 1}[strategy]
        blocks = weight.float().reshape(rows, groups, -1) if strategy != "tensor" else weight.float().reshape(1, 1, -1)
        half = 1 << (bits - 1)
        scale = (blocks.abs().amax(-1) / (half - 1)).clamp(min=1e-5).to(torch.bfloat16)
        state: Tensors = {"weight": weight.to(torch.bfloat16), "weight_scale": scale}
        if strategy == "tensor":
            state["weight_scale"] = scale.reshape(1)
        if not symmetric:
            state["weight_zero_point"] = torch.randint(-half, half, scale.shape, dtype=torch.int8)
        kind: Any = library.PackedQuantizationCompressor if packed else library.IntQuantizationCompressor
        stored = kind.compress(dict(state), scheme)
        theirs = kind.decompress(dict(stored), scheme)["weight"]
        return {f"{module}.{name}": tensor.contiguous() for name, tensor in stored.items()}, theirs

    return quantize


def fp8_blocks(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """DeepSeek's form, blocks of 32 x 32, dequantized by transformers."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rows, columns = weight.shape
    grid = weight.float().reshape(rows // 32, 32, columns // 32, 32)
    scale = grid.abs().amax((1, 3)) / 448
    stored = (grid / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
    theirs = Fp8Dequantize(None)._dequantize_one(stored, scale)
    return {f"{module}.weight": stored, f"{module}.weight_scale_inv": scale}, theirs


def fp8_channels(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """One scale per output channel, with a scale of activations, by compressed-tensors."""
    import compressed_tensors.compressors as library

    scheme = library_scheme(8, "float", "channel", True)
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    state = {"weight": weight.to(torch.bfloat16), "weight_scale": scale}
    kind: Any = library.FloatQuantizationCompressor
    stored = kind.compress(state, scheme)
    theirs = kind.decompress(dict(stored), scheme)["weight"]
    return {f"{module}.{n}": t for n, t in stored.items()} | {f"{module}.input_scale": torch.ones(1)}, theirs


def fp8_tensor(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """One scale per tensor, stored without a dimension (ModelOpt)."""
    scale = weight.float().abs().max() / 448
    stored = (weight.float() / scale).to(torch.float8_e4m3fn)
    return {f"{module}.weight": stored, f"{module}.weight_scale": scale}, stored.float() * scale


def mxfp8(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """A scale of eight exponent bits per 32 columns, dequantized by transformers."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    scale = torch.randint(115, 125, (weight.shape[0], weight.shape[1] // 32), dtype=torch.uint8)
    stored = (weight.float() * 400).to(torch.float8_e4m3fn)
    theirs = Fp8Dequantize(None)._dequantize_one(stored, scale, torch.float32)
    return {f"{module}.weight": stored, f"{module}.weight_scale_inv": scale}, theirs


def fp4(kind: str) -> Quantize:
    """compressed-tensors' NVFP4 or MXFP4."""

    def quantize(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        import compressed_tensors.compressors as library

        nv = kind == "nvfp4"
        group = 16 if nv else 32
        scheme = library_scheme(4, "float", "tensor_group" if nv else "group", True, group)
        largest = weight.float().reshape(weight.shape[0], -1, group).abs().amax(-1)
        state: Tensors = {"weight": weight.to(torch.bfloat16)}
        if nv:
            state["weight_global_scale"] = torch.tensor([448 * 6 / float(largest.max())])
            scale = (largest / 6 * state["weight_global_scale"]).to(torch.float8_e4m3fn)
            state["weight_scale"] = scale.to(torch.float32)
        else:
            state["weight_scale"] = torch.exp2(torch.floor(torch.log2(largest / 4)))
        compressor: Any = library.NVFP4PackedCompressor if nv else library.MXFP4PackedCompressor
        stored = compressor.compress(state, scheme)
        theirs = compressor.decompress(dict(stored), scheme)["weight"]
        return {f"{module}.{n}": t.contiguous() for n, t in stored.items()}, theirs

    return quantize


def nf4(kind: str, nested: bool, storage: torch.dtype = torch.uint8) -> Quantize:
    """bitsandbytes' 4-bit weights as transformers saves them."""

    def quantize(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        functional = pytest.importorskip("bitsandbytes").functional
        data, state = functional.quantize_4bit(
            weight.float(), quant_type=kind, compress_statistics=nested, blocksize=64, quant_storage=storage
        )
        stored = {f"{module}.weight": data}
        stored |= {f"{module}.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
        return stored, functional.dequantize_4bit(data, state)

    return quantize


def llm_int8(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """bitsandbytes' 8-bit weights."""
    functional = pytest.importorskip("bitsandbytes").functional
    codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
    stored = {
        f"{module}.weight": codes,
        f"{module}.SCB": scale,
        f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return stored, functional.int8_vectorwise_dequant(codes, scale)


def _words(numbers: list[int], bits: int) -> list[int]:
    """Numbers as one little-endian stream of bits, cut into signed words of 32: Python's integers do the packing."""
    stream = sum(number << (bits * i) for i, number in enumerate(numbers))
    count = -(-len(numbers) * bits // 32)
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def gptq(bits: int, act_order: bool = False) -> Quantize:
    """GPTQ's layout, packed number by number in Python; groups of 32 inputs, in order or shuffled."""

    def quantize(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        outputs, inputs = weight.shape
        codes = torch.randint(0, 1 << bits, (inputs, outputs))
        zeros = torch.randint(0, 1 << bits, (inputs // 32, outputs))
        scales = (torch.rand(inputs // 32, outputs) * 0.02 + 0.001).half()
        group = torch.arange(inputs) // 32
        if act_order:
            group = group[torch.randperm(inputs)]
        packed = torch.tensor([_words(column, bits) for column in codes.T.tolist()], dtype=torch.int32).T
        stored_zeros = ((zeros - 1) % (1 << bits)).tolist()
        stored = {
            f"{module}.qweight": packed.contiguous(),
            f"{module}.qzeros": torch.tensor([_words(row, bits) for row in stored_zeros], dtype=torch.int32),
            f"{module}.scales": scales,
            f"{module}.g_idx": group.to(torch.int32),
        }
        theirs = torch.empty(outputs, inputs)
        for i in range(inputs):
            theirs[:, i] = scales[group[i]].float() * (codes[i] - zeros[group[i]])
        return stored, theirs

    return quantize


def awq(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """AWQ's layout: word j of a row holds outputs 8j + 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on."""
    outputs, inputs = weight.shape

    def pack(numbers: torch.Tensor) -> torch.Tensor:
        rows = []
        for row in numbers.tolist():
            ordered = [row[j + k] for j in range(0, outputs, 8) for k in (0, 2, 4, 6, 1, 3, 5, 7)]
            rows.append(_words(ordered, 4))
        return torch.tensor(rows, dtype=torch.int32)

    codes = torch.randint(0, 16, (inputs, outputs))
    zeros = torch.randint(0, 16, (inputs // 32, outputs))
    scales = (torch.rand(inputs // 32, outputs) * 0.02 + 0.001).half()
    group = torch.arange(inputs) // 32
    stored = {f"{module}.qweight": pack(codes), f"{module}.qzeros": pack(zeros), f"{module}.scales": scales}
    return stored, (scales[group].float() * (codes - zeros[group])).T


FORMATS: dict[str, tuple[Quantize, dict[str, Any]]] = {
    "FP8, blocks": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [32, 32]}),
    "FP8, channels": (fp8_channels, {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "FP8, tensor": (fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "MXFP8": (mxfp8, {"quant_method": "mxfp8"}),
    "NVFP4": (fp4("nvfp4"), {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}),
    "MXFP4": (fp4("mxfp4"), {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}),
    "NF4": (nf4("nf4", nested=False), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "NF4, nested": (nf4("nf4", nested=True), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "FP4, stored as bfloat16": (
        nf4("fp4", nested=False, storage=torch.bfloat16),
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
    ),
    "LLM.int8": (llm_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "GPTQ, 4 bits": (gptq(4), {"quant_method": "gptq", "bits": 4, "group_size": 32}),
    "GPTQ, 8 bits": (gptq(8), {"quant_method": "gptq", "bits": 8, "group_size": 32}),
    "GPTQ, 3 bits, act order": (gptq(3, True), {"quant_method": "gptq", "bits": 3, "desc_act": True}),
    "GPTQ, 2 bits": (gptq(2), {"quant_method": "gptq", "bits": 2}),
    "AWQ": (awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "int4, groups": (integers(4, "group", True), {"config_groups": {"0": {"weights": {"num_bits": 4}}}}),
    "int4, groups, zero points": (integers(4, "group", False), {"config_groups": {"0": {"weights": {"num_bits": 4}}}}),
    "int8, channels": (integers(8, "channel", True), {"config_groups": {"0": {"weights": {"num_bits": 8}}}}),
    "int3, channels, zero points": (
        integers(3, "channel", False),
        {"config_groups": {"0": {"weights": {"num_bits": 3}}}},
    ),
    "int8, unpacked": (integers(8, "channel", True, packed=False), {"format": "int-quantized"}),
    "int8, unpacked, one scale": (integers(8, "tensor", True, packed=False), {"format": "int-quantized"}),
}


def quantized_copy(base: Path, folder: Path, quantize: Quantize, settings: dict[str, Any]) -> Tensors:
    """Save `base` with the MLP's matrices quantized; return the weights that the format's library makes of them."""
    folder.mkdir()
    torch.manual_seed(11)
    tensors, theirs = load_file(base / "model.safetensors"), {}
    for name in [n for n in tensors if ".mlp." in n]:
        stored, theirs[name] = quantize(name.removesuffix(".weight"), tensors.pop(name))
        tensors |= {key: tensor.contiguous() for key, tensor in stored.items()}
    save_file(tensors, folder / "model.safetensors")
    for file in base.iterdir():
        if file.suffix == ".json" and file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return theirs


@pytest.mark.parametrize("name", FORMATS)
def test_dequantized_weights_are_those_of_the_library(base: Path, tmp_path: Path, name: str) -> None:
    """Every weight is the library's to the rounding of its dtype, whole and in blocks of any rows alike."""
    quantize, settings = FORMATS[name]
    theirs = quantized_copy(base, tmp_path / "q", quantize, settings)
    with open_checkpoint(str(tmp_path / "q")) as opened, open_checkpoint(str(base)) as plain:
        assert set(opened.tensors) == set(plain.tensors)
        assert {n: i.shape for n, i in opened.tensors.items()} == {n: i.shape for n, i in plain.tensors.items()}
        assert "quantization_config" not in opened.config
        assert any("dequantized to fp32" in note for note in opened.notes)
        for tensor, expected in theirs.items():
            whole = opened.read(tensor)
            assert whole.dtype == torch.float32
            torch.testing.assert_close(
                whole.to(expected.dtype), expected, rtol=1e-6 if expected.dtype == torch.float32 else 0, atol=1e-9
            )
            rows = opened.rows(tensor)
            for cut in (1, 7, 40):
                pieces = [rows[slice(i, min(i + cut, len(whole)))] for i in range(0, len(whole), cut)]
                assert torch.equal(torch.cat(pieces), whole)
        for tensor in set(plain.tensors) - set(theirs):
            assert torch.equal(opened.read(tensor), plain.read(tensor))


def test_mxfp4_experts_are_those_of_transformers(tmp_path: Path) -> None:
    """gpt-oss' stacked experts come out transposed, as its bfloat16 checkpoint has them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8)
    scales = torch.randint(118, 130, (3, 10, 2), dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.down_proj"
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    with open_checkpoint(str(tmp_path)) as opened:
        assert list(opened.tensors) == [name]
        rows = opened.rows(name)
        ours = torch.cat([rows[slice(i, i + 1)] for i in range(3)])
    assert torch.equal(ours.to(torch.bfloat16), convert_moe_packed_tensors(blocks, scales).cpu())


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpacking_is_the_inverse_of_packing(bits: int) -> None:
    """Numbers of any width come back from a stream of bits, also where they cross words."""
    numbers = torch.randint(0, 1 << bits, (45,), generator=torch.Generator().manual_seed(bits)).tolist()
    words = torch.tensor(_words(numbers, bits), dtype=torch.int32)
    assert unpack_bits(words, bits, 0, 45).tolist() == numbers
    for start, stop in ((0, 45), (0, 1), (31, 34), (32, 45), (40, 44), (7, 7)):
        assert unpack_slice(words, bits, 0, start, stop).tolist() == numbers[start:stop]


def test_partial_blocks_of_fp8_follow_the_stated_size(tmp_path: Path) -> None:
    """A matrix that blocks do not divide (DeepSeek-V3's kv_a_proj, 576 rows of blocks of 128) ends in a part block."""
    weight = torch.ones(5, 7).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    save_file({"x.weight": weight, "x.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    settings = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    with open_checkpoint(str(tmp_path)) as opened:
        ours = opened.read("x.weight")
    assert ours.tolist() == [[1.0] * 4 + [2.0] * 3] * 4 + [[3.0] * 4 + [4.0] * 3]


def test_plain_tensors_win_over_a_left_over_config(base: Path, tmp_path: Path) -> None:
    """A quantization_config beside plain tensors is left out with a sentence; a merge of it is that of the base."""
    folder = tmp_path / "left_over"
    quantized_copy(base, folder, lambda module, weight: ({f"{module}.weight": weight}, weight), {"quant_method": "fp8"})
    with open_checkpoint(str(folder)) as opened:
        assert "quantization_config" not in opened.config
        assert any("stored tensors are not quantized" in note for note in opened.notes)
    out = tmp_path / "out"
    arguments = ["--method", "passthrough", "--models_to_merge", str(folder), "--save_path", str(out), "--quiet"]
    assert run_main(merge_script.main, arguments) == 0
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert all(torch.equal(tensor, weights(base)[name]) for name, tensor in weights(out).items())


def test_merge_of_a_quantized_model_is_the_merge_of_its_dequantized_copy(base: Path, tmp_path: Path) -> None:
    """TIES over a GPTQ model equals TIES over the same weights stored in fp32; the card says that it was quantized."""
    quantize, settings = FORMATS["GPTQ, 4 bits"]
    theirs = quantized_copy(base, tmp_path / "q", quantize, settings)
    plain = load_file(base / "model.safetensors") | {name: tensor.contiguous() for name, tensor in theirs.items()}
    (tmp_path / "plain").mkdir()
    for file in base.glob("*.json"):
        (tmp_path / "plain" / file.name).write_bytes(file.read_bytes())
    save_file(plain, tmp_path / "plain" / "model.safetensors")
    other = fine_tune(base, tmp_path / "other", 5)
    for model in ("q", "plain"):
        arguments = ["--method", "ties", "--base_model", str(base), "--models_to_merge", f"{tmp_path / model},{other}"]
        arguments += ["--density", "0.5", "--save_path", str(tmp_path / f"{model}-out"), "--quiet"]
        assert run_main(merge_script.main, arguments) == 0
    ours, expected = weights(tmp_path / "q-out"), weights(tmp_path / "plain-out")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert ours["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert "dequantized to fp32" in (tmp_path / "q-out" / "README.md").read_text()


BROKEN: dict[str, tuple[Callable[[Tensors], None], dict[str, Any], str]] = {
    "a scale is missing": (
        lambda t: (t.update({"x.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}), None)[1],
        {"quant_method": "fp8"},
        r"x\.weight is quantized and x\.weight_scale_inv is missing",
    ),
    "scales of another shape": (
        lambda t: t.update({"x.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "x.weight_scale": torch.ones(3, 1)}),
        {"quant_method": "fp8"},
        r"x\.weight_scale has shape \[3, 1\]",
    ),
    "GPTQ without zero points": (
        lambda t: t.update({"x.qweight": torch.ones(1, 8, dtype=torch.int32), "x.scales": torch.ones(1, 8)}),
        {"quant_method": "gptq", "bits": 4},
        r"x\.qweight is quantized and x\.qzeros is missing",
    ),
    "odd bits": (
        lambda t: t.update(
            {
                "x.qweight": torch.ones(1, 8, dtype=torch.int32),
                "x.qzeros": torch.ones(1, 1, dtype=torch.int32),
                "x.scales": torch.ones(1, 8),
            }
        ),
        {"quant_method": "gptq", "bits": "four"},
        r"quantization_config states 'four' bits",
    ),
    "six-bit floats": (
        lambda t: t.update(
            {
                "x.weight_packed": torch.ones(4, 48, dtype=torch.uint8),
                "x.weight_scale": torch.ones(4, 2, dtype=torch.uint8),
            }
        ),
        {"quant_method": "compressed-tensors"},
        r"x\.weight_packed has shape \[4, 48\]",
    ),
    "a format that is not read": (
        lambda t: t.update({"x.codebooks": torch.ones(4, 4)}),
        {"quant_method": "aqlm"},
        r"x\.codebooks \(float32\) is quantized by aqlm in a format that is not read here",
    ),
    "a broken bitsandbytes state": (
        lambda t: t.update(
            {
                "x.weight": torch.ones(8, 1, dtype=torch.uint8),
                "x.weight.absmax": torch.ones(1),
                "x.weight.quant_map": torch.ones(16),
                "x.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(b'{"shape": [4, 4]}'), dtype=torch.uint8),
            }
        ),
        {"quant_method": "bitsandbytes"},
        r"bitsandbytes__nf4 is not a quantization state of bitsandbytes",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_quantized_checkpoints_are_refused_by_tensor(tmp_path: Path, case: str) -> None:
    """What cannot be dequantized ends in one sentence on the tensor, when the checkpoint is opened."""
    change, settings, message = BROKEN[case]
    tensors: Tensors = {}
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(tmp_path))
