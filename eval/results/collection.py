"""Several models' results in one small file: scores, lineage, and which items each model has right.

The models of a collection answered the same items, mostly: what was asked is written once, under a number, and each
model's verdicts as a string of digits where they are 0 or 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from console.errors import BadInputError
from eval.results.result import EvalResult, Lineage

COLLECTION = "results_collection"
KEPT = (
    *("preset", "limit", "n_samples", "temperature", "max_gen_toks", "math_max_tokens", "math_prompt_type"),
    *("apply_chat_template", "dtype_used", "device", "backend", "seed"),
)
"""The settings that scores depend on."""


def packed(results: Sequence[EvalResult], names: Mapping[str, str]) -> str:
    """Return the text of a collection, a line per model, so that a change shows as one."""
    asked: list[dict[str, Any]] = []
    entries = [json.dumps(_entry(slim(result), asked), separators=(",", ":")) for result in results]
    lines = ",\n".join(entries)
    items = json.dumps(asked, separators=(",", ":"))
    return f'{{"format":"{COLLECTION}","names":{json.dumps(dict(names))},"asked":{items},"results":[\n{lines}\n]}}\n'


def unpacked(data: Mapping[str, Any], source: str) -> tuple[list[EvalResult], dict[str, str]]:
    """Read what `packed` wrote: results and labels. Raises BadInputError naming `source` for anything else."""
    try:
        asked = data.get("asked", [])
        entries = [
            {**entry, "outcomes": {c: _opened(tasks, asked) for c, tasks in entry.get("outcomes", {}).items()}}
            for entry in data["results"]
        ]
        names = dict(data.get("names", {}))
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise BadInputError(
            f"{source} is a collection of results with a part missing or unknown: {error!r}."
        ) from error
    return [EvalResult.from_json({"aim": entry}, source) for entry in entries], names


def slim(result: EvalResult) -> EvalResult:
    """Keep scores, outcomes, lineage by the models' own names, versions, and the settings that scores depend on."""
    lineage = result.lineage
    names = Lineage(
        lineage.method,
        Path(lineage.base_model).name if lineage.base_model else None,
        tuple(Path(model).name for model in lineage.models),
        lineage.omega,
    )
    settings = {key: result.settings[key] for key in KEPT if key in result.settings}
    model = Path(result.model).name
    return replace(result, model=model, lineage=names, settings=settings, harness={}, hardware={}, seconds={})


def _entry(result: EvalResult, asked: list[dict[str, Any]]) -> dict[str, Any]:
    empty: dict[str, dict[str, Any]] = {"outcomes": {}, "hardware": {}, "seconds": {}}
    entry: dict[str, Any] = {k: v for k, v in result.to_json()["aim"].items() if v is not None and v != empty.get(k)}
    for tasks in entry.get("outcomes", {}).values():
        for task in tasks.values():
            items = {"items": task.pop("items"), "docs": task.pop("docs")}
            if items not in asked:
                asked.append(items)
            task["asked"] = asked.index(items)
            task["verdicts"] = {name: _digits(values) for name, values in task["verdicts"].items()}
    return entry


def _digits(values: Sequence[float]) -> str | list[float]:
    return "".join(str(int(v)) for v in values) if all(v in range(10) for v in values) else list(values)


def _opened(tasks: Mapping[str, Any], asked: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        name: {
            **{key: value for key, value in task.items() if key != "asked"},
            **asked[task["asked"]],
            "verdicts": {n: list(map(float, values)) for n, values in task["verdicts"].items()},
        }
        for name, task in tasks.items()
    }
