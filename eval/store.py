"""Results on disk and on the screen: one JSON and the samples of each benchmark, whole or absent, never overwritten."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from console.errors import UsageError
from eval.result import EvalResult


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


def save(result: EvalResult, samples: Mapping[str, Sequence[Mapping[str, Any]]], save_path: Path) -> Path:
    """Write `<save_path>/<model>/results_<time>.json` and `samples_<benchmark>_<time>.jsonl`; return the former.

    Samples first and results last, each under another name until whole: a results file always has its samples.
    """
    folder = save_path / folder_name(result.model)
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now().isoformat().replace(":", "-")
    while (folder / f"results_{stamp}.json").exists():
        stamp = datetime.now().isoformat().replace(":", "-")
    for name, items in samples.items():
        lines = "".join(json.dumps(item, ensure_ascii=False, default=str) + "\n" for item in items)
        safe = re.sub(r"[^\w.-]", "_", name)
        _write(folder / f"samples_{safe}_{stamp}.jsonl", lines)
    text = json.dumps(result.to_json(), indent=2, ensure_ascii=False, default=str)
    return _write(folder / f"results_{stamp}.json", text + "\n")


def _write(path: Path, text: str) -> Path:
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def table(result: EvalResult) -> str:
    """The scores as a Markdown table, one row per benchmark."""
    rows = [("benchmark", "score", "stderr", "n", "metric")]
    for name, score in result.scores.items():
        stderr = "" if score.stderr is None else f"{score.stderr:.2f}"
        rows.append((name, f"{score.value:.2f}", stderr, "" if score.n is None else str(score.n), score.metric))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]

    def line(row: Sequence[str]) -> str:
        cells = [c.rjust(w) if 0 < i < 4 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return f"| {' | '.join(cells)} |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if 0 < i < 4 else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])
