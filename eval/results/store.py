"""Results on disk and on the screen: one JSON and the samples of each benchmark, whole or absent, never overwritten."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UsageError
from common.files.paths import write_whole
from common.markup import markdown_text
from eval.results.result import COLUMNS, EvalResult, Score

if TYPE_CHECKING:
    from common.files.json_values import JsonObject


def check_save_path(save_path: Path) -> None:
    """Raise UsageError where results could not be written; creates nothing."""
    place = save_path.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UsageError(f"--save_path {save_path} cannot be written: {place} is not a folder one may write to.")


def folder_name(model: str) -> str:
    """The model's name as a folder name, as lm-eval spells it."""
    return re.sub(r"[\"<>:/|\\?*\[\]]+", "__", model)


def model_folder(save_path: Path, model: str) -> Path:
    """Return the folder of one model's results, samples and journal."""
    return save_path / folder_name(model)


def save(result: EvalResult, samples: Mapping[str, Sequence[JsonObject]], save_path: Path) -> Path:
    """Write `<save_path>/<model>/results_<time>.json` and `samples_<benchmark>_<time>.jsonl`; return the former.

    Samples first and results last, each under another name until whole: a results file always has its samples.
    """
    folder = model_folder(save_path, result.model)
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now().isoformat().replace(":", "-")
    while (folder / f"results_{stamp}.json").exists():
        stamp = datetime.now().isoformat().replace(":", "-")
    target = folder / f"results_{stamp}.json"
    for name, items in samples.items():
        lines = "".join(json.dumps(item, ensure_ascii=False, default=str) + "\n" for item in items)
        _write(samples_file(target, name), lines)
    return _write(target, _text(result.to_json()))


def samples_file(results: Path, task: str) -> Path:
    """The samples of one benchmark beside a results file."""
    safe = re.sub(r"[^\w.-]", "_", task)
    return results.with_name(f"samples_{safe}_{results.stem.removeprefix('results_')}.jsonl")


def _text(data: JsonObject) -> str:
    """Indented JSON, but with the lists of outcomes on a line each."""
    lists: list[str] = []

    def folded(value: object) -> object:
        if isinstance(value, Mapping):
            return {k: folded(v) for k, v in value.items()}
        if isinstance(value, list) and len(value) > 8 and not isinstance(value[0], Mapping | list):
            lists.append(json.dumps(value, ensure_ascii=False, default=str, separators=(",", ":")))
            return f"\0{len(lists) - 1}\0"
        return value

    text = json.dumps(folded(data), indent=2, ensure_ascii=False, default=str)
    return re.sub(r'"\\u0000(\d+)\\u0000"', lambda m: lists[int(m[1])], text) + "\n"


def _write(path: Path, text: str) -> Path:
    """Write a file whole; half a surrogate pair, which UTF-8 cannot hold, as the escape JSON has for it."""
    write_whole(path, text.encode("utf-8", "backslashreplace"))
    return path


def table(results: Sequence[EvalResult]) -> str:
    """The scores as a Markdown table, one row per model, with standard errors, the paper's columns first."""
    present = dict.fromkeys(name for result in results for name in result.scores)
    columns = [c for c in COLUMNS if c in present] + [c for c in present if c not in COLUMNS]
    rows = [["Model", *map(markdown_text, columns)]]
    rows += [[markdown_text(Path(r.model).name), *(_cell(r.scores.get(c)) for c in columns)] for r in results]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns) + 1)]

    def line(row: Sequence[str]) -> str:
        cells = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return f"| {' | '.join(cells)} |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def details(result: EvalResult) -> list[str]:
    """A sentence per column: how many items, which metric, and what is reported beside it."""
    sentences = []
    for name, score in result.scores.items():
        beside = "".join(f"; {other} {_cell(value)}" for other, value in score.beside.items())
        sentences.append(f"{name}: {score.metric} of {score.n if score.n is not None else 'all'} items{beside}")
    return sentences


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    form = ".2f" if score.is_fraction else ".4g"
    return f"{score.value:{form}}" + ("" if not _is_known(score.stderr) else f" ± {score.stderr:{form}}")
