"""The YAML of an experiment: typed, checked key by key, with lists as grids."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from aim.omegas import parse_omegas
from aim.scaling import CONTROLS, NORMALIZATIONS
from aim.statistics import DEFAULT, statistic_names
from common.errors import UsageError, nearest
from common.files.bounded_reading import UnreadableError, read_yaml
from common.files.json_values import JsonValue
from common.terminal_text import quoted
from merging.recipe.method_registry import find_method

if TYPE_CHECKING:
    from common.files.json_values import JsonObject

T = TypeVar("T")
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
AIM_GRIDS = ("omegas", "statistics", "normalizations", "controls")
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


def _experiment(document: JsonObject, name: str) -> Experiment:
    _check_keys("", document, KEYS)
    pools, families = _pools(document)
    labels = {label for pool in pools for label in pool.models}
    aim = document.get("aim", "off")
    aim = {} if aim in ("off", False, None) else _mapping("aim", aim)
    calibrations = _grids("calibration", document.get("calibration", {}))
    omegas = parse_omegas(aim.get("omegas", 0.4)) if aim else ()
    keep = _one_of("keep", document.get("keep", "all"), ("all", "scores"))
    jobs = document.get("jobs", 1)
    if jobs != "in_process" and (type(jobs) is not int or jobs < 1):
        raise UsageError(f"jobs must be in_process or a number of at least 1, found {quoted(jobs)}.")
    seeds = tuple(_list("seeds", document.get("seeds", [42])))
    if not all(type(seed) is int for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds must be different whole numbers, found {quoted(list(seeds))}.")
    return Experiment(
        name=name,
        title=str(document.get("title", name)),
        pools=pools,
        families=families,
        seeds=seeds,
        deal_seeds=_one_of("deal_seeds", document.get("deal_seeds", False), (True, False)),
        combinations=_combinations(document.get("combinations", "all"), labels),
        methods=_methods(document.get("methods")),
        merge=_flags("merge", document.get("merge", {})),
        omegas=omegas,
        relaxations=_relaxations(aim) if aim else (),
        aim=_flags("aim", {key: value for key, value in aim.items() if key not in AIM_GRIDS}),
        calibrations=calibrations,
        evaluate=_flags("evaluate", document.get("evaluate", {})),
        columns=_texts("columns", document.get("columns", {})),
        published=_one_of("published", document.get("published", False), (True, False)),
        keep=keep,
        jobs=jobs,
    )


def _pools(document: JsonObject) -> tuple[tuple[Pool, ...], tuple[Variant, ...]]:
    """Return the pools, and the variants of a family that is trained."""
    sources = [key for key in ("models", "pools", "family") if key in document]
    if len(sources) != 1:
        raise UsageError(f"give one of models (with base), pools and family, found {' and '.join(sources) or 'none'}.")
    if sources == ["family"]:
        if "base" in document:
            raise UsageError("base goes with models; a family has its own.")
        return (Pool("family", "base", FAMILY_MODELS),), _grids("family", document["family"] or {})
    if sources == ["models"]:
        if not isinstance(document.get("base"), str):
            raise UsageError("base must be a folder or hub id, beside models.")
        return (Pool("", document["base"], _texts("models", document["models"]), _size("bytes", document)),), ()
    if "base" in document:
        raise UsageError("base goes with models; each of the pools has its own.")
    pools = []
    for pool, content in _mapping("pools", document["pools"]).items():
        entry = _mapping(f"pools.{pool}", content)
        _check_keys(f"pools.{pool}.", entry, ("base", "models", "bytes"))
        if not isinstance(entry.get("base"), str):
            raise UsageError(f"pools.{pool}.base must be a folder or hub id.")
        models = _texts(f"pools.{pool}.models", entry.get("models"))
        pools.append(Pool(str(pool), entry["base"], models, _size(f"pools.{pool}.bytes", entry)))
    return tuple(pools), ()


def _methods(value: object) -> tuple[Method, ...]:
    methods = []
    for entry in _list("methods", value):
        content = {"method": entry} if isinstance(entry, str) else dict(_mapping("methods", entry))
        if not isinstance(content.get("method"), str):
            raise UsageError(f"methods: an entry must be a name or have the key method, found {quoted(entry)}.")
        method = find_method(content.pop("method"))
        _check_keys(f"methods.{method.name}.", content, method.parameters)
        for variant in _combined(content):
            methods.append(Method(method.name, variant.flags, variant.varied))
    labels = [method.label for method in methods]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise UsageError(f"methods: {twice} is given twice.")
    return tuple(methods)


def _relaxations(aim: JsonObject) -> tuple[Relaxation, ...]:
    """Return AIM with every statistic, with every normalization, and every control; each beside the first of others."""
    statistics = [
        _one_of("aim.statistics", s, statistic_names()) for s in _list("aim", aim.get("statistics", [DEFAULT]))
    ]
    scales: list[tuple[str, float | None]] = []
    for entry in _list("aim.normalizations", aim.get("normalizations", ["max"])):
        if isinstance(entry, Mapping) and entry.keys() == {"quantile"} and isinstance(entry["quantile"], int | float):
            scales.append(("quantile", float(entry["quantile"])))
        else:
            scales.append((_one_of("aim.normalizations", entry, tuple(NORMALIZATIONS)), None))
    controls = [_one_of("aim.controls", c, tuple(CONTROLS)) for c in _list("aim.controls", aim.get("controls", []))]
    relaxations = [Relaxation(statistic, *scales[0]) for statistic in statistics]
    relaxations += [Relaxation(statistics[0], *scale) for scale in scales]
    relaxations += [Relaxation(statistics[0], *scales[0], control) for control in controls]
    return tuple(dict.fromkeys(relaxations))


def _combinations(value: object, labels: set[str]) -> str | tuple[tuple[str, ...], ...]:
    if isinstance(value, str):
        return _one_of("combinations", value, ("all", "pairs", "whole"))
    combinations = []
    for entry in _list("combinations", value):
        for label in _list("combinations", entry):
            _one_of("combinations", label, tuple(labels))
        combinations.append(tuple(entry))
    return tuple(combinations)


def _grids(section: str, value: object) -> tuple[Variant, ...]:
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


def _flags(section: str, section_flags: object) -> Flags:
    """Flags of a section's script. Raises UsageError for one that the script has not, or that the runner sets."""
    content = _mapping(section, section_flags)
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


def _check_keys(where: str, mapping: JsonObject, allowed: Iterable[str]) -> None:
    for key in mapping:
        if key not in allowed:
            raise UsageError(f"there is no key {quoted(f'{where}{key}')}.{nearest(str(key), allowed)}")


def _mapping(key: str, value: object) -> JsonObject:
    if not isinstance(value, dict):
        raise UsageError(f"{key} must be keys and values, found {quoted(value)}.")
    return value


def _texts(key: str, mapping: object) -> dict[str, str]:
    texts = _mapping(key, mapping)
    wrong = next((name for name, value in texts.items() if not isinstance(value, str)), None)
    if wrong is not None or (not texts and key != "columns"):
        raise UsageError(f"{key} must be names with a text each, found {quoted(mapping)}.")
    return {str(name): value for name, value in texts.items()}


def _size(key: str, mapping: JsonObject) -> int | None:
    value = mapping.get("bytes")
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise UsageError(f"{key} must be a number of bytes, found {quoted(value)}.")
    return int(value)


def _list(key: str, value: object) -> list[JsonValue]:
    if not isinstance(value, list) or not value:
        if key == "aim.controls" and value == []:
            return []
        raise UsageError(f"{key} must be a list, found {quoted(value)}.")
    return value


def _one_of(key: str, value: object, choices: Sequence[T]) -> T:
    if value in choices:
        return choices[choices.index(value)]
    words = [str(k).lower() if isinstance(k, bool) else str(k) for k in choices]
    raise UsageError(f"{key} must be one of {', '.join(words)}, found {quoted(value)}.{nearest(str(value), words)}")


def _short(value: object) -> str:
    """A value for a folder's name: paths by their last part."""
    text = Path(str(value)).name if isinstance(value, str) and "/" in value else str(value)
    return "".join(c if c.isalnum() or c in "._" else "_" for c in text)[:40]
