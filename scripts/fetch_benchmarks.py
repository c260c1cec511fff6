"""Fill a folder with benchmark data where there is internet, for `evaluate_model.py --data_dir` where there is none.

Data sets come from the hub at the commits in configs/benchmark_data.yaml; each file's digest is compared with the
hub's, and a manifest of them (benchmarks.json) is left for evaluations to check. nltk's sentence splitter, which IFEval
needs, is fetched as well. Run it again to complete a folder; what is there and whole is not fetched twice.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import Parser, add_output_flags, run
from common.errors import FailureError, UsageError, nearest
from common.files.json_values import JsonObject
from common.files.paths import file_digest, user_path, write_whole
from common.files.temporary import download_folder
from common.logging import logger
from eval.data.dataset_revisions import FILE, FORMAT, MANIFEST, SCHEMA, Pinned, check_manifest, pinned
from eval.results.result import read_json_file

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

PUNKT = Path("nltk_data") / "tokenizers" / "punkt_tab"


def parser() -> Parser:
    p = Parser(prog="scripts/fetch_benchmarks.py", description=__doc__)
    p.add_argument("folder", type=user_path, help="folder to fill: DIR/hub/..., DIR/nltk_data, DIR/benchmarks.json")
    p.add_argument(
        "--benchmarks",
        help="benchmarks to fetch, separated by commas: mmlu, ifeval, mbpp, humaneval, math, gsm8k, mmlu_pro "
        "(default: all)",
    )
    p.add_argument("--check", action="store_true", help="fetch nothing; compare the folder with its manifest")
    p.add_argument("--pins", type=user_path, default=FILE, help=f"file of revisions (default: configs/{FILE.name})")
    p.add_argument("--nltk_index", help="URL of nltk's index of packages (default: nltk's own)")
    add_output_flags(p)
    return p


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    sets = chosen(pinned(args.pins), args.benchmarks)
    if args.check:
        return check(args.folder, sets)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, pin in sets.items():
        files = fetch(name, pin, args.folder / "hub" / name)
        write_manifest(args.folder, name, pin.revision, files)
    if any("ifeval" in pin.benchmarks for pin in sets.values()):
        fetch_punkt(args.folder, args.nltk_index)
    print(f"{args.folder} is complete: evaluate_model.py --data_dir {args.folder}")
    return 0


def chosen(sets: Mapping[str, Pinned], benchmarks: str | None) -> dict[str, Pinned]:
    """The data sets that the benchmarks asked for read. Raises UsageError for an unknown benchmark."""
    available = {b for pin in sets.values() for b in pin.benchmarks}
    names = [b.strip() for b in (benchmarks or ",".join(sorted(available))).split(",") if b.strip()]
    for b in names:
        if b not in available:
            raise UsageError(f"--benchmarks knows {', '.join(sorted(available))}, not {b!r}.{nearest(b, available)}")
    return {name: pin for name, pin in sets.items() if set(pin.benchmarks) & set(names)}


def fetch(name: str, pin: Pinned, target: Path) -> dict[str, str]:
    """Fetch a data set's files that are not there yet; return the SHA-256 of each.

    Raises FailureError where the hub cannot be reached or sends other bytes than it lists; nothing half is left.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    try:
        tree = HfApi().list_repo_tree(name, recursive=True, revision=pin.revision, repo_type="dataset")
        listed = [f for f in tree if isinstance(f, RepoFile) and any(fnmatch(f.path, p) for p in pin.files)]
    except Exception as error:  # the hub's client has a dozen exceptions, and its transport its own
        raise FailureError(f"The hub's list of {name} could not be had: {_line(error)}") from error
    if not listed:
        raise FailureError(f"The hub lists no files of {name} at {pin.revision[:12]} that are needed.")
    digests, fetched = {}, 0
    for file in sorted(listed, key=lambda f: f.path):
        place = target / file.path
        if not (place.is_file() and _is(place, file)):
            _download(name, pin.revision, file, place)
            fetched += 1
        digests[file.path] = file_digest(place)
    logger.info(f"{name}: {len(listed)} files at {pin.revision[:12]}, {fetched} fetched")
    return digests


def _download(name: str, revision: str, file: RepoFile, place: Path) -> None:
    from huggingface_hub import hf_hub_download

    place.parent.mkdir(parents=True, exist_ok=True)
    with download_folder(place.parent, ".fetch-") as folder:
        try:
            got = Path(hf_hub_download(name, file.path, repo_type="dataset", revision=revision, cache_dir=folder))
        except Exception as error:  # as above
            raise FailureError(f"{name}/{file.path} could not be fetched: {_line(error)}") from error
        if not _is(got, file):
            raise FailureError(f"{name}/{file.path} came with another digest than the hub lists; it was not kept.")
        got.resolve().rename(place)


def _is(path: Path, file: RepoFile) -> bool:
    """Return whether a local file is the one the hub lists: SHA-256 for large files, git's digest for small ones."""
    if file.lfs is not None:
        return bool(file_digest(path) == file.lfs.sha256)
    content = path.read_bytes()
    return bool(hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == file.blob_id)


def fetch_punkt(folder: Path, index: str | None) -> None:
    """Fetch nltk's punkt_tab, whose archive nltk compares with its index. Raises FailureError where it cannot."""
    if (folder / PUNKT).is_dir():
        return
    from nltk.downloader import Downloader

    target = folder / "nltk_data"
    loader = Downloader(server_index_url=index, download_dir=str(target))
    try:
        done = loader.download("punkt_tab", quiet=True, raise_on_error=True)
    except Exception as error:  # ValueError, OSError, or what its XML reader raises
        raise FailureError(f"nltk's punkt_tab could not be fetched: {_line(error)}") from error
    if not done or not (folder / PUNKT).is_dir():
        raise FailureError("nltk's punkt_tab could not be fetched.")
    (target / "tokenizers" / "punkt_tab.zip").unlink(missing_ok=True)
    logger.info("nltk: punkt_tab fetched")


def write_manifest(folder: Path, name: str, revision: str, files: dict[str, str]) -> None:
    """Add one data set to the folder's manifest, whole or not at all."""
    path = folder / MANIFEST
    data: JsonObject = {"format": FORMAT, "schema": SCHEMA, "sets": {}}
    if path.is_file():
        try:
            data["sets"] = dict(read_json_file(path)["sets"])
        except (ValueError, KeyError, TypeError) as error:
            raise FailureError(f"{path} is not a manifest of this script ({error!r}); remove it.") from error
    data["sets"][name] = {"revision": revision, "files": files}
    write_whole(path, (json.dumps(data, indent=1, sort_keys=True) + "\n").encode())


def check(folder: Path, sets: dict[str, Pinned]) -> int:
    """Compare what was fetched with the manifest and the pins; raises what an evaluation would."""
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} has no {MANIFEST}: it was not filled by this script.")
    check_manifest(folder, folder / "hub", list(sets))
    listed = read_json_file(folder / MANIFEST)["sets"]
    absent = [name for name in sets if name not in listed]
    if absent:
        raise UsageError(f"{folder} lacks {', '.join(absent)}: fetch them.")
    print(f"{folder} is whole: {', '.join(sets)}")
    return 0


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no details'])[0]}"


if __name__ == "__main__":
    sys.exit(run(main))
