"""Types of a run: where its result goes, what relaxes it, and the finished plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from common.device import check_device
from common.distributed import SINGLE_PROCESS, ProcessGroup
from common.files.json_values import JsonValue
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.storage import tensor_bytes
from merging.plan.slices import Inputs
from merging.plan.types import Listing, Plan
from merging.tokenizers.chat_template import ChatTemplate


@dataclass(frozen=True)
class OutputConfig:
    """Place and form of the result, and how it is written.

    save_as: "model", or "adapter" where adapters make one adapter. expected: a lock that the result must repeat.
    layer_stats: compute statistics per layer. load_check: load the planned folder in transformers before it is written.
    process_group: the ranks of the run.
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
    expected: Mapping[str, JsonValue] | None = None
    process_group: ProcessGroup = SINGLE_PROCESS

    def __post_init__(self) -> None:
        """Raises UsageError for a device that no machine has; whether this one has it is known once torch is loaded."""
        check_device(self.device)

    @property
    def tries_loading(self) -> bool:
        """True where this process loads the planned folder in transformers; of several ranks the first does."""
        return self.load_check and self.process_group.is_main


class RelaxationLineage(TypedDict, total=False):
    """The part of a lineage that a relaxation adds: omega, and what differs from the paper's AIM."""

    omega: float | None
    statistic: str
    normalization: str
    control: str


class Lineage(RelaxationLineage):
    """Origin of a result in its run record and model card: method (None: not merged here), base, models and omega."""

    method: str | None
    base_model: str | None
    models: list[str]


@dataclass(frozen=True)
class Variant:
    """One of several results of a plan: its folder in the output, and what differs in it.

    recipe and lineage are put over the plan's; details: for the run record, called at the end.
    """

    folder: str = "."
    recipe: Mapping[str, JsonValue] = field(default_factory=dict)
    lineage: RelaxationLineage = field(default_factory=RelaxationLineage)
    details: Callable[[], Mapping[str, JsonValue]] = dict


@dataclass(frozen=True)
class RelaxationSpec:
    """AIM in the pass of a merge, or alone; given by `aim`, since merging knows no activations.

    recipe: keys for the lock, omega excepted. files: files that the result depends on (an importance file). protected:
    paths that the output must not touch. `make(base, plan)` returns the engine's `Relaxation`. variants: its results.
    `preview(base, plan)` returns sentences on what will be relaxed. `finished(error)` is called at the end of the run.
    notes: sentences for the user. implementation: of a run that only relaxes one model, which is merged already: the
    result has its names, config and tokenizer, and `recipe` is all that a lock needs; None inside a merge.
    """

    recipe: Mapping[str, JsonValue]
    files: Mapping[str, Path]
    protected: Sequence[Path]
    make: Callable[[Checkpoint, Plan], Any]
    variants: tuple[Variant, ...]
    preview: Callable[[Checkpoint, Plan], Sequence[str]]
    finished: Callable[[BaseException | None], None] = lambda _: None
    notes: tuple[str, ...] = ()
    implementation: Callable[[], Any] | None = None

    @property
    def is_alone(self) -> bool:
        """True for a run that only relaxes."""
        return self.implementation is not None


@dataclass(frozen=True)
class MergePlan:
    """Plan of a run with one result or several from one read: everything decided, nothing written.

    program, label: the script and what its progress bar does. kind: "model" or "adapter". model: plan of the whole
    model. layout: the tensors that are written, which are the model's or an adapter's. recipe, sources: what a lock
    repeats the run from, and where each value comes from. lineage: method, base, models and omega for the model card.
    implementation: loads torch and the method's `Method`. seed, reference: of the computation. device: where it runs
    whatever the output says. files: inputs besides the checkpoints (an importance file). whole_matrix: products of
    whole matrices enter, whose last bits depend on the number of threads. mergekit: mergekit's form of the recipe with
    what it lacks. merge_recipe: of the merged model that is relaxed, where its run record has it.
    """

    program: str
    label: str
    kind: str
    inputs: Inputs
    model: Plan
    layout: Listing
    template: ChatTemplate
    recipe: Mapping[str, JsonValue]
    sources: Mapping[str, str]
    lineage: Lineage
    notes: tuple[str, ...]
    implementation: Callable[[], Any]
    seed: int = 42
    reference: bool = False
    device: str | None = None
    relaxation: RelaxationSpec | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    whole_matrix: bool = False
    mergekit: tuple[Mapping[str, JsonValue], Sequence[str]] | None = None
    merge_recipe: Mapping[str, JsonValue] | None = None

    @property
    def base(self) -> Checkpoint:
        """The base, or the template model where the method works without one."""
        return self.inputs.base or self.inputs.template_model

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The results, one for each omega."""
        return self.relaxation.variants if self.relaxation else (Variant(),)

    @property
    def bytes(self) -> int:
        """Size of all results in bytes."""
        return sum(tensor_bytes(t.shape, t.dtype) for t in self.layout.tensors) * len(self.variants)

    @property
    def paths(self) -> list[Path]:
        """Every path that the result depends on, and that the output must not touch."""
        places = [place for checkpoint in self.inputs.all for place in checkpoint.places]
        return [*places, *self.files.values(), *(self.relaxation.protected if self.relaxation else ())]
