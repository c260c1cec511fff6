"""The benchmark data this project knows: repositories, revisions, the files needed, and digests of their items.

configs/benchmark_data.yaml holds them; scripts/fetch_benchmarks.py fetches by them and writes a manifest of what it
fetched, which evaluations check. No datasets, no hub.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import BadInputError
from common.files.bounded_reading import UnreadableError, read_json, read_yaml
from common.files.json_types import Each, Fields, check_shape
from common.files.paths import file_digest

if TYPE_CHECKING:
    from datasets import Dataset

    from common.files.json_values import JsonObject

FILE = Path(__file__).resolve().parents[2] / "configs" / "benchmark_data.yaml"
MANIFEST = "benchmarks.json"
FORMAT = "benchmark_data"
LIST = Fields({"sets": Each(Fields({"revision": str, "files": Each(str)}))})
"""Types in a manifest."""
SCHEMA = 1


@dataclass(frozen=True)
class Pinned:
    """One data set at one commit of the hub.

    `files` are patterns of the files that are needed, `columns` those that benchmarks read. The number of items of each
    configuration's split ("config/split") has a digest where it is known.
    """

    revision: str
    files: tuple[str, ...]
    columns: tuple[str, ...]
    items: Mapping[str, tuple[int, str | None]]
    benchmarks: tuple[str, ...] = ()


@cache
def pinned(file: Path = FILE) -> Mapping[str, Pinned]:
    """Return every data set by its name on the hub. Raises BadInputError for a file that does not hold them."""
    datasets = {}
    try:
        (document,) = read_yaml(file)
        for name, entry in document["sets"].items():
            items = {place: (int(one[0]), one[1] if len(one) > 1 else None) for place, one in entry["items"].items()}
            files, columns, benchmarks = (tuple(entry[key]) for key in ("files", "columns", "benchmarks"))
            datasets[name] = Pinned(entry["revision"], files, columns, items, benchmarks)
    except UnreadableError as error:
        raise BadInputError(str(error)) from error
    except OSError as error:
        raise BadInputError(f"{file} cannot be read ({error.strerror}).") from error
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise BadInputError(f"{file} does not hold revisions as configs/{FILE.name} does ({error!r}).") from error
    return datasets


def items_digest(rows: Iterable[JsonObject], columns: Sequence[str]) -> str:
    """SHA-256 over the named columns of all rows in order, whatever file format they came in."""
    whole = hashlib.sha256()
    for row in rows:
        line = json.dumps([row[c] for c in columns], ensure_ascii=False, separators=(",", ":"))
        whole.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return whole.hexdigest()


def check_columns(name: str, columns: Sequence[str], where: str) -> None:
    """Raise BadInputError where a data set lacks columns that its benchmark reads."""
    dataset = pinned().get(name)
    lacking = [c for c in dataset.columns if c not in columns] if dataset else []
    if dataset and lacking:
        raise BadInputError(
            f"{where} is another version of {name}: it has no {', '.join(lacking)} (but {', '.join(columns)}); "
            f"scripts/fetch_benchmarks.py gets the revision {dataset.revision[:12]}."
        )


def check_manifest(folder: Path, hub: Path, names: Sequence[str]) -> None:
    """Compare a fetched folder with its manifest and the pins, for the data sets `names`; no manifest, no check.

    Raises BadInputError for another revision, and for files that are missing, cut short or changed.
    """
    path = folder / MANIFEST
    if not path.exists():
        return
    try:
        data = read_json(path)
        check_shape(data, LIST, str(path))
        sets = {name: (entry["revision"], dict(entry["files"])) for name, entry in data["sets"].items()}
    except UnreadableError as error:
        raise BadInputError(str(error)) from error
    except OSError as error:
        raise BadInputError(f"{path} cannot be read ({error.strerror}).") from error
    if data.get("schema") != SCHEMA:
        raise BadInputError(
            f"{path} has schema {data.get('schema')!r}, and this version reads {SCHEMA}: fetch the folder again."
        )
    for name in names:
        dataset = pinned().get(name)
        if name not in sets or dataset is None:
            continue
        revision, files = sets[name]
        if revision != dataset.revision:
            raise BadInputError(
                f"{folder} holds {name} of revision {revision[:12]}, and this version of the project evaluates on "
                f"{dataset.revision[:12]}: run scripts/fetch_benchmarks.py {folder} again."
            )
        for file, digest in files.items():
            problem = _problem(hub / name / file, digest)
            if problem:
                raise BadInputError(f"{hub / name / file} {problem}: run scripts/fetch_benchmarks.py {folder} again.")


def _problem(file: Path, digest: str) -> str | None:
    if not file.is_file():
        return "is listed in the manifest and missing"
    return None if file_digest(file) == digest else "is not the file that was fetched (another digest)"


def facts(name: str, config: str | None, split: str, rows: Dataset) -> tuple[int, str, bool | None]:
    """Return the number of items of a split, their digest, and whether they are the published ones (None: unknown).

    `rows` are the items of a data set that has pins; the digest covers the columns that benchmarks read.
    """
    dataset = pinned()[name]
    digest = items_digest(rows, dataset.columns)
    count, expected = dataset.items.get(f"{config or 'default'}/{split}", (None, None))
    if count is None or (expected is None and count == len(rows)):
        return len(rows), digest, None
    return len(rows), digest, count == len(rows) and digest == expected
