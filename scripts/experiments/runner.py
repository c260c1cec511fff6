"""Execution of a plan: cell after cell, several processes at a time, or all in this process."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

from tqdm import tqdm

from common.cli import run
from common.errors import UsageError
from common.files.locks import HeldError, Lock
from scripts.experiments.commands import script_functions, script_path
from scripts.experiments.plan import Cell, Plan
from scripts.experiments.state import LOG, State, Status, clear_partial, missing_outputs
from scripts.experiments.weights import delete_scored

RESUMABLE = ("merge", "aim", "calibration")
"""Sections whose scripts have --resume."""
WHOLE = ("merge", "aim", "family")
"""Sections whose outputs appear only once they are complete."""
FAILED = ("failed", "skipped")
ENDED = ("done", *FAILED)
POLL_SECONDS = 0.1
HELD_SECONDS = 2.0
"""Seconds until a cell that another process runs is looked at again."""


Execute: TypeAlias = Callable[[Cell, Lock, list[str], Path, int | None], int]
"""Runs a cell with these words, its output into that log, on that GPU; returns the exit code."""


class Runner:
    """Runs the cells of a plan that are not done, each once, in an order in which everything a cell needs is done."""

    def __init__(self, plan: Plan, state: State, quiet: bool = False) -> None:
        self.plan, self.state, self.quiet = plan, state, quiet
        self._busy: set[str] = set()
        self._held: dict[str, float] = {}
        self._lock = threading.Lock()
        self._children: set[subprocess.Popen[bytes]] = set()
        self._stopping = False
        self._bar: Any = None
        self._statuses = {cell.name: state.status(cell) for cell in plan.cells}

    def run(self, cells: Collection[str], jobs: int | str, gpus: int = 0) -> int:
        """Run the named cells and what they need; returns the number of cells that failed or were skipped.

        Args:
            cells: Names of cells.
            jobs: A number of processes at a time, or "in_process".
            gpus: GPUs of the machine; each process sees one, in turn.
        """
        wanted = self._with_needs(cells)
        unfinished = [cell for cell in self.plan.cells if cell.name in wanted and self._state(cell) != "done"]
        for cell in unfinished:
            if self._state(cell) in FAILED:
                self._set(cell, Status())
        self._bar = tqdm(
            total=len(wanted), initial=len(wanted) - len(unfinished), unit="cell", disable=self.quiet or None
        )
        try:
            if jobs == "in_process":
                self._work(unfinished, in_process, 0)
            else:
                self._with_threads(unfinished, int(jobs), gpus)
        finally:
            self._stopping = True
            for child in list(self._children):
                child.terminate()
            for child in list(self._children):
                child.wait()
            self._bar.close()
        return sum(self._state(cell) in FAILED for cell in self.plan.cells if cell.name in wanted)

    def _with_needs(self, names: Collection[str]) -> set[str]:
        """The cells, and what they need that is not done, or whose outputs are needed again."""
        wanted: set[str] = set()

        def add(name: str) -> None:
            if name in wanted:
                return
            wanted.add(name)
            for need in self.plan.find(name).needs:
                add(need)

        for name in names:
            add(name)
        for cell in self.plan.cells:
            if cell.name in wanted and self._state(cell) == "done" and self._is_needed_again(cell, wanted):
                self._set(cell, Status())
        return wanted

    def _is_needed_again(self, cell: Cell, wanted: set[str]) -> bool:
        """True for a cell whose deleted weights another cell needs that is not done."""
        users = [user for user in self.plan.users(cell.name) if user.name in wanted]
        return any(self._state(user) != "done" for user in users) and bool(missing_outputs(cell))

    def _with_threads(self, cells: list[Cell], jobs: int, gpus: int) -> None:
        errors: list[BaseException] = []

        def work(number: int) -> None:
            try:
                self._work(cells, self._in_child, number % gpus if gpus else None)
            except BaseException as error:
                errors.append(error)
                self._stopping = True

        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(POLL_SECONDS)
        if errors:
            raise errors[0]

    def _work(self, cells: list[Cell], execute: Execute, gpu: int | None) -> None:
        """Run cells until there are no more that this worker could run."""
        while not self._stopping:
            cell, is_waiting = self._next(cells)
            if cell is None:
                if not is_waiting:
                    return
                time.sleep(POLL_SECONDS)
                continue
            try:
                with self.state.claimed(cell) as lock:
                    self._statuses[cell.name] = self.state.status(cell)  # another process may have run it meanwhile
                    if self._state(cell) not in ("done", "failed"):
                        self._run(cell, lock, execute, gpu)
                    self._finished(cell)
            except HeldError:  # another runner of this experiment has it
                self._held[cell.name] = time.monotonic() + HELD_SECONDS
            finally:
                with self._lock:
                    self._busy.discard(cell.name)

    def _next(self, cells: list[Cell]) -> tuple[Cell | None, bool]:
        """Take the first cell whose needs are done; the flag tells whether to wait where there is none."""
        with self._lock:
            cells[:] = [cell for cell in cells if self._state(cell) not in ENDED]
            now = time.monotonic()
            for cell in cells:
                if cell.name in self._busy or self._held.get(cell.name, 0.0) > now:
                    continue
                needs = {need: self._statuses[need].state for need in cell.needs}
                culprit = next((need for need, state in needs.items() if state in FAILED), None)
                if culprit is not None:
                    self._set(cell, Status("skipped", sentence=f"it needs {culprit}, which failed"))
                    self._finished(cell)
                elif all(state == "done" for state in needs.values()):
                    self._busy.add(cell.name)
                    return cell, True
            return None, any(self._state(cell) not in ENDED for cell in cells)

    def _run(self, cell: Cell, lock: Lock, execute: Execute, gpu: int | None) -> None:
        """Run one cell and record how it ended."""
        interrupted = self._state(cell) == "running"
        if interrupted:
            clear_partial(cell, self.plan.folder)
        started = time.monotonic()
        log = self.state.cell_folder(cell) / LOG
        code = 0
        if not (interrupted and cell.section in WHOLE and not missing_outputs(cell)):
            self.state.begin(cell)
            words = [*cell.words, *(["--resume"] if interrupted and cell.section in RESUMABLE else [])]
            offset = log.stat().st_size if log.is_file() else 0
            code = execute(cell, lock, words, log, gpu)
            if self._stopping and code != 0:
                return  # the cell stays interrupted
            sentence = _last_error(log, offset) if code != 0 else None
        took = round(time.monotonic() - started, 3)
        if code != 0:
            self._set(cell, Status("failed", took, sentence or f"it ended with exit code {code}"))
            return
        self.state.keep_locks(cell)
        self._set(cell, Status("done", took))
        if self.plan.experiment.keep == "scores":
            delete_scored(self.plan, self.state, cell)

    def _finished(self, cell: Cell) -> None:
        """Print one line for a finished cell and move the bar."""
        status = self._statuses[cell.name]
        if self._bar is None or status.state not in ENDED:
            return
        took = f" ({status.seconds:.1f} s)" if status.seconds is not None else ""
        if not self.quiet:
            self._bar.write(f"{status.state}: {cell.name}{took}{f': {status.sentence}' if status.sentence else ''}",
                            file=sys.stderr)  # fmt: skip
        self._bar.update()

    def _in_child(self, cell: Cell, lock: Lock, words: list[str], log: Path, gpu: int | None) -> int:
        """Run a cell in a process of its own, which holds the cell's lock as well: it may outlive this one."""
        environment = dict(os.environ)
        if gpu is not None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
        with log.open("ab") as stream:
            child = subprocess.Popen(
                [sys.executable, script_path(cell.section), *words],
                stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=environment,
                pass_fds=(lock.descriptor,),
            )  # fmt: skip
            self._children.add(child)
            try:
                return child.wait()
            finally:
                self._children.discard(child)

    def _state(self, cell: Cell) -> str:
        return self._statuses[cell.name].state

    def _set(self, cell: Cell, status: Status) -> None:
        self._statuses[cell.name] = status
        self.state.write(cell, status)


def in_process(cell: Cell, _lock: Lock, words: list[str], log: Path, _gpu: int | None) -> int:
    """Run a cell in this process; its output goes to the log. Raises what stops this process, such as Ctrl-C."""
    stream = io.TextIOWrapper(log.open("ab"), encoding="utf-8", write_through=True)
    with contextlib.closing(stream), contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        code = run(script_functions(cell.section)["main"], words)
    _keep_imports(cell.section)
    if code >= 128:
        raise KeyboardInterrupt
    return code


@functools.cache
def _keep_imports(_section: str) -> None:
    """Exclude the objects that the first cell of a section imported from garbage collection, which runs per model."""
    gc.collect()
    gc.freeze()


def _last_error(log: Path, offset: int) -> str | None:
    """Return the last error sentence that a script wrote into its log after an offset."""
    with log.open("rb") as stream:
        stream.seek(offset)
        lines = stream.read().decode("utf-8", "replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ")[:500] if errors else None


def matching(plan: Plan, pattern: str | None) -> list[str]:
    """Return the names of the cells that match a pattern, or the beginning of whose names does.

    Raises UsageError where there are none.
    """
    names = [cell.name for cell in plan.cells]
    if pattern is None:
        return names
    selected = [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}__*")]
    if not selected:
        raise UsageError(f"--only {pattern}: no cell has such a name; the first is {names[0]}.")
    return selected


def visible_gpus(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of GPUs that this process may use, without loading torch."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return len([part for part in environment["CUDA_VISIBLE_DEVICES"].split(",") if part.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))
