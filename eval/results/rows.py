"""Results -> rows and families: which models there are, their names, and which AIM row relaxes which merge."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from common.errors import UsageError, nearest
from eval.results.result import COLUMNS, PUBLISHED, EvalResult, Lineage, Score

Warn = Callable[[str], None]

METHOD_NAMES = {
    "dare_linear": "DARE Task Arithmetic",
    "dare_ties": "DARE Ties",
    "linear": "Linear",
    "task_arithmetic": "Task Arithmetic",
    "ties": "Ties Merging",
    "widen": "WIDEN",
}
"""Method -> its title in the paper's tables; a method that is not listed keeps its own name."""


@dataclass(frozen=True)
class Row:
    """One model's result under a label; `members` are the labels of the fine-tuned models it was merged from."""

    label: str
    result: EvalResult
    members: tuple[str, ...]

    @property
    def model(self) -> str:
        """Reference of the evaluated model."""
        return self.result.model

    @property
    def lineage(self) -> Lineage:
        """Method, omega and sources of the model."""
        return self.result.lineage

    @cached_property
    def scores(self) -> Mapping[str, float]:
        """Scores in percent by column."""
        return {name: score.value for name, score in self.result.scores.items()}

    @property
    def name(self) -> str:
        """The checkpoint's own name: the last part of its path or hub id."""
        return Path(self.model).name

    @property
    def published(self) -> bool:
        """True where its scores were read off the paper's tables, not measured."""
        return self.result.published

    @property
    def key(self) -> str:
        """Unique key of a row: a measured model and its published scores are two rows."""
        return f"{self.model} ({PUBLISHED})" if self.published else self.model

    @property
    def merged(self) -> bool:
        """True for the result of a merge or a relaxation."""
        return self.lineage.method is not None or self.lineage.omega is not None


@dataclass(frozen=True)
class MergeGroup:
    """One merge and its relaxations.

    Attributes:
        unrelaxed: The merge itself; None where only relaxations have results.
        relaxed: The paper's AIM, by falling omega.
        variants: Controls, and AIM with another statistic or normalization, by name and falling omega.
    """

    method: str
    label: str
    members: tuple[str, ...]
    unrelaxed: Row | None
    relaxed: tuple[Row, ...]
    variants: tuple[Row, ...] = ()

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows of relaxed models."""
        return (*self.curve, *self.variants)

    @property
    def curve(self) -> tuple[Row, ...]:
        """The merge and the paper's AIM: one curve over omega."""
        return self.relaxed if self.unrelaxed is None else (self.unrelaxed, *self.relaxed)

    @property
    def published(self) -> bool:
        """True where any row was published, not measured here."""
        return any(row.published for row in self.rows)


@dataclass(frozen=True)
class Models:
    """All that was read: source models (the base first), families in table order, benchmarks in column order."""

    sources: tuple[Row, ...]
    families: tuple[MergeGroup, ...]
    columns: tuple[str, ...]
    samples: Mapping[str, str] | None = None
    """Where --limit was given for any of them: how many items each benchmark's scores are of, as far as they say."""

    @cached_property
    def gain_columns(self) -> tuple[str, ...]:
        """The columns whose scores are all fractions of which more is better.

        They have a best score and count for HV gain.
        """
        return tuple(column for column in self.columns if all(map(_counts, self.scores(column))))

    def scores(self, column: str) -> list[Score]:
        """The scores of one column."""
        return [row.result.scores[column] for row in self.rows if column in row.result.scores]

    def is_fraction(self, column: str) -> bool:
        """True where all scores of a column are fractions, in percent."""
        return all(score.is_fraction for score in self.scores(column))

    def unit(self, column: str) -> str:
        """The column's name with its unit, for an axis."""
        return f"{column} (%)" if column in self.columns and self.is_fraction(column) else column

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows, source models first."""
        return (*self.sources, *(row for family in self.families for row in family.rows))

    def find(self, label: str, published: bool = False) -> Row | None:
        """The row that a population means by `label`: a source model's label, or the name of a merged checkpoint.

        For a published row only published ones; for one that was measured, measured ones before published ones.
        """
        merged = [(name, row) for family in self.families for row in family.rows for name in (row.name, row.label)]
        named = [*((row.label, row) for row in self.sources), *reversed(merged)]
        matches = [row for name, row in named if name == label and (row.published or not published)]
        return min(matches, key=lambda row: row.published, default=None)


def _counts(score: Score) -> bool:
    return score.is_fraction and score.higher_is_better is True


def assemble(results: Sequence[EvalResult], names: Mapping[str, str], warn: Warn) -> Models:
    """Name the models, pair each AIM row with its merge, and put all in the order of the tables."""
    label_of = _labeller(results, names)
    order = _source_order(results, label_of)
    rows = [
        Row(label_of(result.model), result, tuple(sorted(map(label_of, result.lineage.models), key=order.index)))
        for result in results
    ]
    bases = {label_of(row.lineage.base_model) for row in rows if row.lineage.base_model}
    rank = {label: at for at, label in enumerate(order)}
    sources = sorted(
        (row for row in rows if not row.merged), key=lambda r: (r.label not in bases, rank[r.label], not r.published)
    )
    families = sorted(
        _families([row for row in rows if row.merged], warn),
        key=lambda f: (f.method.lower(), len(f.members), [rank[m] for m in f.members], not f.published, f.label),
    )
    present = dict.fromkeys(name for row in rows for name in row.scores)
    columns = tuple(c for c in COLUMNS if c in present) + tuple(c for c in present if c not in COLUMNS)
    return Models(tuple(sources), tuple(families), columns, _samples(results, columns))


def _samples(results: Sequence[EvalResult], columns: Sequence[str]) -> dict[str, str] | None:
    """Return the numbers of items behind each benchmark's scores, "100 to 200"; None for whole benchmarks."""
    if not any(isinstance(result.settings.get("limit"), int) for result in results):
        return None
    counts = {c: sorted({n for r in results if c in r.scores and (n := r.scores[c].n)}) for c in columns}
    return {c: " to ".join(map(str, dict.fromkeys((n[0], n[-1])))) for c, n in counts.items() if n}


def _families(rows: Sequence[Row], warn: Warn) -> list[MergeGroup]:
    groups: dict[tuple[str, tuple[str, ...], bool], list[Row]] = {}
    for row in rows:
        method = row.lineage.method or "Unrecorded method"
        groups.setdefault((METHOD_NAMES.get(method, method), row.members, row.published), []).append(row)
    families = []
    for (method, members, _), group in groups.items():
        label = " + ".join(members)
        unrelaxed_rows = [row for row in group if row.lineage.omega is None]
        relaxed: dict[str | None, list[Row]] = {unrelaxed.model: [] for unrelaxed in unrelaxed_rows}
        for row in group:
            if row.lineage.omega is not None:
                unrelaxed = _unrelaxed_counterpart(row, unrelaxed_rows)
                if unrelaxed is None:
                    warn(f"{row.model}: no single merge without AIM to compare it with, so no percentages.")
                relaxed.setdefault(unrelaxed.model if unrelaxed else None, []).append(row)
        by_model = {unrelaxed.model: unrelaxed for unrelaxed in unrelaxed_rows}
        for model, aim_rows in relaxed.items():
            row_of_model = by_model.get(model) if model is not None else None
            name = (row_of_model or aim_rows[0]).name
            shown_name = label or name
            if len(relaxed) > 1 and label:
                shown_name = f"{label} ({name})"
            rows = sorted(aim_rows, key=lambda r: (r.lineage.variant, -(r.lineage.omega or 0.0), r.model))
            paper = tuple(row for row in rows if not row.lineage.variant)
            other_rows = tuple(row for row in rows if row.lineage.variant)
            families.append(MergeGroup(method, shown_name, members, row_of_model, paper, other_rows))
    return families


def _unrelaxed_counterpart(row: Row, unrelaxed_rows: Sequence[Row]) -> Row | None:
    """The merge that `row` relaxes: the only one of its models and method, or the one its own name begins with."""
    if len(unrelaxed_rows) > 1:
        unrelaxed_rows = [unrelaxed for unrelaxed in unrelaxed_rows if row.name.startswith(unrelaxed.name)]
        longest = max((len(unrelaxed.name) for unrelaxed in unrelaxed_rows), default=0)
        unrelaxed_rows = [unrelaxed for unrelaxed in unrelaxed_rows if len(unrelaxed.name) == longest]
    return unrelaxed_rows[0] if len(unrelaxed_rows) == 1 else None


def only(models: Models, label: str) -> Models:
    """Keep the merges called `label`, the models they merge, and the base."""
    families = tuple(f for f in models.families if label in (f.label, " + ".join(f.members)))
    if not families:
        labels = list(dict.fromkeys(f.label for f in models.families))
        raise UsageError(
            f"--only {label!r}: the merges are of {'; '.join(labels) or 'no models'}.{nearest(label, labels)}"
        )
    members = {m for f in families for m in f.members}
    members_left_out = {m for f in models.families for m in f.members} - members
    return replace(
        models, families=families, sources=tuple(s for s in models.sources if s.label not in members_left_out)
    )


def model_key(model: str) -> str:
    """One spelling of a path or hub id: `./out/x/` and `out/x` are the same model."""
    return str(Path(model))


def known_names(names: Mapping[str, str], spellings: Collection[str]) -> dict[str, str]:
    """Return model -> label where either may hold an equals sign: `--names` was split at the last one.

    A model that `spellings` does not have is split at an earlier sign that leaves one of them.
    """
    labels = {}
    for model, label in names.items():
        parts = model.split("=")
        heads = ["=".join(parts[:n]) for n in range(len(parts), 0, -1)]
        head = next((h for h in heads if h in spellings or model_key(h) in spellings), model)
        labels[model_key(head)] = f"{model}={label}"[len(head) + 1 :]
    return labels


def _labeller(results: Sequence[EvalResult], names: Mapping[str, str]) -> Callable[[str], str]:
    """Return model -> label: the name given, else the last part of the path, or the whole where two share that part."""
    names = {model_key(model): label for model, label in names.items()}
    paths = {model_key(result.model) for result in results}
    by_last: dict[str, set[str]] = {}
    for path in sorted(paths):
        by_last.setdefault(Path(path).name, set()).add(path)
    mentioned = [m for r in results for m in (r.model, r.lineage.base_model, *r.lineage.models) if m]
    spellings = {s for m in mentioned for s in (model_key(m), Path(m).name)}
    names = known_names(names, spellings)
    unknown = sorted(set(names) - spellings)
    if unknown:
        raise UsageError(f"--names {unknown[0]}: no result or lineage has this model.{nearest(unknown[0], spellings)}")

    def label(model: str) -> str:
        key, last = model_key(model), Path(model).name
        same = by_last.get(last, set())
        if key not in paths and len(same) == 1:  # merged from a folder that was since moved, or another spelling of it
            key = next(iter(same))
        for spelling in (model_key(model), key, last):
            if spelling in names:
                return names[spelling]
        return last if len(same) <= 1 else key

    return label


def _source_order(results: Sequence[EvalResult], label_of: Callable[[str], str]) -> list[str]:
    """Labels in the order of the largest merge's list of models, then of smaller ones', then as they were read."""
    lists = sorted((result.lineage.models for result in results), key=len, reverse=True)
    every = [model for models in lists for model in models] + [result.model for result in results]
    return list(dict.fromkeys(map(label_of, every)))
