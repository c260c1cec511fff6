"""Several models' results in one small file: scores, lineage, and which items each model has right.

The models of a collection answered the same items, mostly: what was asked is written once, under a number, and each
model's verdicts as a string of digits where they are 0 or 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import BadInputError
from eval.results.conditions import RECORDED
from eval.results.result import EvalResult

if TYPE_CHECKING:
    from common.files.json_values import JsonObject

COLLECTION = "results_collection"


def packed(results: Sequence[EvalResult], names: Mapping[str, str]) -> str:
    """Return the text of a collection, a line per model, so that a change shows as one."""
    item_lists: list[JsonObject] = []
    short = shortest_names([result.model for result in results])
    slims = [slim(result, short) for result in results]
    entries = [json.dumps(_entry(result, item_lists), separators=(",", ":")) for result in slims]
    lines = ",\n".join(entries)
    items = json.dumps(item_lists, separators=(",", ":"))
    return f'{{"format":"{COLLECTION}","names":{json.dumps(dict(names))},"asked":{items},"results":[\n{lines}\n]}}\n'


def unpacked(data: JsonObject, source: str) -> tuple[list[EvalResult], dict[str, str]]:
    """Read what `packed` wrote: results and labels. Raises BadInputError naming `source` for anything else."""
    try:
        item_lists = data.get("asked", [])
        entries = [
            {**entry, "outcomes": {c: _opened(tasks, item_lists) for c, tasks in entry.get("outcomes", {}).items()}}
            for entry in data["results"]
        ]
        names = dict(data.get("names", {}))
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise BadInputError(
            f"{source} is a collection of results with a part missing or unknown: {error!r}."
        ) from error
    return [EvalResult.from_json({"aim": entry}, source) for entry in entries], names


def shortest_names(models: Sequence[str]) -> dict[str, str]:
    """Return the last part of each model's path, or as many parts as tell it from the others of that last part."""
    parts = {model: Path(model).parts for model in models}
    names = {}
    for model, path_parts in parts.items():
        other_parts = [other for other in parts.values() if other != path_parts]
        length = next(
            (n for n in range(1, len(path_parts) + 1) if all(o[-n:] != path_parts[-n:] for o in other_parts)),
            len(path_parts),
        )
        names[model] = str(Path(*path_parts[-length:])) if path_parts else model
    return names


def slim(result: EvalResult, short: Mapping[str, str]) -> EvalResult:
    """Keep scores, outcomes, lineage, versions, and the settings that scores depend on.

    `short`: model -> name, for models that have results; others are called by the last part of their path.
    """

    def name(model: str) -> str:
        labels = {str(Path(path)): called for path, called in short.items()}
        return labels.get(str(Path(model)), Path(model).name)

    lineage = result.lineage
    names = replace(
        lineage,
        base_model=name(lineage.base_model) if lineage.base_model else None,
        models=tuple(map(name, lineage.models)),
    )
    settings = {key: result.settings[key] for key in (*RECORDED, "device") if key in result.settings}
    return replace(
        result, model=name(result.model), lineage=names, settings=settings, harness={}, hardware={}, seconds={}
    )


def _entry(result: EvalResult, item_lists: list[JsonObject]) -> JsonObject:
    empty: dict[str, JsonObject] = {"outcomes": {}, "hardware": {}, "seconds": {}}
    entry: JsonObject = {k: v for k, v in result.to_json()["aim"].items() if v is not None and v != empty.get(k)}
    for tasks in entry.get("outcomes", {}).values():
        for task in tasks.values():
            items = {"items": task.pop("items"), "docs": task.pop("docs")}
            if items not in item_lists:
                item_lists.append(items)
            task["asked"] = item_lists.index(items)
            task["verdicts"] = {name: _digits(values) for name, values in task["verdicts"].items()}
    return entry


def _digits(values: Sequence[float]) -> str | list[float]:
    return "".join(str(int(v)) for v in values) if all(v in range(10) for v in values) else list(values)


def _opened(tasks: JsonObject, item_lists: Sequence[JsonObject]) -> JsonObject:
    return {
        name: {
            **{key: value for key, value in task.items() if key != "asked"},
            **item_lists[task["asked"]],
            "verdicts": {n: list(map(float, values)) for n, values in task["verdicts"].items()},
        }
        for name, task in tasks.items()
    }
