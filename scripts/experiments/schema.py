"""The YAML of an experiment: typed, checked key by key, with lists as grids."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from aim.omegas import parse_omegas
from aim.scaling import CONTROLS, NORMALIZATIONS
from aim.statistics import DEFAULT, statistic_names
from common.errors import UsageError, nearest
from common.files.bounded_reading import UnreadableError, read_yaml
from common.files.json_types import Between, Each, ListOf, OneOf
from common.files.json_values import JsonObject, JsonValue
from common.terminal_text import quoted
from common.typed_config import check_known, check_value, read_mapping, shape_of
from merging.recipe.method_registry import find_method

Flags = Mapping[str, JsonValue]
"""Flags of a script by name, without dashes."""

KEYS = {
    "title": "one line on the question that the experiment answers",
    "base": "the base: a folder or hub id, with @REVISION to pin its commit",
    "models": "label: fine-tuned model (a folder or hub id, with @REVISION to pin its commit)",
    "pools": "name: {base, models}; several families of models in one experiment, in place of base and models",
    "family": "flags of scripts/quickstart/family.py, which trains the models; lists are grids",
    "seeds": "seeds of `family`, and of random masks (default: 42)",
    "deal_seeds": "true: each seed trains one recipe of `family`, in turn; false: each trains every recipe (default)",
    "combinations": "all (pairs and all models), pairs, whole (all models), or a list of lists of labels",
    "methods": "merge methods: names, or {method: NAME, parameter: value}; lists are grids",
    "merge": "further flags of merge.py",
    "aim": "omegas, statistics, normalizations, controls, and further flags of performAIM.py; off for none",
    "calibration": "flags of scripts/importance.py about calibration; lists are grids",
    "evaluate": "flags of evaluate_model.py",
    "columns": "task: the name that tables give it",
    "published": "true: also score the paper's published checkpoints, and show the published numbers next to them",
    "keep": "all, or scores: delete merged weights once they are scored (the lock rebuilds them)",
    "jobs": "a number of processes (default: 1), or in_process: every cell in this process, without starting Python",
    "bytes": "size of one model's weights, for --dry_run where headers cannot be read; in pools for each of them",
}
"""Keys of the YAML and their meaning, as docs/experiments.md lists them."""
MANAGED = {
    "merge": ("method", "base_model", "models_to_merge", "save_path", "omega", "importance", "config", "from_lock",
              "dry_run", "json", "resume", "overwrite", "help"),
    "aim": ("merged_model", "pretrained_model_name", "omega", "save_path", "config", "from_lock", "dry_run", "json",
            "importance", "statistic", "normalization", "quantile", "control", "resume", "overwrite", "help"),
    "calibration": ("importance", "statistic", "json", "plot", "push_to_hub", "private", "resume", "help"),
    "evaluate": ("model", "save_path", "rescore", "help"),
    "family": ("save_path", "seed", "overwrite", "help"),
}  # fmt: skip
"""Flags that the runner sets itself, by section."""


Texts = Annotated[Mapping[str, str], Each(str, least=1)]
"""Names with a text each, at least one."""
Bytes = Annotated[float, Between(0, numbers=True, above=True)]


@dataclass(frozen=True)
class Document:
    """The YAML of an experiment; `KEYS` says what its fields mean."""

    title: str | None = None
    base: str | None = None
    models: Texts | None = None
    pools: Annotated[Flags, Each(Any, least=1)] | None = None
    family: Flags | None = None
    seeds: Annotated[tuple[int, ...], ListOf(int, least=1)] = (42,)
    deal_seeds: bool = False
    combinations: Literal["all", "pairs", "whole"] | tuple[tuple[str, ...], ...] = "all"
    methods: Annotated[tuple[str | Flags, ...], ListOf(OneOf((str, Each(Any))), least=1)] = ()
    merge: Flags | None = None
    aim: Literal["off", False] | Flags | None = None
    calibration: Flags | None = None
    evaluate: Flags | None = None
    columns: Mapping[str, str] | None = None
    published: bool = False
    keep: Literal["all", "scores"] = "all"
    jobs: Literal["in_process"] | Annotated[int, Between(1)] = 1
    bytes: Bytes | None = None


@dataclass(frozen=True)
class PoolEntry:
    """An entry of `pools`."""

    base: str
    models: Texts
    bytes: Bytes | None = None


@dataclass(frozen=True)
class QuantileEntry:
    """An entry of `aim.normalizations` that has a quantile."""

    quantile: float


@dataclass(frozen=True)
class AimGrids:
    """Keys of `aim` that are no flags: their lists give variants of AIM, and controls."""

    omegas: Any = 0.4
    statistics: Annotated[tuple[str, ...], ListOf(OneOf(tuple(statistic_names())), least=1)] = (DEFAULT,)
    normalizations: Annotated[
        tuple[str | QuantileEntry, ...], ListOf(OneOf((*NORMALIZATIONS, shape_of(QuantileEntry))), least=1)
    ] = ("max",)
    controls: Annotated[tuple[str, ...], ListOf(OneOf(tuple(CONTROLS)))] = ()


AIM_GRIDS = tuple(entry.name for entry in fields(AimGrids))


@dataclass(frozen=True)
class Relaxation:
    """One way of relaxing: AIM, or a variant or control of it."""

    statistic: str = DEFAULT
    normalization: str = "max"
    quantile: float | None = None
    control: str | None = None

    @property
    def name(self) -> str:
        """A short name for folders and tables: AIM, AIM-rms, uniform, AIM-quantile0.99."""
        parts = [self.control or "AIM"]
        parts += [self.statistic] if self.statistic != DEFAULT else []
        parts += [f"quantile{self.quantile or ''}"] if self.normalization != "max" else []
        return "-".join(parts)

    def flags(self) -> dict[str, str | float]:
        """Return the flags of performAIM.py that are not at their defaults."""
        flags_set: dict[str, str | float] = {"statistic": self.statistic} if self.statistic != DEFAULT else {}
        if self.normalization != "max":
            flags_set["normalization"] = self.normalization
        if self.quantile is not None:
            flags_set["quantile"] = self.quantile
        return flags_set | ({"control": self.control} if self.control else {})


@dataclass(frozen=True)
class Method:
    """One method with one value for each of its parameters; `varied` are those that the YAML has several of."""

    name: str
    parameters: Flags = field(default_factory=dict)
    varied: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The method with what varies: dare_ties-density0.2."""
        return "-".join([self.name, *(f"{key}{_short(self.parameters[key])}" for key in self.varied)])


@dataclass(frozen=True)
class Variant:
    """One choice out of grids of flags: of the calibration, or of the family."""

    flags: Flags
    varied: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Label of the values that vary; empty where none do."""
        return "-".join(f"{key}{_short(self.flags[key])}" for key in self.varied)


@dataclass(frozen=True)
class Pool:
    """A base and the models fine-tuned from it, by label; empty references are those of a family to be trained."""

    name: str
    base: str
    models: Mapping[str, str]
    bytes: int | None = None


@dataclass(frozen=True)
class Experiment:
    """Everything an experiment's YAML says; the fields are its keys."""

    name: str
    title: str
    pools: tuple[Pool, ...]
    families: tuple[Variant, ...]
    seeds: tuple[int, ...]
    deal_seeds: bool
    combinations: str | tuple[tuple[str, ...], ...]
    methods: tuple[Method, ...]
    merge: Flags
    omegas: tuple[float, ...]
    relaxations: tuple[Relaxation, ...]
    aim: Flags
    calibrations: tuple[Variant, ...]
    evaluate: Flags
    columns: Mapping[str, str]
    published: bool
    keep: str
    jobs: int | str

    def combinations_of(self, labels: Sequence[str]) -> list[tuple[str, ...]]:
        """Return the sets of labels that are merged, of a pool with these labels."""
        if not isinstance(self.combinations, str):
            return list(self.combinations)
        whole: list[tuple[str, ...]] = [tuple(labels)]
        pairs: list[tuple[str, ...]] = list(itertools.combinations(labels, 2))
        if self.combinations == "whole" or len(labels) < 3:
            return whole
        return pairs if self.combinations == "pairs" else pairs + whole


FAMILY_MODELS = {"Addition": "addition", "Strings": "strings", "Brackets": "brackets"}
"""Label: folder of each model of a trained family."""


def read_experiment(file: Path) -> Experiment:
    """Read and check an experiment. Raises UsageError naming file and key."""
    try:
        documents = read_yaml(file)
    except UnreadableError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(f"{file} cannot be read ({error.strerror}).") from error
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise UsageError(f"{file} must be one mapping with the keys {', '.join(KEYS)}.")
    try:
        return _experiment(documents[0], file.stem)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error


def _experiment(content: JsonObject, name: str) -> Experiment:
    document = read_mapping(Document, content)
    pools, families = _pools(document)
    aim = document.aim or {}
    aim = {} if isinstance(aim, str) else aim
    grids = read_mapping(AimGrids, {key: aim[key] for key in AIM_GRIDS if key in aim}, where="aim")
    if len(set(document.seeds)) < len(document.seeds):
        raise UsageError(f"seeds must be different whole numbers, found {quoted(list(document.seeds))}.")
    if not isinstance(document.combinations, str):
        labels = tuple(label for pool in pools for label in pool.models)
        check_value(document.combinations, ListOf(ListOf(OneOf(labels), least=1), least=1), where="combinations")
    return Experiment(
        name=name,
        title=document.title or name,
        pools=pools,
        families=families,
        seeds=document.seeds,
        deal_seeds=document.deal_seeds,
        combinations=document.combinations,
        methods=_methods(document.methods),
        merge=_flags("merge", document.merge),
        omegas=parse_omegas(grids.omegas) if aim else (),
        relaxations=_relaxations(grids) if aim else (),
        aim=_flags("aim", {key: value for key, value in aim.items() if key not in AIM_GRIDS}),
        calibrations=_grids("calibration", document.calibration),
        evaluate=_flags("evaluate", document.evaluate),
        columns=document.columns or {},
        published=document.published,
        keep=document.keep,
        jobs=document.jobs,
    )


def _pools(document: Document) -> tuple[tuple[Pool, ...], tuple[Variant, ...]]:
    """Return the pools, and the variants of a family that is trained."""
    sources = [key for key in ("models", "pools", "family") if getattr(document, key) is not None]
    if len(sources) != 1:
        raise UsageError(f"give one of models (with base), pools and family, found {' and '.join(sources) or 'none'}.")
    if sources == ["models"]:
        if document.base is None:
            raise UsageError("base must be a folder or hub id, beside models.")
        return (Pool("", document.base, document.models or {}, _whole(document.bytes)),), ()
    if document.base is not None:
        raise UsageError(
            f"base goes with models; {'a family' if sources == ['family'] else 'each of the pools'} has its own."
        )
    if sources == ["family"]:
        return (Pool("family", "base", FAMILY_MODELS),), _grids("family", document.family)
    entries = {
        name: read_mapping(PoolEntry, entry, where=f"pools.{name}") for name, entry in (document.pools or {}).items()
    }
    return tuple(Pool(str(name), e.base, e.models, _whole(e.bytes)) for name, e in entries.items()), ()


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)


def _methods(entries: Iterable[str | Flags]) -> tuple[Method, ...]:
    methods = []
    for entry in entries:
        content = {"method": entry} if isinstance(entry, str) else dict(entry)
        if not isinstance(content.get("method"), str):
            raise UsageError(f"methods: an entry must be a name or have the key method, found {quoted(entry)}.")
        method = find_method(content.pop("method"))
        check_known(content, method.parameters, f"methods.{method.name}")
        for variant in _combined(content):
            methods.append(Method(method.name, variant.flags, variant.varied))
    labels = [method.label for method in methods]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise UsageError(f"methods: {twice} is given twice.")
    return tuple(methods)


def _relaxations(grids: AimGrids) -> tuple[Relaxation, ...]:
    """Return AIM with every statistic, with every normalization, and every control; each beside the first of others."""
    scales: list[tuple[str, float | None]] = [
        ("quantile", entry.quantile) if isinstance(entry, QuantileEntry) else (entry, None)
        for entry in grids.normalizations
    ]
    first = grids.statistics[0]
    relaxations = [Relaxation(statistic, *scales[0]) for statistic in grids.statistics]
    relaxations += [Relaxation(first, *scale) for scale in scales]
    relaxations += [Relaxation(first, *scales[0], control) for control in grids.controls]
    return tuple(dict.fromkeys(relaxations))


def _grids(section: str, value: Flags | None) -> tuple[Variant, ...]:
    return tuple(_combined(_flags(section, value)))


def _combined(grid: Flags) -> Iterable[Variant]:
    """Every choice of one value for each key; keys with a list of several vary."""
    lists = {key: value if isinstance(value, list) else [value] for key, value in grid.items()}
    for key, values in lists.items():
        if not values:
            raise UsageError(f"{key} is an empty list.")
    varied = tuple(key for key, values in lists.items() if len(values) > 1)
    for choice in itertools.product(*lists.values()):
        yield Variant(dict(zip(lists, choice, strict=True)), varied)


def _flags(section: str, section_flags: Flags | None) -> Flags:
    """Flags of a section's script. Raises UsageError for one that the script has not, or that the runner sets."""
    content = section_flags or {}
    allowed = [flag for flag in script_flags(section) if flag not in MANAGED[section]]
    grids = AIM_GRIDS if section == "aim" else ()
    for key in content:
        if key in MANAGED[section]:
            raise UsageError(f"{section}.{key} is set by the runner; leave it out.")
        if key not in allowed:
            raise UsageError(f"{section} has no key {quoted(key)}.{nearest(str(key), [*allowed, *grids])}")
    return {key: value for key, value in content.items() if value is not None}


def script_flags(section: str) -> list[str]:
    """Return the flags of the script that a section of the YAML is for."""
    from scripts.experiments.commands import parser_of

    return [action.dest for action in parser_of(section)._actions if action.option_strings]


def _short(value: object) -> str:
    """A value for a folder's name: paths by their last part."""
    text = Path(str(value)).name if isinstance(value, str) and "/" in value else str(value)
    return "".join(c if c.isalnum() or c in "._" else "_" for c in text)[:40]
