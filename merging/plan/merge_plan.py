"""What is to be made: where it goes, what is decided, and the results that come out of one read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.device import check_device
from common.distributed import SINGLE_PROCESS, ProcessGroup
from merging.plan.slices import Inputs
from merging.plan.types import Plan
from merging.tokenizers.chat_template import ChatTemplate

if TYPE_CHECKING:
    from merging.checkpoints.checkpoint import Checkpoint
    from merging.engine.execution import ExecutionConfig


@dataclass(frozen=True)
class Output:
    """Where and how the merged checkpoint is written.

    save_as: "model", or "adapter" where adapters make one adapter. expected: a lock that the result must repeat.
    layer_stats: whether statistics per layer are computed; load_check: whether the planned folder is loaded in
    transformers before it is written; process_group: the ranks that make it.
    """

    save_path: Path
    max_shard_size: str = "5GB"
    overwrite: bool = False
    device: str = "auto"
    resume: bool = False
    allow_nonfinite: bool = False
    layer_stats: bool = False
    load_check: bool = True
    save_as: str = "model"
    expected: Mapping[str, Any] | None = None
    process_group: ProcessGroup = SINGLE_PROCESS

    def __post_init__(self) -> None:
        """Raises UsageError for a device that no machine has; whether this one has it is asked once torch is loaded."""
        check_device(self.device)

    @property
    def tries_loading(self) -> bool:
        """Whether this rank loads the planned folder in transformers: rank 0 does."""
        return self.load_check and self.process_group.is_main


@dataclass(frozen=True)
class Variant:
    """One of several results of a work: its folder in the output, and what differs in it.

    recipe and lineage are put over the work's; details: for the run record, called at the end.
    """

    folder: str = "."
    recipe: Mapping[str, Any] = field(default_factory=dict)
    lineage: Mapping[str, Any] = field(default_factory=dict)
    details: Callable[[], Mapping[str, Any]] = dict


@dataclass(frozen=True)
class Relaxing:
    """AIM applied in the same pass: made by the caller from the base, since merging knows no activations.

    recipe: what a lock repeats it from, omega excepted; files: what the result depends on (an importance file); kept:
    paths that the output must not touch; `make(base, plan)` returns the relaxation of the loop; variants: its results;
    `preview(base, plan)` says what will be relaxed; `finished(error)` is called at the end of the run.
    """

    recipe: Mapping[str, Any]
    files: Mapping[str, Path]
    kept: Sequence[Path]
    make: Callable[[Checkpoint, Plan], Any]
    variants: tuple[Variant, ...]
    preview: Callable[[Checkpoint, Plan], Sequence[str]]
    finished: Callable[[BaseException | None], None] = lambda _: None


@dataclass(frozen=True)
class Work:
    """A checkpoint that is to be made, or several from one read: everything decided, nothing written.

    recipe: what a lock repeats it from; make_job loads torch and what the loop needs; variants: the results, in the
    order in which the loop makes them; files: inputs besides the checkpoints (an importance file); whole_matrix:
    whether products of whole matrices enter, whose last bits depend on the number of threads; preview: sentences for a
    look at the plan alone; merge_recipe: of the merged model that is relaxed, where its run record has it.
    """

    program: str
    label: str
    paper: str
    inputs: Inputs
    plan: Plan
    template: ChatTemplate
    recipe: Mapping[str, Any]
    sources: Mapping[str, str]
    lineage: Mapping[str, Any]
    notes: tuple[str, ...]
    make_job: Callable[[], ExecutionConfig]
    variants: tuple[Variant, ...] = (Variant(),)
    files: Mapping[str, Path] = field(default_factory=dict)
    whole_matrix: bool = False
    preview: Callable[[], Sequence[str]] = tuple
    mergekit: tuple[Mapping[str, Any], Sequence[str]] | None = None
    merge_recipe: Mapping[str, Any] | None = None
    finished: Callable[[BaseException | None], None] = lambda _: None

    @property
    def bytes(self) -> int:
        """Size of all results in bytes."""
        return self.plan.bytes * len(self.variants)
