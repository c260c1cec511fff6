"""Types of a plan: result tensors with their sources and the method's parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.storage import tensor_bytes
from merging.tokenizers.vocabulary import Alignment, Vocabulary


class Named(Protocol):
    """Name, shape and dtype of a tensor, which a writer needs before its values exist."""

    @property
    def name(self) -> str:
        """Its name in the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> str:
        """Its dtype by torch's name."""


class Listing(Protocol):
    """The part of a plan that a writer needs: the tensors in order."""

    @property
    def tensors(self) -> Sequence[Named]:
        """Every tensor."""


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor of one checkpoint, and the alignment of its rows with the result's vocabulary (None: unchanged)."""

    checkpoint: Checkpoint
    name: str
    alignment: Alignment | None = None


@dataclass(frozen=True, eq=False)
class TensorPlan:
    """One result tensor with its sources and the method's parameters.

    Attributes:
        name: Name in the result.
        shape: Shape in the result.
        dtype: Dtype in the result, by torch's name.
        source: Tensor that gives the shape, and the values where the tensor is copied.
        models: Source in each merged model; empty where the tensor is copied.
        base: Source in the base; None where the method works without one.
        parameters: Values of the method's parameters for this tensor.
        is_float: True for floating-point tensors; others are copied.
        is_embedding: True for the input embedding.
        transposed: True for a matrix stored [in, out].
        positions: Positions of `models` among the recipe's models.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: Source
    models: tuple[Source, ...]
    base: Source | None
    parameters: Mapping[str, Any]
    is_float: bool
    is_embedding: bool
    transposed: bool = False
    positions: tuple[int, ...] = ()

    @property
    def is_merged(self) -> bool:
        """True where the method computes this tensor; otherwise it is copied."""
        return self.is_float and bool(self.models)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every source that is read for this tensor."""
        return (self.source, *self.models, *([self.base] if self.base else ())) if self.is_merged else (self.source,)


@dataclass(frozen=True, eq=False)
class LayerOrigin:
    """Source of a layer of a result made of slices.

    further_sources: (checkpoint, layer) of each model that is merged into it.
    """

    checkpoint: Checkpoint
    index: int
    further_sources: tuple[tuple[Checkpoint, int], ...] = ()


def source_of(tensor: TensorPlan, checkpoint: Checkpoint) -> Source | None:
    """Return the source of a result tensor in a checkpoint; None where it has none."""
    sources = (tensor.source, *tensor.models, *([tensor.base] if tensor.base else []))
    return next((source for source in sources if source.checkpoint.exact_name == checkpoint.exact_name), None)


@dataclass(frozen=True)
class Plan:
    """Plan of a result.

    Attributes:
        tensors: Result tensors in the template model's order.
        vocabulary: Vocabulary of the result.
        tied: True where the output head is the input embedding.
        notes: Notes on the inputs for log, run record and report.
        left_out: {model name: tensors that the result does not contain}.
        layer_origins: {stack: source of each layer}, for stacks made of slices.
        head_of: The model whose config describes the output head, where it is excluded from the merge and not the
            template model's.
    """

    tensors: tuple[TensorPlan, ...]
    vocabulary: Vocabulary
    tied: bool
    notes: tuple[str, ...]
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    layer_origins: Mapping[str, tuple[LayerOrigin, ...]] = field(default_factory=dict)
    head_of: Checkpoint | None = None

    @property
    def bytes(self) -> int:
        """Size of the output in bytes."""
        return sum(tensor_bytes(tensor.shape, tensor.dtype) for tensor in self.tensors)

    @property
    def bytes_read(self) -> int:
        """Bytes of all the tensors that are read, each once."""
        used = {(id(s.checkpoint), s.name): s for tensor in self.tensors for s in tensor.sources}
        infos = [s.checkpoint.tensors[s.name] for s in used.values()]
        return sum(tensor_bytes(info.shape, info.dtype) for info in infos)
