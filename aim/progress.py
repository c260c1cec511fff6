"""The state of a calibration on the disk, so that an interrupted one goes on from its last saved block."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aim.activations import Sums
from console.cli import say
from console.errors import UsageError

EVERY_SECONDS = 20.0
"""Least time between two savings; and saving takes at most a twentieth of the time."""


@dataclass
class Progress:
    """Where a calibration's state is kept, and when it is saved.

    key: what a run must have in common with the one that goes on with it. `layer` counts finished layers where one is
    run at a time, `done` finished blocks; `hidden` are the hidden states that such a run needs.
    """

    file: Path
    key: str
    resume: bool = False
    quiet: bool = False
    _next: float = field(default_factory=lambda: time.monotonic() + EVERY_SECONDS, repr=False)

    def start(self) -> tuple[Sums, dict[str, Any], dict[str, Tensor]]:
        """Return sums, position and hidden states to go on with (empty for a fresh start).

        Raises UsageError where the interrupted run was another one.
        """
        if not self.file.is_file():
            if self.resume:
                say("There is no interrupted calibration to resume; starting from the beginning.", self.quiet)
            return Sums(), {}, {}
        if not self.resume:
            say("An interrupted calibration is discarded (--resume would have gone on with it).", self.quiet)
            self.clear()
            return Sums(), {}, {}
        tensors, about = _read(self.file)
        if about.get("key") != self.key:
            raise UsageError(
                f"The interrupted calibration in {self.file} had another base, text or settings; start anew without "
                "--resume, or give the command that was interrupted."
            )
        hidden = {name.removeprefix("hidden."): t for name, t in tensors.items() if name.startswith("hidden.")}
        sums = Sums.restored({n: t for n, t in tensors.items() if not n.startswith("hidden.")}, about["axes"])
        position = about["position"]
        told = ", ".join(f"{count} {what} done" for what, count in position.items())
        say(f"Going on with the interrupted calibration: {told}.", self.quiet)
        return sums, position, hidden

    def save(
        self, sums: Sums, position: Mapping[str, int], hidden: Callable[[], Mapping[str, Tensor]] = dict,
        now: bool = False,
    ) -> None:  # fmt: skip
        """Save the state if it is time (or `now`); the file is replaced only by a whole one."""
        started = time.monotonic()
        if not now and started < self._next:
            return
        from safetensors.torch import save_file

        tensors = {**sums.tensors(), **{f"hidden.{name}": tensor for name, tensor in hidden().items()}}
        about = {"key": self.key, "axes": sums.axes, "position": dict(position)}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, self._partial, {"about": json.dumps(about)})
        os.replace(self._partial, self.file)
        took = time.monotonic() - started
        self._next = time.monotonic() + max(EVERY_SECONDS, 20 * took)

    def clear(self) -> None:
        """Forget the state of a calibration that is through, and what a killed saving left."""
        self.file.unlink(missing_ok=True)
        self._partial.unlink(missing_ok=True)

    @property
    def _partial(self) -> Path:
        return self.file.with_name(f"{self.file.name}.partial")


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            about = json.loads((opened.metadata() or {}).get("about", "{}"))
            return {name: torch.clone(opened.get_tensor(name)) for name in opened.keys()}, about  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(
            f"The interrupted calibration in {file} cannot be read ({error}); start without --resume."
        ) from error
