"""Weight files of a model folder, and the header entries of their tensors."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from common.errors import CheckpointError
from common.files.bounded_reading import MAX_INDEX, UnreadableError, open_regular, parse_json, read_json
from common.files.json_values import JsonObject, JsonValue
from common.terminal_text import escape_controls, foreign, quoted
from merging.checkpoints.model_folder import check_inside
from merging.checkpoints.storage import DTYPES, MAX_NAME, TensorInfo, load_pickled

LONGEST_HEADER = 100_000_000
"""Bytes; the safetensors library refuses longer headers too."""
SHARD_NAME = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})(\.\w+)$")
STRAY = ("adapter_", "consolidated", "optimizer", "training_args")
"""Prefixes of .safetensors files that hold other data, or copies of the weights."""

BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits per element of each dtype of the safetensors library."""
MAX_DIMENSIONS = 16
MAX_SIZE = 2**63 - 1
NAME_RULE = f"and names have 1 to {MAX_NAME} characters without control characters"

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Layout:
    """Weight files of a model, and the index file that lists them, if there is one."""

    files: tuple[str, ...]
    index: str | None = None


def layout_of(folder: Path, names: Sequence[str]) -> Layout:
    """Return the weight files of a model; a layout without files where it has none.

    safetensors goes before .bin; a single file before an index before shards without an index. Adapters and copies are
    ignored.

    Args:
        folder: The model folder; a file of `names` may still have to be downloaded, except an index.
        names: Names of all files of the model.

    Raises:
        CheckpointError: The index is broken, or a shard is missing.
    """
    for whole, pattern in (
        ("model.safetensors", r"model[\w.-]*\.safetensors"),
        ("pytorch_model.bin", r"pytorch_model[\w.-]*\.bin"),
    ):
        index = f"{whole}.index.json"
        if whole in names:
            return Layout((whole,))
        if index in names:
            return Layout(tuple(sorted(set(weight_map(folder / index).values()))), index)
        if shards := sorted(name for name in names if re.fullmatch(pattern, name)):
            _check_numbered(folder, shards)
            return Layout(tuple(shards))
    single_files = (name for name in names if name.endswith(".safetensors") and not name.startswith(STRAY))
    return Layout(tuple(sorted(single_files)))


def adapter_layout(names: Sequence[str]) -> Layout:
    """Return the weight file of an adapter among its file names; a layout without files where it has none."""
    return Layout(tuple(name for name in ADAPTER_FILES if name in names)[:1])


def weight_map(index: Path) -> dict[str, str]:
    """Return {tensor name: file name} of an index file.

    Raises:
        CheckpointError: The index is broken, or names a file outside the folder.
    """
    try:
        content = read_json(index, MAX_INDEX)
    except (UnreadableError, OSError) as error:
        what = str(error) if isinstance(error, UnreadableError) else f"{index} cannot be read ({error.strerror})."
        raise CheckpointError(what) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{index} should hold a JSON object.")
    entries = content.get("weight_map")
    if not isinstance(entries, dict) or not all(isinstance(file, str) for file in entries.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names.")
    for file in set(entries.values()):
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or not path.parts or not _is_plain(file):
            name = next(name for name, place in entries.items() if place == file)
            raise CheckpointError(
                f"{index} puts tensor {foreign(name)} into {quoted(file)}, outside the folder; it is not read."
            )
    for name in entries:
        if not _is_plain(name):
            raise CheckpointError(f"{index} has the tensor name {quoted(name)}, {NAME_RULE}.")
    return entries


def _is_plain(name: str) -> bool:
    """Return True where a name can be printed and stored unescaped."""
    return 0 < len(name) <= MAX_NAME and escape_controls(name) == name and "\n" not in name and "\t" not in name


def _check_numbered(folder: Path, shards: Sequence[str]) -> None:
    """Raise CheckpointError where one of the files numbered k of n is missing."""
    present = set(shards)
    for name in shards:
        if part := SHARD_NAME.fullmatch(name):
            numbers = range(1, int(part[3]) + 1)
            numbered = (f"{part[1]}-{k:0{len(part[2])}d}-of-{part[3]}{part[4]}" for k in numbers)
            missing = next((file for file in numbered if file not in present), None)
            if missing is not None:
                raise CheckpointError(f"{folder} has {foreign(name)} and not {foreign(missing)}; download it again.")


def read_headers(folder: Path, layout: Layout) -> dict[str, TensorInfo]:
    """Return the header entries of a folder's weight files by tensor name.

    Raises:
        CheckpointError: A file is missing or broken, or a tensor is in two files or in none.
    """
    headers = []
    for name in layout.files:
        file = folder / name
        if not file.exists():
            raise CheckpointError(
                f"{folder / (layout.index or '')} names {foreign(name)}, which is not in the folder; download it again."
            )
        check_inside(folder, file)
        headers.append(header_of(file))
    return join_headers(folder, layout, headers)


def join_headers(folder: Path, layout: Layout, headers: Iterable[Mapping[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """Return the union of the header entries of several files, checked against the index, if there is one.

    Raises:
        CheckpointError: A tensor is in two files, or the index names a tensor that is in none.
    """
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for name, info in header.items():
            if name in tensors:
                both = f"{tensors[name].file.name} and {info.file.name}"
                raise CheckpointError(f"Tensor {name} is in both {both} of {folder}; remove one of the files.")
            tensors[name] = info
    if layout.index is not None:
        missing = [name for name in weight_map(folder / layout.index) if name not in tensors]
        if missing:
            more = f" ({len(missing)} such)"
            raise CheckpointError(
                f"{folder / layout.index} names tensor {foreign(missing[0])}, which is in no file{more}."
            )
    return tensors


def header_of(file: Path) -> dict[str, TensorInfo]:
    """Return the header entries of a weight file. Raises CheckpointError for a broken file."""
    if file.suffix != ".safetensors":
        return {
            name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), file)
            for name, tensor in load_pickled(file).items()
        }
    return safetensors_header(file)


def safetensors_header(file: Path) -> dict[str, TensorInfo]:
    """Return the header entries of a safetensors file. Raises CheckpointError for a broken file."""
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size < 8:
                raise ValueError(f"{size} bytes are not even the length of a header")
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, LONGEST_HEADER):
                raise ValueError(f"its header claims {length} bytes, the file has {size}")
            header = parse_json(stream.read(length), "its header", whole_numbers=True)
        entries = _checked(header)
        _check_layout(entries, size - 8 - length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}).") from error
    except (ValueError, struct.error) as error:
        reason = str(error).rstrip(".")
        raise CheckpointError(f"{file} is not a whole safetensors file ({reason}); download it again.") from error
    return {name: _info(spec, file, 8 + length) for name, spec in entries.items()}


def _checked(header: JsonValue) -> dict[str, JsonObject]:
    """Return the tensor entries of a parsed header after checking their types. Raises ValueError."""
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
    ):
        raise ValueError("__metadata__ in its header should map keys to texts")
    for name, spec in header.items():
        if not _is_plain(name):
            raise ValueError(f"its header has the tensor name {quoted(name)}, {NAME_RULE}")
        if not isinstance(spec, dict):
            raise ValueError(f"tensor {name} is {quoted(spec)} in its header, an object was expected")
        _check_spec(name, spec)
    entries: dict[str, JsonObject] = header
    return entries


def _check_spec(name: str, spec: Mapping[str, JsonValue]) -> None:
    """Raise ValueError unless a tensor's entry has a known dtype, whole numbers as shape, and two ordered offsets."""
    dtype, shape, offsets = (spec.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"tensor {name} has the dtype {quoted(dtype)}, which safetensors does not know")
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size <= MAX_SIZE for size in shape):
        raise ValueError(f"tensor {name} has the shape {quoted(shape)}, whole numbers from 0 were expected")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"tensor {name} has {len(shape)} dimensions, at most {MAX_DIMENSIONS} are read")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(end) is int for end in offsets):
        raise ValueError(f"tensor {name} has the data_offsets {quoted(offsets)}, two whole numbers were expected")
    bits = BITS[dtype]
    for size in shape:
        bits *= size
        if bits > MAX_SIZE:
            raise ValueError(f"tensor {name} of shape {quoted(shape)} is larger than any file")


def _info(spec: Mapping[str, JsonValue], file: Path, data: int) -> TensorInfo:
    """Return the TensorInfo of a header entry; the tensor data of the file begin at byte `data`."""
    dtype = DTYPES.get(spec["dtype"], (spec["dtype"], 0))[0]
    return TensorInfo(tuple(spec["shape"]), dtype, file, data + spec["data_offsets"][0])


def _check_layout(entries: Mapping[str, Mapping[str, JsonValue]], size: int) -> None:
    """Raise ValueError unless the tensors fill `size` bytes one after another, each as long as its shape says."""
    end = 0
    for name, spec in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = spec["data_offsets"]
        if start != end:
            what = "overlaps the previous one" if start < end else "leaves a gap before it"
            raise ValueError(f"tensor {name} {what}: it starts at byte {start} of the data, {end} expected")
        bits = BITS[spec["dtype"]]
        for dimension in spec["shape"]:
            bits *= dimension
        if bits % 8 or stop - start != bits // 8:
            raise ValueError(f"tensor {name} {spec['shape']} has {stop - start} bytes, {bits / 8:g} expected")
        end = stop
    if end != size:
        cut = ": cut short" if end > size else ""
        raise ValueError(f"{end} bytes of data expected, {size} found{cut}")
