"""The state of a calibration on the disk, so that an interrupted one is resumed after its last saved block."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from aim.capture.statistics import Sums
from common.errors import FailureError, ProjectError, StoppedError, UsageError, causes
from common.files.atomic import written
from common.files.bounded_reading import check_regular, parse_json
from common.files.json_types import Between, Each, Fields, check_shape
from common.files.json_values import JsonObject
from common.files.safetensors_file import write_safetensors
from common.files.work_folder import WorkFolder, claim, claimed, is_work_folder, remove
from common.logging import logger
from common.terminal_text import foreign, quoted

EVERY_SECONDS = 20.0
"""Least time between two savings; and saving takes at most a twentieth of the time."""
STATE = "state.safetensors"
ABOUT = Fields({"key": str, "axes": Each(int), "position": Each(Between(0))})
"""Types in the description of a state."""


@dataclass
class Progress:
    """State of a calibration on the disk, and the times at which it is saved.

    folder: a work folder, which one run has at a time. key: what a run must have in common with the one that resumes
    it. A position counts finished layers ("layers") where one is run at a time, and finished blocks ("blocks"). notes:
    whether an error gets a note on the state, of several ranks by the first alone.
    """

    folder: Path
    key: str
    resume: bool = False
    notes: bool = True
    _next: float = field(default_factory=lambda: time.monotonic() + EVERY_SECONDS, repr=False)
    _work: WorkFolder | None = field(default=None, repr=False)
    _failed: bool = field(default=False, repr=False)

    @property
    def file(self) -> Path:
        """The saved state."""
        return self.folder / STATE

    def start(self, most: Mapping[str, int], names: Collection[str]) -> tuple[Sums, dict[str, int], dict[str, Tensor]]:
        """Return sums, position and hidden states to go on with (empty for a fresh start).

        Args:
            most: What a position of this calibration mode counts, and the most of each.
            names: Parameters of the model.

        Raises:
            UsageError: The interrupted run was another one or had another mode, or its state cannot be used.
            FailureError: Another process is calibrating with this state.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if self._work is None:
            self._work = claim(self.folder, f"the state of a calibration ({self.folder})")
        try:
            return self._restored(most, names)
        except BaseException:
            self._release()
            raise

    def _restored(
        self, most: Mapping[str, int], names: Collection[str]
    ) -> tuple[Sums, dict[str, int], dict[str, Tensor]]:
        if not os.path.lexists(self.file):
            if self.resume:
                logger.info("There is no interrupted calibration to resume; starting from the beginning.")
            return Sums(), {}, {}
        if not self.resume:
            logger.info("An interrupted calibration is discarded (--resume would have continued it).")
            remove(self.file)
            return Sums(), {}, {}
        tensors, about = _read(self.file)
        if about.get("key") != self.key:
            raise UsageError(
                f"The interrupted calibration in {self.folder} had another base, text or settings; start anew without "
                "--resume, or give the command that was interrupted."
            )
        try:
            hidden = {name.removeprefix("hidden."): t for name, t in tensors.items() if name.startswith("hidden.")}
            sums = Sums.restored({n: t for n, t in tensors.items() if not n.startswith("hidden.")}, about["axes"])
            position = {what: int(count) for what, count in about["position"].items()}
            if unknown := sorted(sums.axes.keys() - set(names)):
                raise ValueError(f"the model has no parameter {quoted(unknown[0])}")
        except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise _unreadable(self.file, error) from error
        if position.keys() != most.keys():
            mode = "layerwise" if "layers" in position else "whole"
            raise UsageError(
                f"The interrupted calibration in {self.folder} had --calibration_mode {mode}; give that to resume it, "
                "or start anew without --resume."
            )
        for what, count in position.items():
            if count > most[what]:
                raise _unreadable(self.file, ValueError(f"{count} {what} done of {most[what]}"))
        done = ", ".join(f"{count} {what} done" for what, count in position.items())
        logger.info(f"Resuming the interrupted calibration: {done}.")
        return sums, position, hidden

    def check_hidden(self, hidden: Mapping[str, Tensor], blocks: int, needed: bool) -> None:
        """Raise UsageError where a saved state lacks the hidden states of a number of blocks."""
        states = hidden.get("states")
        if (needed and states is None) or (states is not None and (states.dim() < 2 or len(states) != blocks)):
            held = "none" if states is None else list(states.shape)
            self._release()
            raise _unreadable(self.file, ValueError(f"hidden states of {blocks} blocks are needed, it has {held}"))

    def save(
        self, sums: Sums, position: Mapping[str, int], hidden: Callable[[], Mapping[str, Tensor]] = dict,
        now: bool = False,
    ) -> None:  # fmt: skip
        """Save the state if it is time (or `now`); the file is replaced only by a whole one.

        A state that cannot be saved is reported once, and the calibration goes on.
        """
        started = time.monotonic()
        if not now and started < self._next:
            return
        tensors = {**sums.tensors(), **{f"hidden.{name}": tensor for name, tensor in hidden().items()}}
        about = {"key": self.key, "axes": sums.axes, "position": dict(position)}
        try:
            with written(self.file) as stream:
                write_safetensors(stream, tensors, {"about": json.dumps(about)})
        except (OSError, FailureError) as error:
            if not self._failed:
                reason = getattr(error, "strerror", None) or error
                logger.warning(
                    f"The state of the calibration cannot be saved in {self.file} ({reason}); it goes on, and "
                    "an interruption would lose what came after the last saving."
                )
            self._failed = True
        else:
            self._failed = False
        took = time.monotonic() - started
        self._next = time.monotonic() + max(EVERY_SECONDS, 20 * took)

    def interrupted(
        self, error: BaseException, sums: Sums, position: Mapping[str, int],
        hidden: Callable[[], Mapping[str, Tensor]] = dict,
    ) -> None:  # fmt: skip
        """Save the state of a calibration that ends by an error of the system's or the user's, not of its input."""
        by_system = any(isinstance(cause, OSError | MemoryError) for cause in causes(error))
        if isinstance(error, StoppedError) or not isinstance(error, ProjectError) or by_system:
            self.save(sums, position, hidden, now=True)

    def stop(self, error: BaseException) -> None:
        """End a run that failed: a saved state stays, with a note on the error; without one nothing does."""
        if self._work is None or not self._work.lock.is_valid():
            return
        if not self.file.is_file():
            self.clear()
            return
        if self.notes:
            error.add_note(
                f"The calibration is kept in {self.folder}: the same command with --resume continues from it."
            )
        self._release()

    def clear(self) -> None:
        """Remove the state of a calibration whose result is in its place."""
        if self._work is None:
            return
        try:
            self._work.remove()
        except OSError as error:
            self._work.lock.release()
            logger.warning(f"{self.folder} is no longer needed and cannot be removed ({error.strerror}); remove it.")
        self._work = None

    def _release(self) -> None:
        if self._work is not None:
            self._work.lock.release()
            self._work = None


def remove_state(folder: Path) -> None:
    """Remove the state that a run left which was killed when its importance file was in its place."""
    if is_work_folder(folder):
        with suppress(FailureError, OSError), claimed(folder, str(folder)) as work:
            work.remove()


def _read(file: Path) -> tuple[dict[str, Tensor], JsonObject]:
    from safetensors import SafetensorError, safe_open

    try:
        check_regular(file)
        with safe_open(str(file), framework="pt") as opened:
            about = parse_json((opened.metadata() or {}).get("about", "{}"), f"the description of {STATE}")
            check_shape(about, ABOUT, f"the description of {STATE}")
            return {name: torch.clone(opened.get_tensor(name)) for name in opened.keys()}, about  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: BaseException) -> UsageError:
    reason = foreign(str(error), 200)
    return UsageError(f"The interrupted calibration in {file} cannot be read ({reason}); start without --resume.")
