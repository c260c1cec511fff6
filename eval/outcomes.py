"""Per-item outcomes of one column: which items, their verdicts, and the score as a function of them. No third party."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.files.json_values import JsonObject

IFEVAL = ("prompt_level_strict_acc", "prompt_level_loose_acc", "inst_level_strict_acc", "inst_level_loose_acc")
INSTRUCTIONS = "instructions"
IFEVAL_MEAN = "mean of 4 accuracies"


@dataclass(frozen=True)
class TaskOutcomes:
    """The items of one task: their numbers, the beginnings of their digests, and each metric's verdict on each.

    A verdict is a number: 1 or 0, a share of samples, or (IFEval's instruction level) how many were followed.
    """

    items: tuple[int, ...]
    docs: tuple[str, ...]
    verdicts: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Outcomes:
    """The items behind one column, task by task.

    `macro` names the metrics whose score is the unweighted mean over tasks, as the file of an lm-eval group may ask
    for; the scores of the others are means over items.
    """

    tasks: Mapping[str, TaskOutcomes] = field(default_factory=dict)
    macro: tuple[str, ...] = ()

    def keys(self) -> list[tuple[str, int, str]]:
        """(task, item, digest of the item) in order; equal keys are the same question of the same data."""
        return [(task, i, d) for task, o in self.tasks.items() for i, d in zip(o.items, o.docs, strict=True)]

    def verdicts(self, metric: str) -> list[float]:
        """One metric's verdicts in the order of `keys`; KeyError where a task lacks it."""
        return [v for o in self.tasks.values() for v in o.verdicts[metric]]

    def terms(self, metric: str) -> list[tuple[list[float], list[float]]]:
        """(numerators, denominators), in the order of `keys`, of the ratios whose mean is the score.

        Score = 100 * mean over terms of sum(w * numerator) / sum(w * denominator), with w = 1, or how often an item was
        drawn. Accuracies have one term with denominators 1, and macro averages one such term per task; IFEval's mean
        has four, two of them per instruction.
        """
        if metric in self.macro:
            return self._task_terms(metric)
        metrics = IFEVAL if metric == IFEVAL_MEAN else (metric,)
        terms = []
        for name in metrics:
            numerators = self.verdicts(name)
            per_instruction = name in IFEVAL and name.startswith("inst")
            terms.append((numerators, self.verdicts(INSTRUCTIONS) if per_instruction else [1.0] * len(numerators)))
        return terms

    def _task_terms(self, metric: str) -> list[tuple[list[float], list[float]]]:
        """Return one term per task, 0 for the items of other tasks."""
        total = sum(len(task.items) for task in self.tasks.values())
        terms, start = [], 0
        for task in self.tasks.values():
            end = start + len(task.items)
            numerators, denominators = [0.0] * total, [0.0] * total
            numerators[start:end] = task.verdicts[metric]
            denominators[start:end] = [1.0] * (end - start)
            if end > start:
                terms.append((numerators, denominators))
            start = end
        return terms

    def score(self, metric: str) -> float:
        """The score in percent that these verdicts give."""
        ratios = [sum(n) / sum(d) for n, d in self.terms(metric)]
        return 100 * sum(ratios) / len(ratios)

    def to_json(self) -> JsonObject:
        """Return the outcome as a results file has it."""
        macro = {"macro": list(self.macro)} if self.macro else {}
        return {
            task: {
                "items": list(o.items),
                "docs": list(o.docs),
                "verdicts": {m: [_short(v) for v in values] for m, values in o.verdicts.items()},
            }
            | macro
            for task, o in self.tasks.items()
        }

    @classmethod
    def from_json(cls, data: JsonObject) -> Outcomes:
        """Read what `to_json` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        tasks = {}
        macro: dict[str, None] = {}
        for task, entry in data.items():
            macro |= dict.fromkeys(entry.get("macro", ()))
            kinds = set(map(type, entry["items"])) | set(map(type, entry["docs"]))
            kinds |= {type(value) for values in entry["verdicts"].values() for value in values}
            if not kinds <= {int, str, float} or not set(map(type, entry["items"])) <= {int}:
                raise TypeError(f"the outcomes of {task} hold other things than numbers and digests")
            verdicts = {name: tuple(map(float, values)) for name, values in entry["verdicts"].items()}
            outcomes = TaskOutcomes(tuple(entry["items"]), tuple(entry["docs"]), verdicts)
            sizes = {len(outcomes.items), len(outcomes.docs), *map(len, verdicts.values())}
            if len(sizes) != 1:
                raise ValueError(f"the outcomes of {task} differ in length")
            tasks[task] = outcomes
        return cls(tasks, tuple(macro))


def per_instruction(verdicts: Sequence[Sequence[bool]]) -> tuple[float, ...]:
    """IFEval's lists of followed or not, as how many were followed."""
    return tuple(float(sum(v)) for v in verdicts)


def _short(value: float) -> float | int:
    return int(value) if value == int(value) else value
