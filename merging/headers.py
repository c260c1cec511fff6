"""Which files of a model folder hold its weights, and what their headers say of every tensor."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from console.errors import CheckpointError
from console.files import read_json
from merging.stored import DTYPES, TensorInfo, load_pickled

LONGEST_HEADER = 100_000_000
"""Bytes of a safetensors header beyond which its own library does not read it either."""
PART = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})(\.\w+)$")
STRAY = ("adapter_", "consolidated", "optimizer", "training_args")
"""Beginnings of names of .safetensors files that hold something else, or the same weights under other names."""

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Layout:
    """The files that hold a model's weights, and the index that names them, if there is one."""

    files: tuple[str, ...]
    index: str | None = None


def layout_of(folder: Path, names: Sequence[str]) -> Layout:
    """Choose, among the file names of a model folder (perhaps not all of them here yet), those that hold its weights.

    safetensors before .bin; one whole file before an index before shards without one; an adapter's and other copies
    are left alone. No files where there are none. Raises CheckpointError for a broken index and for missing shards.
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
    others = (name for name in names if name.endswith(".safetensors") and not name.startswith(STRAY))
    return Layout(tuple(sorted(others)))


def adapter_layout(names: Sequence[str]) -> Layout:
    """Choose an adapter's weights among the file names of its folder; no files where there are none."""
    return Layout(tuple(name for name in ADAPTER_FILES if name in names)[:1])


def weight_map(index: Path) -> dict[str, str]:
    """Return {tensor name: file name} of an index. Raises CheckpointError for one that is broken or points outside."""
    found = read_json(index, f"{index} does not exist.").get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names.")
    for name, file in found.items():
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise CheckpointError(f"{index} puts tensor {name} into {file!r}, outside the folder; it is not read.")
    return found


def _check_numbered(folder: Path, shards: Sequence[str]) -> None:
    """Raise CheckpointError where files numbered k of n, without an index, are not all there."""
    for name in shards:
        if part := PART.fullmatch(name):
            wanted = [f"{part[1]}-{k:0{len(part[2])}d}-of-{part[3]}{part[4]}" for k in range(1, int(part[3]) + 1)]
            lacking = [file for file in wanted if file not in shards]
            if lacking:
                raise CheckpointError(f"{folder} has {name} and not {lacking[0]}; download it again.")


def read_headers(folder: Path, layout: Layout) -> dict[str, TensorInfo]:
    """Return what the headers of a folder's weight files say of every tensor.

    Raises CheckpointError for a file that is missing or broken, a tensor that is in two files or in none.
    """
    found = []
    for name in layout.files:
        file = folder / name
        if not file.exists():
            raise CheckpointError(
                f"{folder / (layout.index or '')} names {name}, which is not in the folder; download it again."
            )
        found.append(header_of(file))
    return united(folder, layout, found)


def united(folder: Path, layout: Layout, headers: Iterable[Mapping[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """Return the tensors of several files together, checked against the index, if there is one.

    Raises CheckpointError for a tensor that is in two files, or in none that the index names.
    """
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for name, info in header.items():
            if name in tensors:
                both = f"{tensors[name].file.name} and {info.file.name}"
                raise CheckpointError(f"Tensor {name} is in both {both} of {folder}; remove one of the files.")
            tensors[name] = info
    if layout.index is not None:
        lacking = [name for name in weight_map(folder / layout.index) if name not in tensors]
        if lacking:
            more = f" ({len(lacking)} such)"
            raise CheckpointError(f"{folder / layout.index} names tensor {lacking[0]}, which is in no file{more}.")
    return tensors


def header_of(file: Path) -> dict[str, TensorInfo]:
    """Return what a weight file's header says of its tensors. Raises CheckpointError for a broken file."""
    if file.suffix != ".safetensors":
        return {
            name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), file)
            for name, tensor in load_pickled(file).items()
        }
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, LONGEST_HEADER):
                raise ValueError(f"its header claims {length} bytes, the file has {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        _check_layout(header, size - 8 - length)
        return {name: _info(spec, file, 8 + length) for name, spec in header.items()}
    except (ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({error}); download it again.") from error


def _info(spec: Mapping[str, Any], file: Path, data: int) -> TensorInfo:
    """What a header's entry says, the file's data beginning at byte `data`."""
    dtype = DTYPES.get(spec["dtype"], (spec["dtype"], 0))[0]
    return TensorInfo(tuple(spec["shape"]), dtype, file, data + spec["data_offsets"][0])


def _check_layout(header: Mapping[str, Any], size: int) -> None:
    """Raise ValueError unless the tensors fill `size` bytes one after another, each as long as its shape says."""
    end = 0
    for name, spec in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = spec["data_offsets"]
        if start != end:
            raise ValueError(f"tensor {name} starts at byte {start} of the data, {end} expected")
        wanted = math.prod(spec["shape"]) * DTYPES[spec["dtype"]][1] if spec["dtype"] in DTYPES else stop - start
        if stop - start != wanted:
            raise ValueError(f"tensor {name} {spec['shape']} has {stop - start} bytes, {wanted} expected")
        end = stop
    if end != size:
        cut = ": cut short" if end > size else ""
        raise ValueError(f"{end} bytes of data expected, {size} found{cut}")
