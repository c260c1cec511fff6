"""Configuration of calibration text: sources, number of texts of each, block size. Nothing is read here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated

from common.errors import UsageError
from common.files.json_types import Between
from common.files.json_values import JsonObject
from common.typed_config import check_fields

PILE = "mit-han-lab/pile-val-backup"
FILES = (".jsonl", ".json", ".parquet", ".txt")
KINDS = f"{', '.join(FILES[:-1])} or {FILES[-1]}"
HUB_SET = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[^@:]+))?(@(?P<revision>[^@]+))?")
MOST_SAMPLES, MOST_TOKENS = 1_000_000, 1 << 24
FLAGS = {"source": "calibration", "split": "calibration_split", "weights": "calibration_weights"}
"""Flags that are not called as the field is."""


@dataclass(frozen=True)
class Source:
    """One source: `pile`, a hub data set `org/name[:config][@revision]`, a local file or a folder of files.

    field: that holds the text; split: of a hub data set; count: texts to keep.
    """

    spec: str
    field: str
    split: str
    count: int

    @property
    def path(self) -> Path | None:
        """The local file or folder, None for the hub's."""
        return local_path(self.spec)

    @property
    def hub(self) -> re.Match[str]:
        """The hub's name in its parts."""
        match = HUB_SET.fullmatch(self.name)
        assert match is not None
        return match

    @property
    def name(self) -> str:
        """The hub's name in full, or the last part of a path: a record is read where the path means nothing."""
        return PILE if self.spec == "pile" else self.path.name if self.path else self.spec


def local_path(name: str) -> Path | None:
    """Return where a source lies here, or None where it is the hub's: pile is, whatever lies here."""
    path = Path(name).expanduser()
    is_path = path.suffix in FILES or name.startswith(("/", ".", "~")) or path.exists()
    return path if name != "pile" and is_path else None


@dataclass(frozen=True)
class Calibration:
    """Texts and block size. Texts longer than a block are dropped; the first n_samples others are used.

    Several sources share n_samples by their weights (None: equally). `text_field` and `split` name one value, or one
    for each source, separated by commas; a split of None is the Pile's validation, and train of any other data set.
    """

    source: str | tuple[str, ...] = "pile"
    n_samples: Annotated[int, Between(1, MOST_SAMPLES)] = 256
    block_size: Annotated[int, Between(1, MOST_TOKENS)] = 512
    seed: Annotated[int, Between(0)] = 42
    text_field: str = "text"
    split: str | None = None
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        names = tuple(self.source) if not isinstance(self.source, str) else split_names(self.source)
        object.__setattr__(self, "source", names[0] if len(names) == 1 else names)
        if self.weights is not None:
            object.__setattr__(self, "weights", tuple(map(float, self.weights)))

    @property
    def names(self) -> tuple[str, ...]:
        """The sources as they were given."""
        return (self.source,) if isinstance(self.source, str) else self.source

    def sources(self) -> tuple[Source, ...]:
        """Return every source with its own field, split and number of texts. Raises UsageError as `check` does."""
        names = self.names
        text_fields = self._each(self.text_field, "text_field")
        splits = [None] * len(names) if self.split is None else self._each(self.split, "calibration_split")
        counts = shares(self.n_samples, self.weights or (1.0,) * len(names))
        values = zip(names, text_fields, splits, counts, strict=True)
        return tuple(Source(n, f, s or ("validation" if n == "pile" else "train"), c) for n, f, s, c in values)

    def _each(self, text: str, flag: str) -> list[str]:
        """One value per source, where one or as many as there are sources are given."""
        values = [value.strip() for value in text.split(",")]
        count = len(self.names)
        if "" in values or len(values) not in (1, count):
            expected = f"one name, or one per source ({count})" if count > 1 else "one name"
            raise UsageError(f"--{flag} must be {expected}, found {text!r}.")
        return values * count if len(values) == 1 else values

    def check(self) -> None:
        """Raise UsageError for counts and weights that cannot be, or sources that are nothing here or on a hub."""
        check_fields(self, {**FLAGS, "seed": "seed of the calibration"})  # two flags: --seed, --calibration_seed
        for name in self.names:
            _check_source(name)
        twice = next((name for i, name in enumerate(self.names) if name in self.names[:i]), None)
        if twice:
            raise UsageError(f"--calibration lists {twice} twice; give it once, with a larger weight.")
        if self.weights is not None:
            self._check_weights(self.weights)
        if self.split is not None and all(local_path(name) for name in self.names):
            raise UsageError("--calibration_split is for hub data sets; name the files of that split instead.")
        for source in self.sources():
            if source.count == 0:
                raise UsageError(f"--calibration {source.spec}: none of {self.n_samples} samples; raise --n_samples.")

    def _check_weights(self, weights: Sequence[float]) -> None:
        text = ",".join(f"{weight:g}" for weight in weights)
        if len(weights) != len(self.names):
            raise UsageError(f"--calibration_weights must be one per source ({len(self.names)}), found {text}.")
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise UsageError(f"--calibration_weights must be positive numbers, found {text}.")

    def lasting(self) -> Calibration:
        """Return the same with local sources as they are found from any folder."""
        paths = [(name, local_path(name)) for name in self.names]
        return replace(self, source=tuple(str(path.resolve()) if path else name for name, path in paths))

    def fitting(self, available: Sequence[int]) -> int:
        """Return the largest n_samples, up to this one, that sources of so many texts give by their weights."""
        weights = self.weights or (1.0,) * len(self.names)

        def fits(count: int) -> bool:
            return all(
                0 < share <= available_texts
                for share, available_texts in zip(shares(count, weights), available, strict=True)
            )

        return next((count for count in range(self.n_samples, 0, -1) if fits(count)), 0)

    def files(self) -> list[Path]:
        """Return the local files and folders that are read."""
        return [path for name in self.names if (path := local_path(name))]

    def recorded(self) -> JsonObject:
        """Return the fields as an account holds them, in JSON's types: sources by their public names."""
        names = [source.name for source in self.sources()]
        weights = None if self.weights is None else list(self.weights)
        return {**asdict(self), "source": names[0] if len(names) == 1 else names, "weights": weights}


def split_names(text: str) -> tuple[str, ...]:
    """Cut a list of sources at its commas; a path that exists is one path, whatever signs are in its name."""
    return (text,) if Path(text).expanduser().exists() else tuple(part.strip() for part in text.split(","))


def shares(count: int, weights: Sequence[float]) -> list[int]:
    """Divide a count in proportion to weights by largest remainder; of equal remainders the earlier goes first."""
    exact = [Fraction(str(weight)) for weight in weights]
    quotas = [count * weight / sum(exact) for weight in exact]
    whole = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: whole[i] - quotas[i])
    for i in by_remainder[: count - sum(whole)]:
        whole[i] += 1
    return whole


def _check_source(name: str) -> None:
    if not name:
        raise UsageError("--calibration has an empty name; give pile, hub data sets or local files, split by commas.")
    path = local_path(name)
    if path is None:
        if name != "pile" and not HUB_SET.fullmatch(name):
            raise UsageError(
                f"--calibration {name} is not a local file; give pile, a hub data set (org/name, "
                f"org/name:config@revision)"
                f" or a local {KINDS} file, or a folder of them."
            )
    elif not path.exists():
        raise UsageError(f"--calibration {name} does not exist.")
    elif path.is_file() and path.suffix not in FILES:
        raise UsageError(f"--calibration {name} must be a {KINDS} file.")


def contradiction(calibration: Calibration, recorded: Mapping[str, object]) -> tuple[str, object, object] | None:
    """Return (flag, recorded value, asked value) of the first setting in which an account differs from what is asked.

    Settings left at their defaults ask for nothing.
    """
    values = calibration.recorded()
    for entry in fields(calibration):
        value, recorded_value = values[entry.name], recorded.get(entry.name)
        if getattr(calibration, entry.name) != entry.default and value != recorded_value:
            return FLAGS.get(entry.name, entry.name), recorded_value, value
    return None
