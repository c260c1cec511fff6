"""Plan of an experiment: which cells there are, what each needs, and where its outputs go. Nothing is run here."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from aim.omegas import omega_folder
from common.errors import UsageError
from common.files.json_values import JsonValue
from eval.results.reader import PAPER, read_results
from scripts.experiments.commands import check_words, command_line, flag_words
from scripts.experiments.schema import Experiment, Flags, Method, Pool, Relaxation, Variant

Axes = Mapping[str, object]
"""What a cell or model is of: replicate, method, omega, ..."""


@dataclass(frozen=True)
class Cell:
    """One command of an experiment.

    Attributes:
        name: Its name, and that of its folder under `cells/`.
        section: Section of the YAML whose script it runs.
        words: Words after the script on the command line.
        needs: Names of the cells that must be done before.
        outputs: Files or folders that exist when it is done.
        weights: Folder of weights that `keep: scores` deletes once the cells that need this one are done.
        axes: What it is a cell of (replicate, method, omega, ...), for the CSV of all cells.
    """

    name: str
    section: str
    words: tuple[str, ...]
    needs: tuple[str, ...] = ()
    outputs: tuple[Path, ...] = ()
    weights: Path | None = None
    axes: Axes = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The command line, as a user types it."""
        return command_line(self.section, list(self.words))


@dataclass(frozen=True)
class Model:
    """A checkpoint that is scored: the axes of its row in the CSV of all cells."""

    path: str
    axes: Axes


@dataclass(frozen=True)
class Replicate:
    """One base with its fine-tuned models: of one pool, one recipe of training and one seed."""

    name: str
    base: str
    models: Mapping[str, str]
    axes: Axes
    family: Path | None = None
    bytes: int | None = None

    @property
    def labels(self) -> dict[str, str]:
        """Model reference: label, for tables."""
        return {self.base: "Base", **{reference: label for label, reference in self.models.items()}}


@dataclass(frozen=True)
class Plan:
    """All cells in the order in which they are run, the replicates, and every model that is scored."""

    experiment: Experiment
    folder: Path
    cells: tuple[Cell, ...]
    replicates: tuple[Replicate, ...]
    models: tuple[Model, ...]
    notes: tuple[str, ...] = ()

    def find(self, name: str) -> Cell:
        """Return a cell by name."""
        return self._by_name[name]

    def users(self, name: str) -> Sequence[Cell]:
        """Return the cells that need a cell."""
        return self._users.get(name, ())

    def is_of_merge(self, cell: Cell) -> bool:
        """Return True for a cell that needs a merge, directly or not."""
        return any(self.find(name).section == "merge" or self.is_of_merge(self.find(name)) for name in cell.needs)

    @cached_property
    def _users(self) -> dict[str, list[Cell]]:
        users: dict[str, list[Cell]] = {}
        for cell in self.cells:
            for name in cell.needs:
                users.setdefault(name, []).append(cell)
        return users

    @cached_property
    def _by_name(self) -> dict[str, Cell]:
        return {cell.name: cell for cell in self.cells}


def plan_experiment(experiment: Experiment, folder: Path) -> Plan:
    """Plan every cell of an experiment whose state and models lie in `folder`.

    Raises UsageError for flags that a script's parser refuses.
    """
    planner = _Planner(experiment, folder)
    cells = tuple(planner.cells())
    for section in dict.fromkeys(cell.section for cell in cells):
        for words in dict.fromkeys(_without_paths(cell.words) for cell in cells if cell.section == section):
            try:
                check_words(section, list(words))
            except UsageError as error:
                raise UsageError(f"{section}: {error}") from error
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"Two cells have the name {twice}; give labels that differ in letters and digits.")
    notes = ["omega 1 leaves a merge as it is: the merge itself stands there."] if 1.0 in experiment.omegas else []
    return Plan(experiment, folder, cells, tuple(planner.replicates()), tuple(planner.models), tuple(notes))


class _Planner:
    def __init__(self, experiment: Experiment, folder: Path) -> None:
        self.experiment, self.folder = experiment, folder
        self.models: list[Model] = []
        self.omegas = tuple(omega for omega in experiment.omegas if omega != 1.0)
        self._replicates = list(self._plan_replicates())

    def replicates(self) -> list[Replicate]:
        """Return the replicates in the order of their cells."""
        return [replicate for replicate, _ in self._replicates]

    def _plan_replicates(self) -> Iterator[tuple[Replicate, Variant | None]]:
        """Yield every pool or trained family with every seed; with deal_seeds, one recipe per seed, in turn."""
        e = self.experiment
        for pool in e.pools:
            variants: tuple[Variant | None, ...] = e.families or (None,)
            if e.deal_seeds:
                seeded = list(zip(e.seeds, itertools.cycle(variants), strict=False))
            else:
                seeded = list(itertools.product(e.seeds, variants))
            for seed, variant in seeded:
                yield self._replicate(pool, variant, seed), variant

    def _replicate(self, pool: Pool, variant: Variant | None, seed: int) -> Replicate:
        e = self.experiment
        seeded = variant is not None or len(e.seeds) > 1
        parts = [pool.name if variant is None else "", variant.label if variant else "", f"s{seed}" if seeded else ""]
        name = "-".join(filter(None, parts)) or "main"
        axes: dict[str, object] = {"replicate": name, "seed": seed}
        if variant is None:
            axes |= {"pool": pool.name} if pool.name else {}
            return Replicate(slug(name), pool.base, pool.models, axes, bytes=pool.bytes)
        family = self.folder / "models" / slug(name) / "family"
        models = {label: str(family / model) for label, model in pool.models.items()}
        varied = {f"family.{key}": variant.flags[key] for key in variant.varied}
        return Replicate(slug(name), str(family / pool.base), models, {**axes, **varied}, family)

    def cells(self) -> Iterator[Cell]:
        """Yield all cells, chain after chain, so that few weights stand on the disk at a time."""
        for replicate, variant in self._replicates:
            yield from self._replicate_cells(replicate, variant)
        if self.experiment.published:
            for result in read_results(PAPER, print)[0]:
                if result.lineage.method is not None:
                    name = f"published__{slug(Path(result.model).name)}"
                    model = Model(result.model, {"replicate": "published"})
                    yield self._score(name, [model], self.experiment.evaluate, ())

    def _replicate_cells(self, r: Replicate, variant: Variant | None) -> Iterator[Cell]:
        e = self.experiment
        needs: tuple[str, ...] = ()
        if variant is not None and r.family is not None:
            words = ("--save_path", str(r.family), *flag_words({"seed": r.axes["seed"], **variant.flags}))
            family = Cell(f"{r.name}__family", "family", words, outputs=(r.family / "family.json",), axes=r.axes)
            needs = (family.name,)
            yield family
        evaluate = _filled(e.evaluate, r)
        for label, reference in {"Base": r.base, **r.models}.items():
            axes = {**r.axes, "model": label}
            yield self._score(f"{r.name}__{slug(label)}__scores", [Model(reference, axes)], evaluate, needs)
        importances = {}
        for relaxation in e.relaxations:
            for calibration in e.calibrations:
                key = (relaxation.statistic, calibration.label)
                if key not in importances:
                    importances[key] = cell = self._importance(r, relaxation.statistic, calibration, needs)
                    yield cell
        for method in e.methods:
            for members in e.combinations_of(list(r.models)):
                yield from self._chain(r, method, members, importances, evaluate, needs)

    def _importance(self, r: Replicate, statistic: str, calibration: Variant, needs: tuple[str, ...]) -> Cell:
        label = "-".join(filter(None, [statistic, calibration.label]))
        file = self.folder / "models" / r.name / f"importance-{label}.safetensors"
        flags = {"importance": str(file), "statistic": statistic, **_filled(calibration.flags, r)}
        words = (r.base, *flag_words(flags))
        return Cell(f"{r.name}__importance-{label}", "calibration", words, needs, (file,), axes=r.axes)

    def _chain(
        self, r: Replicate, method: Method, members: Sequence[str], importances: Mapping[tuple[str, str], Cell],
        evaluate: Flags, needs: tuple[str, ...],
    ) -> Iterator[Cell]:  # fmt: skip
        """Merge, relax in every way, and score each result."""
        e = self.experiment
        members_label = "-".join(map(slug, members))
        chain = f"{r.name}__{method.label}__{members_label}"
        axes = {**r.axes, "method": method.name, "models": " + ".join(members)}
        axes |= {key: method.parameters[key] for key in method.varied}
        place = self.folder / "models" / r.name
        merged = place / "merged" / f"{method.label}___{members_label}"
        flags = {
            "method": method.name, "base_model": r.base, "models_to_merge": [r.models[label] for label in members],
            "save_path": str(merged), "seed": r.axes["seed"], **e.merge, **method.parameters,
        }  # fmt: skip
        merge = Cell(f"{chain}__merge", "merge", tuple(flag_words(flags)), needs, (merged,), merged, axes)
        yield merge
        yield self._score(f"{chain}__merge__scores", [Model(str(merged), axes)], evaluate, (merge.name,))
        for relaxation in e.relaxations if self.omegas else ():
            for calibration in e.calibrations:
                importance = importances[relaxation.statistic, calibration.label]
                yield from self._relaxation(
                    r, relaxation, calibration, importance, merge, chain, place / "relaxed", axes, evaluate
                )

    def _relaxation(
        self, r: Replicate, relaxation: Relaxation, calibration: Variant, importance: Cell, merge: Cell, chain: str,
        place: Path, axes: Axes, evaluate: Flags,
    ) -> Iterator[Cell]:  # fmt: skip
        label = "-".join(filter(None, [relaxation.name, calibration.label]))
        assert merge.weights is not None
        out = place / f"{merge.weights.name}___{label}"
        flags = {
            "merged_model": str(merge.weights), "pretrained_model_name": r.base, "omega": list(self.omegas),
            "importance": str(importance.outputs[0]), "save_path": str(out), **self.experiment.aim,
            **relaxation.flags(),
        }  # fmt: skip
        outputs = tuple(out / omega_folder(omega) for omega in self.omegas) if len(self.omegas) > 1 else (out,)
        varied = {f"calibration.{key}": calibration.flags[key] for key in calibration.varied}
        kind = {
            **axes, "relaxation": relaxation.name, "statistic": relaxation.statistic,
            "normalization": relaxation.name if relaxation.normalization != "max" else "max",
            "control": relaxation.control or "", **varied,
        }  # fmt: skip
        cell = Cell(
            f"{chain}__{label}", "aim", tuple(flag_words(flags)), (merge.name, importance.name), outputs, out, kind
        )
        yield cell
        models = [
            Model(str(folder), {**kind, "omega": omega}) for folder, omega in zip(outputs, self.omegas, strict=True)
        ]
        yield self._score(f"{chain}__{label}__scores", models, evaluate, (cell.name,))

    def _score(self, name: str, models: Sequence[Model], evaluate: Flags, needs: tuple[str, ...]) -> Cell:
        self.models += models
        scores = self.folder / "cells" / name / "scores"
        flags = {"model": [model.path for model in models], "save_path": str(scores), **evaluate}
        return Cell(name, "evaluate", tuple(flag_words(flags)), needs, (scores,), axes=models[0].axes)


def slug(text: str) -> str:
    """Return a text as part of a folder's name."""
    return re.sub(r"[^\w.=-]+", "_", text)


def _filled(flags: Flags, r: Replicate) -> Flags:
    """Flags with {family} and {base} replaced by the replicate's."""

    def fill(value: JsonValue) -> JsonValue:
        if isinstance(value, list):
            return [fill(entry) for entry in value]
        if not isinstance(value, str):
            return value
        if "{family}" in value and r.family is None:
            raise UsageError(f"{value}: {{family}} is of experiments that train a family.")
        return value.replace("{family}", str(r.family)).replace("{base}", r.base)

    return {key: fill(value) for key, value in flags.items()}


def _without_paths(words: tuple[str, ...]) -> tuple[str, ...]:
    """Words with every path or model replaced, so that alike command lines are parsed once."""
    return tuple("x" if "/" in word and not word.startswith("--") else word for word in words)
