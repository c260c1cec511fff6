"""Writing a checkpoint: staged beside its target, sharded, and renamed only when it is whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from console.errors import CheckpointError, UsageError
from merging.checkpoint import CODES, tensor_bytes
from merging.preflight import TensorPlan

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "run_record.json"
"""The file that marks a checkpoint written here and tells how it was made."""
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Return bytes for "5GB", "200MB", "1GiB" or a plain number. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B|)\s*", text.upper())
    if not match or float(match[1]) <= 0:
        raise UsageError(f"--max_shard_size must be a size such as 5GB or 200MB, found {text!r}.")
    return int(float(match[1]) * UNITS[match[2]])


def check_target(save_path: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse a target that holds something, or that touches an input. Raises UsageError.

    With `overwrite` a folder is replaced only where it holds a checkpoint that was written here (its run record), and
    never where it is, contains or lies in one of the `inputs` or the current folder.
    """
    target = save_path.resolve()
    if target.exists() and not target.is_dir():
        raise UsageError(f"--save_path {save_path} is a file; give a folder.")
    for path in inputs:
        taken = path.resolve()
        if target == taken or target in taken.parents or taken in target.parents:
            raise UsageError(f"--save_path {save_path} would write over or into the input {path}; give another folder.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"--save_path {save_path} is not empty; give another folder or add --overwrite.")
    if not (target / RECORD).is_file() or target in (Path.cwd(), *Path.cwd().parents):
        raise UsageError(
            f"--save_path {save_path} holds something that is no checkpoint written here (it has no {RECORD}); "
            "--overwrite does not replace it: give another folder."
        )


@contextmanager
def staged(save_path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder as `replacing` does, after checking that it may take the place of `save_path`."""
    check_target(save_path, overwrite)
    with replacing(save_path) as stage:
        yield stage


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder` that takes its place at the end, and vanishes on any error.

    What was there before is gone only once the new folder stands; whether it may go is the caller's to know.
    """
    target = folder.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = target.with_name(f".{target.name}.partial-{os.getpid()}")
    stage.mkdir()
    try:
        yield stage
        for file in stage.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        replaced = target.with_name(f".{target.name}.replaced-{os.getpid()}")
        if target.exists():
            target.rename(replaced)
        try:
            stage.rename(target)
        except OSError:
            if replaced.exists():
                replaced.rename(target)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


class ShardedWriter:
    """Writes tensors in the plan's order into safetensors files of at most `max_shard_bytes` each.

    Headers are written first, from the plan, so that each tensor's bytes go straight to the file and no shard is ever
    held in memory.
    """

    def __init__(self, folder: Path, tensors: Sequence[TensorPlan], max_shard_bytes: int) -> None:
        self.folder = folder
        self._shards = split_shards(tensors, max_shard_bytes)
        self._names = (
            ["model.safetensors"]
            if len(self._shards) == 1
            else [f"model-{i:05d}-of-{len(self._shards):05d}.safetensors" for i in range(1, len(self._shards) + 1)]
        )
        self._queue = [(tensor, i) for i, shard in enumerate(self._shards) for tensor in shard]
        self._next = 0
        self._stream: BinaryIO | None = None

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor of the plan. Raises CheckpointError where it is not the one that was planned."""
        import torch

        expected, shard = self._queue[self._next]
        found = (name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        if found != (expected.name, expected.shape, expected.dtype):
            raise CheckpointError(f"Tensor {found} came where {expected.name} {expected.shape} was planned.")
        if self._stream is None or (self._next and self._queue[self._next - 1][1] != shard):
            self._open(shard)
        assert self._stream is not None
        data = tensor.detach().contiguous().cpu().flatten().view(torch.uint8)
        self._stream.write(data.numpy().data)
        self._next += 1

    def close(self) -> None:
        """Finish the last shard and write the index. Raises CheckpointError where tensors are missing."""
        if self._next != len(self._queue):
            raise CheckpointError(f"Tensor {self._queue[self._next][0].name} was planned and never written.")
        if self._stream is not None:
            self._stream.close()
        if len(self._shards) > 1:
            weight_map = {t.name: self._names[i] for i, shard in enumerate(self._shards) for t in shard}
            total = sum(tensor_bytes(t.shape, t.dtype) for shard in self._shards for t in shard)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _open(self, shard: int) -> None:
        if self._stream is not None:
            self._stream.close()
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self._shards[shard]:
            end = offset + tensor_bytes(tensor.shape, tensor.dtype)
            header[tensor.name] = {
                "dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end],
            }  # fmt: skip
            offset = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._stream = (self.folder / self._names[shard]).open("wb")
        self._stream.write(struct.pack("<Q", len(encoded)) + encoded)


def split_shards(tensors: Sequence[TensorPlan], max_shard_bytes: int) -> list[list[TensorPlan]]:
    """Cut the tensors, in order, into shards of at most `max_shard_bytes` (one tensor may exceed it alone)."""
    shards: list[list[TensorPlan]] = [[]]
    filled = 0
    for tensor in tensors:
        size = tensor_bytes(tensor.shape, tensor.dtype)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards
