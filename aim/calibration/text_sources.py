"""Sources of calibration texts: the hub's data sets or local files, each in the order of its shuffled rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aim.calibration.config import Calibration, Source
from aim.calibration.text_files import Rows, chosen_field, read
from common.errors import DISK_FULL, CalibrationError, ProjectError, UsageError, causes
from common.files.json_values import JsonObject, JsonValue

if TYPE_CHECKING:
    from datasets import Dataset

COMMIT = re.compile(r"[0-9a-f]{40}")
CONFIGS = re.compile(r"(?:configs|Available|configurations)(?: in the cache)?: \[?(.*?)\]?(?: (?:Example|Please) .*)?$")


Chat = Sequence[Mapping[str, JsonValue]]
"""Messages of a chat, each with a role and its content."""


@dataclass(frozen=True)
class Texts:
    """The rows of one source and the order in which they are tried; `about` is what an account says of the source."""

    source: Source
    rows: Rows
    order: Sequence[int]

    @property
    def about(self) -> JsonObject:
        """Name, field, number of rows, and what else tells which data this was."""
        return {"source": self.source.name, "rows": self.rows.count, **self.rows.about}

    def where(self, row: int) -> str:
        """Return where a row stands, for an error."""
        return self.rows.where(row)

    def sample(self, row: int) -> str | Chat | None:
        """Return a row's text, or its chat as a list of {role, content}; None for an empty one.

        Raises CalibrationError for anything else.
        """
        value = self.rows.value(row)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
            # tables give every key to every message, and templates ask whether a key is there
            return [
                {key: entry for key, entry in message.items() if entry is not None or key in ("role", "content")}
                for message in value
            ]
        raise CalibrationError(
            f"{self.where(row)}: the text must be a string, or a chat as a list of {{role, content}}, found "
            f"{type(value).__name__}."
        )


def load_texts(calibration: Calibration) -> list[Texts]:
    """Return every source's texts, in the order of datasets' shuffle with the seed.

    Raises CalibrationError where they cannot be had, UsageError for names that are nothing.
    """
    import numpy as np

    loaded = []
    for source in calibration.sources():
        rows = read(source.path, source.field) if source.path else _from_hub(source)
        # the order of datasets.Dataset.shuffle(seed): a test holds the two together
        order = np.random.default_rng(calibration.seed).permutation(rows.count)
        loaded.append(Texts(source, rows, order.tolist()))
    return loaded


def _from_hub(source: Source) -> Rows:
    """A split of a hub data set: from the hub, its cache, or a folder of that name here, as `datasets` finds it."""
    import datasets

    datasets.disable_progress_bars()
    repo, config, revision = source.hub["repo"], source.hub["config"], source.hub["revision"]
    try:
        pinned = _commit(repo, revision) if revision else None
        table = datasets.load_dataset(repo, config, split=source.split, revision=pinned)
    except Exception as error:
        raise _explained(error, source) from error
    field = chosen_field(table.column_names, source.field, source.name)
    if not len(table):
        raise CalibrationError(f"{source.name} has no rows in its split {source.split}.")
    commit = _cached_commit(table)
    if pinned and commit and commit != pinned:  # without the hub, datasets takes what its cache has
        raise CalibrationError(
            f"{source.name} is commit {pinned}, and the cache holds {commit}; run this where there is internet."
        )
    column = table.select_columns([field])
    return Rows(
        len(table),
        lambda i: column[i][field],
        lambda i: f"{source.name}, row {i}",
        {"field": field, "split": source.split, "commit": commit},
    )


def _commit(repo: str, revision: str) -> str:
    """The commit that a revision means now."""
    from huggingface_hub import HfApi

    return revision if COMMIT.fullmatch(revision) else str(HfApi().dataset_info(repo, revision=revision).sha)


def _cached_commit(table: Dataset) -> str | None:
    """The commit that a table was prepared from, which is the name of its folder in the cache."""
    folders = {Path(entry["filename"]).parent.name for entry in table.cache_files}
    commit = folders.pop() if len(folders) == 1 else ""
    return commit if COMMIT.fullmatch(commit) else None


def _explained(error: BaseException, source: Source) -> ProjectError:
    """Return what a failure of `datasets` or the hub means for the user, and what to do."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import errors as hub

    chain, name = list(causes(error)), source.name
    message = " ".join(str(error).split())
    if any(getattr(e, "errno", None) in DISK_FULL for e in chain):
        return CalibrationError(f"No space for the calibration set {name}; set HF_HOME to a folder on a larger disk.")
    if lacking := next((e for e in chain if isinstance(e, ImportError)), None):
        return CalibrationError(f"The calibration set {name} needs a package that is not here ({lacking}).")
    if split := re.search(r"(?:Unknown split|Bad split).*?\[(.*)\]", message):
        return UsageError(
            f"{name} has no split {source.split!r}; give --calibration_split one of {split[1]}, or a part of one "
            "such as train[:1000]."
        )
    if configs := CONFIGS.search(message):
        return UsageError(f"{name}: give one of the configurations {configs[1]} as {source.hub['repo']}:CONFIG.")
    unknown = isinstance(error, DatasetNotFoundError)  # raised without its cause
    if any(isinstance(e, hub.GatedRepoError) for e in chain) or (unknown and "gated" in message):
        return CalibrationError(f"The calibration set {name} is not open to this account: accept its terms on the hub.")
    if any(isinstance(e, hub.RevisionNotFoundError) for e in chain):
        return UsageError(f"{source.hub['repo']} has no revision {source.hub['revision']!r} on the hub.")
    if any(isinstance(e, hub.RepositoryNotFoundError) for e in chain) or unknown:
        return UsageError(
            f"There is no data set {name} on the hub, or it is not open to this account: check the spelling, or run "
            "`hf auth login`."
        )
    return CalibrationError(
        f"The calibration set {name} cannot be read from the hub or its cache ({type(chain[-1]).__name__}: {message}); "
        "pass a local file with --calibration FILE.jsonl (.json, .parquet, .txt), or an importance file with "
        "--importance."
    )
