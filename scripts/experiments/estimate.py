"""Disk and time of a plan, from the headers of the models' weights and from cells that are done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean

from common.errors import ProjectError
from scripts.experiments.plan import Plan
from scripts.experiments.state import State

BYTES_PER_SECOND = 1e9
"""Rate of reading and writing that the time of a merge is estimated with: a fast disk, not a network."""


@dataclass(frozen=True)
class Estimate:
    """Disk and time of a plan.

    Attributes:
        cells: Number of cells by section.
        disk: Largest number of bytes of merged weights at a time; None where a model's size is unknown.
        read, written: Bytes of weights that merges and relaxations read and write; None likewise.
        seconds: Time of the cells that are not done, by kind of work; None where nothing tells it.
        unknown: Models whose size could not be found.
    """

    cells: Mapping[str, int]
    disk: int | None
    read: int | None
    written: int | None
    seconds: Mapping[str, float | None]
    unknown: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return sentences for --dry_run."""
        counts = ", ".join(f"{count} {NAMES[section]}" for section, count in self.cells.items())
        sentences = [f"{sum(self.cells.values())} cells: {counts}."]
        if self.unknown:
            models = ", ".join(self.unknown)
            sentences.append(f"Disk: unknown, the headers of {models} cannot be read here; set `bytes` for them.")
        elif self.disk is not None and self.read is not None and self.written is not None:
            traffic = f"{size(self.read)} read, {size(self.written)} written"
            sentences.append(f"Disk: {size(self.disk)} of merged weights at most; {traffic}.")
        for section, seconds in self.seconds.items():
            took = "unknown until the first is done" if seconds is None else duration(seconds)
            sentences.append(f"Time of {section}: {took}.")
        return sentences


NAMES = {
    "family": "trained families", "calibration": "importance files", "merge": "merges", "aim": "relaxations",
    "evaluate": "evaluations",
}  # fmt: skip


KINDS = {
    "training": ("family",), "calibration": ("calibration",), "merging and relaxing": ("merge", "aim"),
    "evaluation": ("evaluate",),
}  # fmt: skip
"""Kinds of work whose time is estimated, with their sections."""


def estimate(plan: Plan, state: State) -> Estimate:
    """Estimate a plan, reading the headers of its models where they can be reached."""
    e = plan.experiment
    sizes: dict[str, int | None] = {}
    for replicate in plan.replicates:
        for reference in replicate.labels:
            header_bytes = None if replicate.family else weight_bytes(reference)
            sizes[reference] = replicate.bytes if header_bytes is None else header_bytes
    omegas = len([omega for omega in e.omegas if omega != 1.0])
    peak = read = written = 0
    for replicate in plan.replicates:
        base_bytes = sizes.get(replicate.base) or 0  # a merge and a relaxation are as large as the base
        for members in e.combinations_of(list(replicate.models)):
            input_bytes = base_bytes + sum(sizes.get(replicate.models[label]) or 0 for label in members)
            for _ in e.methods:
                n_relaxations = len(e.relaxations) * len(e.calibrations) if omegas else 0
                output_bytes = base_bytes + n_relaxations * omegas * base_bytes
                read += input_bytes + n_relaxations * 2 * base_bytes
                written += output_bytes
                scored_together = base_bytes + omegas * base_bytes
                peak = max(peak, scored_together) if e.keep == "scores" else peak + output_bytes
    if e.keep == "scores" and isinstance(e.jobs, int):
        peak *= e.jobs
    unknown = tuple(
        label if label != "Base" else replicate.base
        for replicate in plan.replicates
        for reference, label in replicate.labels.items()
        if sizes[reference] is None and replicate.family is None
    )
    trained = any(replicate.family for replicate in plan.replicates)
    sections = dict.fromkeys(cell.section for cell in plan.cells)
    counts = {section: sum(cell.section == section for cell in plan.cells) for section in sections}
    has_all_sizes = not unknown and not trained
    return Estimate(
        counts,
        peak if has_all_sizes else None,
        read if has_all_sizes else None,
        written if has_all_sizes else None,
        _times(plan, state, read + written if has_all_sizes else None),
        tuple(dict.fromkeys(unknown)),
    )


def weight_bytes(reference: str) -> int | None:
    """Return the bytes of a model's weights by its headers; None where they cannot be read."""
    from math import prod

    from merging.checkpoints.checkpoint import open_all

    widths = {"float64": 8, "float32": 4, "int64": 8, "int32": 4, "bfloat16": 2, "float16": 2, "int16": 2}
    try:
        (checkpoint,) = open_all([reference], headers_only=True)
    except (ProjectError, OSError, ValueError):
        return None
    return sum(prod(info.shape) * widths.get(str(info.dtype), 1) for info in checkpoint.tensors.values())


def _times(plan: Plan, state: State, traffic: int | None) -> dict[str, float | None]:
    """Time of the cells that are not done: by those of their kind that are done, else of merges by their bytes."""
    times: dict[str, float | None] = {}
    for name, sections in KINDS.items():
        statuses = [state.status(cell) for cell in plan.cells if cell.section in sections]
        took = [s.seconds for s in statuses if s.state == "done" and s.seconds is not None]
        n_unfinished = sum(s.state != "done" for s in statuses)
        by_bytes = traffic / BYTES_PER_SECOND if traffic is not None and "merge" in sections else None
        if statuses:
            times[name] = mean(took) * n_unfinished if took else by_bytes
    return times


def size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}"
        count /= 1000
    return ""


def duration(seconds: float) -> str:
    """Return a time for people: 3 h 20 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
