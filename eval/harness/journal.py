"""Journal of a model's answers: one JSON line each, appended when its batch ends, found again by its key.

A run that stops loses at most the batch that was being computed; a line cut short is skipped when read. Several
processes of one run write a file each; of several answers to one request the newest counts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

from common.errors import BadInputError
from common.files.bounded_reading import UnreadableError, parse_json, read_lines
from common.files.json_types import Between, Fields, Maybe, check_shape
from common.files.json_values import JsonObject
from eval.request_types import Answer, Facts, Request

NAME = "generations"
FACTS = tuple(f.name for f in fields(Facts))
ENTRY = Fields(
    {"key": str, "answer": Any, "of": str, "s": Between(0, numbers=True)},
    {"time": float, "task": str, "item": int, "n": int, "tokens": Maybe(Between(0)), "finish": Maybe(str),
     "prompt_truncated": Maybe(bool)},
)  # fmt: skip
"""Types of the keys of a line; a log-likelihood may be infinite, and is checked on its own."""


class Journal:
    """The answers known so far; `folder` None keeps them in memory only. A context manager."""

    def __init__(self, folder: Path | None, rank: int = 0) -> None:
        self._folder = folder
        self._path = folder / (f"{NAME}.jsonl" if not rank else f"{NAME}-{rank}.jsonl") if folder else None
        self._file: int | None = None
        self.answers: dict[str, Answer] = {}
        self.facts: dict[str, Facts] = {}
        self._times: dict[str, float] = {}
        self._places: set[tuple[str, int, int]] = set()
        self.spent: dict[str, float] = {}
        """Seconds that earlier runs spent on each benchmark, as far as they came."""
        self.reread()

    def reread(self) -> None:
        """Read the journals of all processes from the disk."""
        for path in sorted(self._folder.glob(f"{NAME}*.jsonl")) if self._folder and self._folder.is_dir() else ():
            spent = self._read(path)
            for benchmark, seconds in spent.items():  # processes work side by side
                self.spent[benchmark] = max(seconds, self.spent.get(benchmark, 0.0))

    def begin(self, run: JsonObject) -> None:
        """Note which run the following lines are of: model, settings, versions."""
        self._append({"run": dict(run)})

    def add(
        self, request: Request, answer: Answer, benchmark: str = "", seconds: float = 0.0, facts: Facts | None = None
    ) -> None:
        """Keep one answer, known `seconds` after this run began with `benchmark`.

        It is handed to the system when this returns; only a power cut can lose it.
        """
        now = time.time()
        self.answers[request.key], self.facts[request.key] = answer, facts or Facts()
        self._times[request.key] = now
        self._append(
            {
                "key": request.key,
                "task": request.task,
                "item": request.item,
                "n": request.number,
                "of": benchmark,
                "s": round(seconds, 1),
                "time": round(now, 3),
                "answer": answer,
                **(facts or Facts()).to_json(),
            }
        )

    def forget(self) -> None:
        """Take no answer from earlier runs; their lines stay, and newer ones of the same key count."""
        self.answers.clear()
        self.facts.clear()
        self.spent.clear()
        self._places.clear()

    def superseded(self, requests: Iterable[Request]) -> int:
        """Return how many requests have no answer, while an earlier run's item and sample of the same number has one.

        Those answers are of another checkpoint, prompt, setting or version, or of an older format.
        """
        lacking = (r for r in requests if r.key not in self.answers)
        return sum((r.task, r.item, r.number) in self._places for r in lacking)

    def _read(self, path: Path) -> dict[str, float]:
        """Take a file's answers where they are newer; return the seconds of each benchmark, summed over its runs."""
        total: dict[str, float] = {}
        run: dict[str, float] = {}
        good, foreign = 0, None
        try:
            for line in read_lines(path):
                try:
                    entry = parse_json(line, str(path), allow_surrogates=True)
                    if isinstance(entry, dict) and "run" in entry:
                        total, run, good = _sum(total, run), {}, good + 1
                        continue
                    check_shape(entry, ENTRY, str(path))
                    self._take(entry)
                    run[entry["of"]] = max(entry["s"], run.get(entry["of"], 0.0))
                    good += 1
                except (ValueError, KeyError, TypeError, IndexError) as error:
                    text = line.strip(b"\0 \t\r\n")  # a crash of the machine can leave zeros
                    if line.endswith(b"\n") and text and not text.startswith(b"{"):
                        foreign = foreign or f"{path} is not a journal of answers: {line[:60]!r} ({error})."
        except OSError as error:
            raise BadInputError(f"{path} cannot be read ({error.strerror}).") from error
        except UnreadableError as error:
            raise BadInputError(str(error)) from error
        if foreign and not good:  # a line or two of a journal may be broken; a file without any is another's
            raise BadInputError(foreign)
        return _sum(total, run)

    def _take(self, entry: JsonObject) -> None:
        key, answer, written = entry["key"], entry["answer"], float(entry.get("time", 0.0))
        if written < self._times.get(key, 0.0):
            return
        if isinstance(answer, list):
            likelihood, is_greedy = answer
            answer = float(likelihood), bool(is_greedy)
        elif not isinstance(answer, str | float | int):
            raise TypeError(f"an answer of type {type(answer).__name__}")
        self.answers[key] = answer
        self.facts[key] = Facts(**{name: entry.get(name) for name in FACTS})
        self._times[key] = written
        self._places.add((entry.get("task", ""), entry.get("item", -1), entry.get("n", 0)))

    def _append(self, line: JsonObject) -> None:
        if self._path is None:
            return
        text = json.dumps(line, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
        if self._file is None:
            self._file = _open(self._path)
        _write_all(self._file, text + b"\n")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _open(path: Path) -> int:
    """Open for appending, ending a line that an earlier run was stopped in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":
        _write_all(file, b"\n")
    return file


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _sum(total: Mapping[str, float], run: Mapping[str, float]) -> dict[str, float]:
    return {name: total.get(name, 0.0) + run.get(name, 0.0) for name in {**total, **run}}
