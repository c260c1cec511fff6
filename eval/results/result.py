"""The result of evaluating one model, and its JSON: lm-eval's layout with one key of ours, "aim"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.errors import BadInputError
from common.files.bounded_reading import MAX_RESULTS, MAX_TOKENIZER_VALUES, UnreadableError, read_json
from common.files.json_types import Each, Fields, ListOf, Maybe, check_shape
from common.files.json_values import JsonObject, JsonValue
from eval.outcomes import Outcomes
from eval.results.metrics import NOT_FRACTIONS, direction_of

SCHEMA = 3
READ = (1, 2, 3)
"""Schemas that are read. 1 had no outcomes, digests, hardware and times, which are then empty; 2 had no direction and
scale of scores."""
CIRCUMSTANCES = ("answers", "digest", "commit", "hardware", "seconds", "project_commit")
COLUMNS = ("HumanEval", "MBPP", "MMLU", "MATH", "GSM8K", "IFEval")
"""The paper's six benchmarks, in its tables' order."""
RELAXATION_FIELDS = ("statistic", "normalization", "control")
PUBLISHED = "published"
"""The metric of scores that were read off the paper's tables."""


LINEAGE = Fields(
    {"method": Maybe(str), "base_model": Maybe(str), "models": ListOf(str), "omega": Maybe(float)},
    dict.fromkeys(RELAXATION_FIELDS, Maybe(str)),
)
_SCORE = {"metric": str, "n": Maybe(int), "higher_is_better": Maybe(bool), "is_fraction": bool}
_OPTIONAL_SCORE = {key: shape for key, shape in _SCORE.items() if key != "metric"}
SHAPE = Fields(
    {
        "schema": int, "model": str, "lineage": LINEAGE, "settings": dict, "versions": dict,
        "scores": Each(Fields({"metric": str, "value": Any}, {**_OPTIONAL_SCORE, "beside": Each(Fields(
            {"metric": str, "value": Any}, _OPTIONAL_SCORE))})),
    },
    {
        "outcomes": Each(Each(dict)),
        "answers": Each(Each(Maybe(float))), "digest": Maybe(str), "commit": Maybe(str), "hardware": dict,
        "seconds": Each(float), "project_commit": Maybe(str),
    },
)  # fmt: skip
"""Types under "aim" in a results file. Numbers of scores and outcomes, which may be NaN, are checked on their own."""


@dataclass(frozen=True)
class Score:
    """One number of one benchmark.

    Attributes:
        metric: The metric's name.
        value: The score; in percent where it is a fraction.
        stderr: Its standard error in the unit of `value`; None where there is none.
        n: The number of items.
        beside: Further metrics of the same answers, by name.
        higher_is_better: Whether a higher value is better; None where that is not known.
        is_fraction: Whether `value` is a fraction in percent (an accuracy), rather than a number such as a perplexity.
    """

    metric: str
    value: float
    stderr: float | None = None
    n: int | None = None
    beside: Mapping[str, Score] = field(default_factory=dict)
    higher_is_better: bool | None = True
    is_fraction: bool = True

    @classmethod
    def from_json(cls, data: JsonObject) -> Score:
        """Read what `dataclasses.asdict` made of a score.

        Results without direction and scale (schemas 1 and 2) get those of the metric's name.
        """
        beside = {name: cls.from_json(other) for name, other in data.get("beside", {}).items()}
        metric = str(data["metric"])
        if not isinstance(data.get("stderr"), int | float | None):
            raise ValueError(f"the standard error of {metric} is no number")
        direction = {"higher_is_better": direction_of(metric), "is_fraction": metric not in NOT_FRACTIONS}
        return cls(**{**direction, **data, "beside": beside})


@dataclass(frozen=True)
class Lineage:
    """Lineage of a checkpoint from its run record; `method` is None for a model that was not merged."""

    method: str | None = None
    base_model: str | None = None
    models: tuple[str, ...] = ()
    omega: float | None = None
    statistic: str | None = None
    normalization: str | None = None
    control: str | None = None

    @property
    def variant(self) -> str:
        """Return the difference from the paper's AIM, such as "AIM rms" or "control uniform"; empty for AIM."""
        parts = [part for part in (self.statistic, self.normalization) if part]
        if self.control:
            return " ".join(("control", self.control, *parts))
        return " ".join(("AIM", *parts)) if parts else ""

    def to_json(self) -> JsonObject:
        """Return the fields, without those of the relaxation that are the paper's."""
        return {k: v for k, v in asdict(self).items() if v is not None or k not in RELAXATION_FIELDS}

    @classmethod
    def of_checkpoint(cls, model: str) -> Lineage:
        """Read `run_record.json` in a local checkpoint folder; a checkpoint without one was not merged here."""
        record = Path(model) / "run_record.json"
        if not record.is_file():
            return cls()
        try:
            entry = read_json(record)["lineage"]
            check_shape(entry, LINEAGE, str(record), "lineage")
            relaxation = {name: entry[name] for name in RELAXATION_FIELDS if name in entry}
            return cls(entry["method"], entry["base_model"], tuple(entry["models"]), entry["omega"], **relaxation)
        except (ValueError, KeyError, TypeError) as error:
            raise BadInputError(f"{record} is not a run record of merge.py or performAIM.py ({error}).") from error


@dataclass(frozen=True)
class EvalResult:
    """Scores of one model by benchmark name, with what is needed to trust and repeat them."""

    model: str
    scores: Mapping[str, Score]
    lineage: Lineage = Lineage()
    settings: JsonObject = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    harness: JsonObject = field(default_factory=dict)
    """lm-eval's own result dictionary without samples: results, configs, versions, n-shot, ..."""
    outcomes: Mapping[str, Outcomes] = field(default_factory=dict)
    """Column -> items and verdicts; a column whose metric is not one number per item is absent."""
    answers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Column -> figures of its generated answers (`answer_facts`); a column without generation is absent."""
    digest: str | None = None
    commit: str | None = None
    hardware: JsonObject = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    project_commit: str | None = None

    @property
    def published(self) -> bool:
        """True where its scores were read off the paper's tables, not measured."""
        return any(score.metric == PUBLISHED for score in self.scores.values())

    @property
    def key(self) -> str:
        """One spelling of the model's path or hub id; a published result has another key than a measured one."""
        spelled = str(Path(self.model))
        return f"{spelled} ({PUBLISHED})" if self.published else spelled

    def to_json(self) -> JsonObject:
        """Return lm-eval's dictionary with our part under "aim"."""
        ours = {
            "schema": SCHEMA,
            "model": self.model,
            "digest": self.digest,
            "commit": self.commit,
            "lineage": self.lineage.to_json(),
            "scores": {name: asdict(score) for name, score in self.scores.items()},
            "outcomes": {name: entry.to_json() for name, entry in self.outcomes.items()},
            "answers": {name: dict(facts) for name, facts in self.answers.items()},
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "hardware": dict(self.hardware),
            "seconds": dict(self.seconds),
            "project_commit": self.project_commit,
        }
        return {**self.harness, "aim": ours}

    @classmethod
    def from_json(cls, data: JsonValue, source: str = "results") -> EvalResult:
        """Read what `to_json` wrote. Raises BadInputError naming `source` for anything else."""
        ours = data.get("aim") if isinstance(data, Mapping) else None
        if not isinstance(ours, Mapping) or "schema" not in ours:
            raise BadInputError(f"{source} is not a results file of evaluate_model.py.")
        if ours["schema"] not in READ:
            versions = f"{', '.join(map(str, READ[:-1]))} and {READ[-1]}"
            raise BadInputError(
                f"{source} has schema {ours['schema']!r}, and this version reads {versions}: evaluate the model "
                "again, or use the version that wrote it."
            )
        try:
            check_shape(ours, SHAPE, source)
            lineage = dict(ours["lineage"])
            lineage["models"] = tuple(lineage["models"])
            return cls(
                model=ours["model"],
                scores={name: Score.from_json(score) for name, score in ours["scores"].items()},
                lineage=Lineage(**lineage),
                settings=ours["settings"],
                versions=ours["versions"],
                harness={k: v for k, v in data.items() if k != "aim"},
                outcomes={name: Outcomes.from_json(entry) for name, entry in ours.get("outcomes", {}).items()},
                **{name: ours[name] for name in CIRCUMSTANCES if name in ours},
            )
        except UnreadableError as error:
            raise BadInputError(str(error)) from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise BadInputError(f"{source} is a results file with a part missing or unknown: {error}.") from error

    @classmethod
    def load(cls, path: Path) -> EvalResult:
        """Read a results file. Raises BadInputError for a file that is cut short or of another kind."""
        return cls.from_json(read_json_file(path), str(path))


def read_json_file(path: Path) -> JsonValue:
    """Return the content of a JSON file. Raises BadInputError for a file that is cut short or cannot be read."""
    try:
        return read_json(path, MAX_RESULTS, MAX_TOKENIZER_VALUES)
    except OSError as error:
        raise BadInputError(f"{path} cannot be read ({error.strerror}).") from error
    except UnreadableError as error:
        raise BadInputError(str(error)) from error
