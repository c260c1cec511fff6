"""HV gain: the volume of objective space that a model adds to a population, as one number in the unit of a score.

    HV gain(x; P) = (HV(P ∪ {x}) - HV(P)) ^ (1/d)

d objectives (benchmarks), all maximised, as fractions (score / 100), measured from the origin. With P empty the gain is
the geometric mean of the d scores. This is the formula behind the 'HV Gain' column of the AIM paper's tables
(arXiv:2502.02421), inferred from its 40 published values and 20 percentages, all of which it reproduces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from common.errors import UsageError, nearest
from common.files.bounded_reading import UnreadableError, read_yaml
from common.files.json_values import JsonValue

PAPER_POPULATION: Mapping[frozenset[str], tuple[str, ...]] = MappingProxyType(
    {
        frozenset({"Code", "Math"}): ("Code", "Math"),
        frozenset({"Code", "Instruction Tuned"}): ("Code", "Math"),
        frozenset({"Instruction Tuned", "Math"}): ("Code", "Instruction Tuned"),
        frozenset({"Code", "Instruction Tuned", "Math"}): ("Instruction Tuned", "Math"),
    }
)
"""Models merged -> the population that the paper's published numbers were computed with.

Two of the four are not the models merged, although the original README says so: its Code + Instruction Tuned and
Instruction Tuned + Math rows agree with no other choice among its source models (up to models that change nothing).
"""


def hv_gain(
    x: Sequence[float],
    population: Sequence[Sequence[float]],
    *,
    reference: float | Sequence[float] = 0.0,
    scale: float = 0.01,
    root: float | None = None,
) -> float:
    """Return the `root`-th root of the hypervolume that `x` adds to `population`.

    x (d,) and population (n, d), n >= 0: scores in percent, larger is better; `scale` turns them into fractions.
    `reference`: the corner that volumes are measured from, in fractions: one for all objectives, or d of them.
    `root`: None means d, which makes the gain a score-like number; 1 gives the plain volume.
    Exactly 0 where a member of the population is at least as good as `x` in every objective.
    Raises ValueError for lengths that differ and for scores that are not finite.
    """
    d = len(x)
    if d == 0 or any(len(member) != d for member in population):
        raise ValueError(f"each member of the population needs the {d} scores of x (at least one)")
    if not all(math.isfinite(score) for point in (x, *population) for score in point):
        raise ValueError("scores must be finite numbers")
    corner = [reference] * d if isinstance(reference, int | float) else list(reference)
    if len(corner) != d:
        raise ValueError(f"the reference needs one number, or one for each of the {d} scores of x")
    # Decided on the scores themselves: rounding leaves a difference of volumes near 0, and its root far from 0.
    if any(all(b >= a for b, a in zip(member, x, strict=True)) for member in population):
        return 0.0
    point = [score * scale - low for score, low in zip(x, corner, strict=True)]
    if min(point) <= 0.0:
        return 0.0
    # Only what lies inside the box of x can take volume from it; clipping first avoids subtracting large volumes.
    clipped = [
        [min(score * scale - low, side) for score, low, side in zip(member, corner, point, strict=True)]
        for member in population
    ]
    inside = [member for member in clipped if min(member) > 0.0]
    volume = math.prod(point) - (_hypervolume(inside) if inside else 0.0)
    result: float = max(volume, 0.0) ** (1.0 / (d if root is None else root))
    return result


def _hypervolume(points: Sequence[Sequence[float]]) -> float:
    """Volume dominated by positive points (n, d), measured from the origin."""
    import moocore  # brings numpy; not needed to print a script's help

    return float(moocore.hypervolume(points, ref=0.0, maximise=True))


def population_of(
    rule: str | Mapping[str, Sequence[str]], label: str, name: str, members: Sequence[str]
) -> tuple[str, ...] | None:
    """Return the labels of the models that form the population of one merged model.

    `rule`: "merged" (the models merged), "paper" (the published map), or a map from a row's label, or from the name of
    its checkpoint, to labels. None where nothing is known: a merge without recorded models, a row the map leaves out.
    Raises UsageError where "paper" is asked for models that the paper did not merge.
    """
    if rule == "merged":
        return tuple(members) or None
    if rule == "paper":
        if frozenset(members) not in PAPER_POPULATION:
            raise UsageError(
                f"--population paper holds for the paper's models (Code, Instruction Tuned, Math), not for {label!r}; "
                "use --population merged, name the models with --names, or give a file."
            )
        return PAPER_POPULATION[frozenset(members)]
    if isinstance(rule, str):
        raise ValueError(f"unknown population rule {rule!r}")
    corner = rule.get(name, rule.get(label))
    return None if corner is None else tuple(corner)


def read_rule(value: str) -> str | dict[str, list[str]]:
    """Read `--population`: "merged", "paper", or a YAML or JSON file that maps a row's label to labels of models."""
    if value in ("merged", "paper"):
        return value
    path = Path(value)
    if not path.is_file():
        raise UsageError(
            f"--population {value}: expected merged, paper, or a file.{nearest(value, ('merged', 'paper'))}"
        )
    try:
        documents = read_yaml(path)
    except UnreadableError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).") from error
    rule: JsonValue = documents[0] if len(documents) == 1 else None
    ok = isinstance(rule, dict) and all(
        isinstance(row, str) and isinstance(labels, list) and all(isinstance(label, str) for label in labels)
        for row, labels in rule.items()
    )
    if not ok:
        raise UsageError(f"{path}: expected row labels, each with a list of model labels, such as 'A + B: [A, B]'.")
    labels_by_row: dict[str, list[str]] = rule
    return labels_by_row
