"""Results in a model card: a section with the table, `model-index` front matter for the hub, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import BadInputError, UsageError, nearest
from common.files.bounded_reading import MAX_YAML, UnreadableError, parse_yaml, read_bytes
from common.files.json_types import Fields, ListOf, Maybe, check_shape
from common.files.paths import write_whole
from common.markup import markdown_text
from eval.report.report import SIGNIFICANT, Line, Report
from eval.report.tables import OVER, markdown_cell, over, pipes
from eval.stats.gains import HV

if TYPE_CHECKING:
    from common.files.json_values import JsonObject

BEGIN, END = "<!-- evaluation by Activation-Informed Merging -->", "<!-- end of evaluation -->"
FRONT = re.compile(r"\A---\r?\n(.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)
INDEX = re.compile(r"^model-index:.*?(?=^[^\s#-][^\n]*:|\Z)", re.DOTALL | re.MULTILINE)
_TEXT = Maybe(str)
_RESULT = Fields({}, {
    "dataset": Maybe(Fields({}, {"type": _TEXT, "config": _TEXT, "split": _TEXT})),
    "metrics": Maybe(ListOf(Fields({}, {"type": _TEXT}))),
})  # fmt: skip
MODEL_INDEX = ListOf(Fields({}, {"results": Maybe(ListOf(_RESULT))}))
"""Types of the keys by which two results of a card are told to be the same."""
DATASETS: Mapping[str, tuple[str, str, str, str | None]] = {
    "HumanEval": ("pass@1", "openai/openai_humaneval", "test", None),
    "MBPP": ("pass@1", "google-research-datasets/mbpp", "test", "full"),
    "MMLU": ("accuracy", "cais/mmlu", "test", "all"),
    "MATH": ("accuracy", "EleutherAI/hendrycks_math", "test", None),
    "GSM8K": ("accuracy", "openai/gsm8k", "test", "main"),
    "IFEval": ("accuracy", "google/IFEval", "train", None),
    "MMLU-Pro": ("accuracy", "TIGER-Lab/MMLU-Pro", "test", None),
}
"""Column -> the hub's name for the kind of metric, the data set, its split and configuration."""


@dataclass(frozen=True)
class Updated:
    """A card that was written, and whose results it has now."""

    path: Path
    model: str


def update_card(card: Path, model: str | None, report: Report, intervals: bool = False) -> Updated:
    """Write the results of one model of the report into its card; again gives the same bytes.

    `card` is a folder or a README.md (made where it is missing), `model` a label, name or path; by default the model
    whose folder the card lies in. Raises UsageError where that is not one model of the report, or a published one,
    BadInputError for a card whose front matter is no YAML.
    """
    path = card / "README.md" if card.is_dir() or not card.suffix else card
    if not path.parent.is_dir():
        raise UsageError(f"--update_card {card}: there is no folder {path.parent}.")
    line = _line(path, model, report)
    try:
        before = read_bytes(path, MAX_YAML).decode("utf-8") if path.exists() else f"# {markdown_text(line.row.name)}\n"
    except UnicodeDecodeError as error:
        raise BadInputError(f"{path} is not UTF-8 text ({error}).") from error
    except UnreadableError as error:
        raise BadInputError(str(error)) from error
    write_whole(path, updated(before, line, report, intervals, str(path)).encode("utf-8"))
    return Updated(path, line.row.model)


def _line(path: Path, model: str | None, report: Report) -> Line:
    lines = [line for line in report.lines if not line.row.published]
    if model is not None:
        matches = [line for line in lines if model in (line.row.model, line.row.name, line.row.label)]
        flag = f"--card_model {model}"
    else:
        folder = path.parent.resolve()
        matches = [line for line in lines if Path(line.row.model).resolve() == folder]
        matches = matches or [line for line in lines if line.row.name == folder.name]
        flag = f"--update_card {path}"
    if len(matches) == 1:
        return matches[0]
    names = [line.row.name for line in lines]
    hint = (
        nearest(model, names) if model else f" Choose one with --card_model: {', '.join(names) or 'none was measured'}."
    )
    raise UsageError(f"{flag}: {len(matches) or 'no'} models of these results match.{hint}")


def updated(text: str, line: Line, report: Report, intervals: bool, source: str) -> str:
    """The card's text with the section and the front matter of `line`. Raises BadInputError naming `source`."""
    import yaml

    match = FRONT.match(text)
    front, body = (match[1], text[match.end() :]) if match else ("", text)
    front_matter = _read(front, source)
    index = _index(line, report.columns, front_matter.get("model-index"))
    rest = INDEX.sub("", front)
    dumped = yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True)
    new_front_matter = (rest.rstrip("\n") + "\n" if rest.strip() else "") + dumped
    if {k: v for k, v in _read(new_front_matter, source).items() if k != "model-index"} != {
        k: v for k, v in front_matter.items() if k != "model-index"
    }:
        raise BadInputError(f"{source}: its front matter is written in a way that results cannot be added to.")
    section = f"{BEGIN}\n\n{_section(line, report, intervals)}\n\n{END}"
    begin = body.find(BEGIN)
    end = body.find(END, begin)
    if 0 <= begin <= end:
        after = body[end + len(END) :].lstrip("\n")
        body = f"{body[:begin].rstrip()}\n\n{section}\n" + (f"\n{after}" if after else "")
    else:
        body = f"{body.rstrip()}\n\n{section}\n"
    return f"---\n{new_front_matter}---\n{body if body.startswith(chr(10)) or match else chr(10) + body}"


def _read(front: str, source: str) -> JsonObject:
    try:
        documents = parse_yaml(front, f"The front matter of {source}")
        content = (documents[0] if documents else None) or {}
        if len(documents) > 1 or not isinstance(content, dict):
            raise BadInputError(f"{source}: its front matter should hold keys and values.")
        if isinstance(content.get("model-index"), list):
            check_shape(content["model-index"], MODEL_INDEX, f"The front matter of {source}", "model-index")
    except UnreadableError as error:
        raise BadInputError(str(error)) from error
    return content


def _section(line: Line, report: Report, intervals: bool) -> str:
    """The model, the merge that it relaxes or its relaxations, and the models merged, as one table; how it was run."""
    family = [other for other in report.lines if other.method == line.method and other.label == line.label != "-"]
    family = family if line.method != "-" else []
    members = [other for other in report.lines if other.method == "-" and other.label in line.row.members]
    merged = line.method != "-"
    columns = [*map(markdown_text, report.columns), *([HV, OVER] if merged else [])]
    rows = []
    for other in [line, *(o for o in family if o is not line), *members]:
        name = markdown_text(other.row.name)
        name = f"**{name}**" if other is line else f"{name} ({_kind(other)})"
        cells = [markdown_cell(cell, intervals, bold=False) for cell in other.cells]
        population = "-" if over(other) == "-" else markdown_text(over(other))
        rows.append([name, *(cells if merged else cells[:-1]), *([population] if merged else [])])
    parts = ["## Evaluation", pipes(["Model", *columns], rows), _how(line)]
    notes = [
        n for n in report.note.split("\n\n") if merged and (n.startswith(HV) or (n.startswith(SIGNIFICANT) and family))
    ]
    return "\n\n".join([*parts, *notes])


def _kind(line: Line) -> str:
    if line.method == "-":
        return "merged in it"
    omega = line.row.lineage.omega
    return "without AIM" if omega is None else f"{line.row.lineage.variant or 'AIM'} at omega {omega:g}"


def _how(line: Line) -> str:
    """One sentence on the settings and versions that the scores depend on."""
    result = line.row.result
    settings = result.settings
    phrases = [f"preset {settings['preset']}"] if settings.get("preset") else []
    phrases += [f"at most {settings['limit']} items of a benchmark"] if settings.get("limit") else ["whole benchmarks"]
    phrases += ["chat template"] if settings.get("apply_chat_template") else ["no chat template"]
    phrases += [str(settings["dtype_used"])] if settings.get("dtype_used") else []
    used = [f"{name.replace('_', '-')} {result.versions[name]}" for name in _VERSIONS if name in result.versions]
    other = [f"{column} as {score.metric}" for column, score in result.scores.items() if not score.is_fraction]
    units = f"percent, {', '.join(other)}" if other else "percent"
    return markdown_text(f"Scores in {units} ({', '.join(phrases)}{'; ' + ', '.join(used) if used else ''}).")


def _kind_of(metric: str) -> str:
    """The hub's name for a metric: accuracies by that name, others by their own."""
    return "accuracy" if metric in ("acc", "acc_norm", "exact_match", "accuracy") else metric


_VERSIONS = ("lm_eval", "transformers", "torch", "vllm", "project", "commit")


def _index(line: Line, columns: Sequence[str], old: object) -> list[JsonObject]:
    """The `model-index`: this result's entries, and what other entries the card had."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    entries = []
    intervals = {column: cell.interval for column, cell in zip(columns, line.cells, strict=False)}
    for column, score in line.row.result.scores.items():
        kind, dataset, split, config = DATASETS.get(column, (_kind_of(score.metric), column, None, None))
        args: JsonObject = {"n": score.n} if score.n else {}
        args |= {"stderr": round(score.stderr, 4)} if score.stderr is not None and isfinite(score.stderr) else {}
        interval = intervals.get(column)
        args |= {"ci95": [round(end, 4) for end in interval]} if interval else {}
        for name, one, more in ((score.metric, score, args), *((n, other, {}) for n, other in score.beside.items())):
            entries.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=dataset,
                    dataset_name=column,
                    dataset_split=split,
                    dataset_config=config,
                    metric_type=kind,
                    metric_name=name,
                    metric_value=round(one.value, 4),
                    metric_args=more or None,
                    verified=False,
                )
            )
    index: list[JsonObject] = eval_results_to_model_index(line.row.name, entries)
    identities = {_identity(entry) for entry in index[0]["results"]}
    other_entries = [
        entry
        for model in (old if isinstance(old, list) else [])
        for entry in (model.get("results") or [] if isinstance(model, dict) else [])
        if _identity(entry) not in identities
    ]
    index[0]["results"] += other_entries
    return index


def _identity(entry: JsonObject) -> tuple[str | None, str | None, str | None, frozenset[str | None]]:
    """Return the key by which two entries are the same result: data set, split and metrics."""
    dataset = entry.get("dataset") or {}
    kinds = frozenset(metric.get("type") for metric in entry.get("metrics") or [])
    return dataset.get("type"), dataset.get("config"), dataset.get("split"), kinds
