"""The check of weights before they are published: every file has its planned size, header and tensors, on the disk."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.errors import InterruptedWorkError
from common.files.atomic import naming
from common.files.json_values import JsonValue
from common.hardware import usable_cores
from merging.output.digests import digest_of
from merging.output.shards import Place, Shards

MOST_THREADS = 8


class DamagedError(InterruptedWorkError):
    """A file of the result is not as it was written."""


def check_files(folder: Path, shards: Shards) -> None:
    """Check that every weight file is there, with its planned size and header, and no other weight file.

    Raises:
        DamagedError: Naming the file.
    """
    for shard, name in enumerate(shards.names):
        file = folder / name
        header, size = shards.header(shard), shards.size(shard)
        try:
            info = os.lstat(file)
        except FileNotFoundError:
            raise DamagedError(f"{file} is missing; it was removed during the run.") from None
        if not stat.S_ISREG(info.st_mode) or info.st_size != size:
            raise DamagedError(f"{file} has {info.st_size} bytes, {size} were written; it was changed since.")
        with naming(file), file.open("rb") as stream:
            if stream.read(len(header)) != header:
                raise DamagedError(f"{file} has another header than was written; it was changed since.")
    strangers = sorted(file.name for file in folder.glob("*.safetensors") if file.name not in shards.names)
    if strangers:
        raise DamagedError(f"{folder / strangers[0]} was put there by something else during the run.")


def check_tensors(
    folder: Path, shards: Shards, entries: Sequence[Mapping[str, JsonValue]], part: range | None = None
) -> None:
    """Check tensors against the digests in a journal, reading them back.

    Args:
        folder: Where the files are.
        shards: The plan of the files.
        entries: The journal's entries of the tensors in `part`.
        part: Range of the planned tensors that are checked; None for all.

    Raises:
        DamagedError: Naming the first tensor that is not as it was written.
    """
    places = shards.places if part is None else shards.places[part.start : part.stop]
    if len(places) != len(entries):
        raise DamagedError(f"{folder}: {len(entries)} of {len(places)} tensors are written.")
    with ThreadPoolExecutor(max(1, min(MOST_THREADS, usable_cores()))) as threads:
        damaged = threads.map(lambda pair: _damaged(folder, shards, *pair), zip(places, entries, strict=True))
        for place in filter(None, damaged):
            file = folder / shards.names[place.shard]
            raise DamagedError(f"{file}: tensor {place.name} is not as it was written; the file was changed since.")


def _damaged(folder: Path, shards: Shards, place: Place, entry: Mapping[str, JsonValue]) -> Place | None:
    file = folder / shards.names[place.shard]
    with naming(file):
        same = entry["name"] == place.name and digest_of(file, place.offset, place.size) == entry["digest"]
    return None if same else place


def check_small_files(folder: Path, expected: Mapping[str, str | None], required: Iterable[str]) -> None:
    """Check the other files of a result: those under its lock by digest, and that the required ones are there.

    Raises:
        DamagedError: Naming the file.
    """
    for name in required:
        if not (folder / name).is_file():
            raise DamagedError(f"{folder / name} is missing; it was removed during the run.")
    for name, digest in expected.items():
        if digest_of(folder / name) != digest:
            raise DamagedError(f"{folder / name} was changed since it was written.")
