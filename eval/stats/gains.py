"""HV gain of each merged model over its population, and how it varies over the items that were drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import UsageError, nearest
from eval.results.conditions import column_differences, listed
from eval.results.rows import Models, Row, Warn
from eval.stats.hypervolume import hv_gain, population_of
from eval.stats.resampling import LEAST_ITEMS, bootstrap, seed_of

if TYPE_CHECKING:
    from eval.stats.resampling import Array

HV = "HV Gain"
Rule = str | Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Measure:
    """Measure of HV gain.

    Attributes:
        population: As in `population_of`.
        reference: The reference point that volumes are measured from, in fractions, one for all benchmarks or by column
            (0 where not named).
        root: The root that is taken of the volume (None: as many as there are columns).
    """

    population: Rule = "merged"
    reference: float | Mapping[str, float] = 0.0
    root: float | None = None

    def corner(self, columns: Sequence[str]) -> list[float]:
        """The corner in the order of the columns."""
        if isinstance(self.reference, int | float):
            return [float(self.reference)] * len(columns)
        return [self.reference.get(column, 0.0) for column in columns]

    def gain(self, x: Sequence[float], population: Sequence[Sequence[float]], columns: Sequence[str]) -> float:
        """The gain of scores in percent, in the order of the columns."""
        return hv_gain(x, population, reference=self.corner(columns), root=self.root)

    def check(self, models: Models) -> None:
        """Raise UsageError for a column or row that the results do not have."""
        if isinstance(self.reference, Mapping):
            for column in self.reference:
                if column not in models.columns:
                    raise UsageError(
                        f"--reference {column}: no result has this benchmark.{nearest(column, models.columns)}"
                    )
                if column not in models.gain_columns:
                    raise UsageError(f"--reference {column}: it has no part in HV gain; {not_counted(models, column)}.")
        if isinstance(self.population, str):
            return
        names_of_rows = {
            name for family in models.families for name in (family.label, *(row.name for row in family.rows))
        }
        for label in self.population:
            if label not in names_of_rows:
                raise UsageError(
                    f"The population file has {label!r}, which no merged row is called.{nearest(label, names_of_rows)}"
                )


@dataclass(frozen=True)
class Gains:
    """By row (its key): the gain, where it can be computed, and the labels of its population, where one is known."""

    values: Mapping[str, float]
    populations: Mapping[str, tuple[str, ...]]


def all_gains(models: Models, measure: Measure, warn: Warn) -> Gains:
    """Compute the gain of each merged model; `warn` receives each reason why one cannot be computed, once."""
    values: dict[str, float] = {}
    populations: dict[str, tuple[str, ...]] = {}
    reported: set[str] = set()

    def once(sentence: str) -> None:
        if sentence not in reported:
            reported.add(sentence)
            warn(sentence)

    columns = models.gain_columns
    if models.families and not columns:
        once("No HV gain: no benchmark's scores are fractions with higher is better.")
    for family in models.families if columns else ():
        for row in family.rows:
            labels = population_of(measure.population, family.label, row.name, family.members)
            if labels is None:
                once(f"No HV gain for {family.label} ({family.method}): no population is known for it.")
                continue
            populations[row.key] = labels
            reason = _unmeasured(row, labels, models)
            if reason:
                once(reason)
                continue
            for sentence in _other_items(row, labels, models):
                once(sentence)
            members = [[member.scores[c] for c in columns] for member in members_of(row, labels, models)]
            values[row.key] = measure.gain([row.scores[c] for c in columns], members, columns)
    return Gains(values, populations)


def members_of(row: Row, labels: Sequence[str], models: Models) -> list[Row]:
    """The rows that the labels of a row's population mean, as far as they are there."""
    return [member for label in labels if (member := models.find(label, row.published)) is not None]


def _unmeasured(row: Row, labels: Sequence[str], models: Models) -> str:
    """Return the reason why the gain of `row` cannot be computed, or an empty string."""
    over = f"HV gain over {', '.join(labels)}"
    for label in labels:
        member = models.find(label, row.published)
        if member is None:
            return f"{over}: no result of {label} was given, so the cell stays '-'."
        missing = [c for c in models.gain_columns if c not in member.scores]
        if missing:
            return f"{over}: {label} has no score for {', '.join(missing)}; the cell stays '-'."
    missing = [c for c in models.gain_columns if c not in row.scores]
    if missing:
        return f"HV gain of {row.model}: no score for {', '.join(missing)}, so the cell stays '-'."
    for member in members_of(row, labels, models):
        for column in models.gain_columns:
            unlike = column_differences(row.result, member.result, column)
            if unlike.keys() - {"items"}:
                return (
                    f"HV gain of {row.model}: {column} of it and of {member.model} do not compare ({listed(unlike)}), "
                    "so the cell stays '-'."
                )
    return ""


def _other_items(row: Row, labels: Sequence[str], models: Models) -> Iterator[str]:
    """Sentences on benchmarks of which a model and a member of its population answered other items."""
    for member in members_of(row, labels, models):
        for column in models.gain_columns:
            items = column_differences(row.result, member.result, column).get("items")
            if items:
                yield (
                    f"HV gain of {row.model}: its {column} and that of {member.model} are of other items "
                    f"({items[0]} and {items[1]}), so the gain has no interval."
                )


def not_counted(models: Models, column: str) -> str:
    """Return why a column has no best score and no part in HV gain."""
    scores = models.scores(column)
    metric = scores[0].metric
    if any(score.higher_is_better is False for score in scores):
        return f"less of {metric} is better"
    if any(not score.is_fraction for score in scores):
        return f"{metric} is no fraction"
    return f"the direction of {metric} (higher or lower is better) is unknown"


def gain_draws(models: Models, gains: Gains, measure: Measure, draws: int, seed: int) -> dict[str, Array]:
    """Return (draws,) gains of each merged row on items drawn with replacement, the same items for its population.

    Left out is a row for which it, or a member of its population, lacks outcomes per item in some column, has fewer
    than `LEAST_ITEMS`, or answered other items than the rest.
    """
    import numpy as np

    rows = {row.key: row for row in models.rows}
    columns = models.gain_columns
    column_draws = [_column_draws(list(rows.values()), column, draws, seed) for column in columns]
    values_by_row: dict[str, Array] = {}
    for key in gains.values:
        taking = [key, *(member.key for member in members_of(rows[key], gains.populations[key], models))]
        groups = [{column[one][0] if one in column else None for one in taking} for column in column_draws]
        if any(len(group) != 1 or None in group for group in groups):
            continue
        scores = np.stack([[column[one][1] for column in column_draws] for one in taking])  # (models, columns, draws)
        points = scores.transpose(2, 0, 1).tolist()
        values_by_row[key] = np.array([measure.gain(point[0], point[1:], columns) for point in points])
    return values_by_row


def _column_draws(rows: Sequence[Row], column: str, draws: int, seed: int) -> dict[str, tuple[int, Array]]:
    """By row (its key): which group of models that answered the same items it belongs to, and (draws,) scores."""
    groups: dict[tuple[tuple[str, int, str], ...], list[Row]] = {}
    for row in rows:
        outcomes = row.result.outcomes.get(column)
        if outcomes is not None and column in row.result.scores and len(outcomes.keys()) >= LEAST_ITEMS:
            groups.setdefault(tuple(row.result.outcomes[column].keys()), []).append(row)
    values_by_row = {}
    for number, group in enumerate(groups.values()):
        terms = [row.result.outcomes[column].terms(row.result.scores[column].metric) for row in group]
        scores = bootstrap(terms, draws, seed_of(seed, column))
        values_by_row.update({row.key: (number, scores[:, at]) for at, row in enumerate(group)})
    return values_by_row
