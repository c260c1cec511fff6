"""What a plan says: every tensor of the result, where its parts are found, and the method's parameters for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.storage import tensor_bytes
from merging.tokenizers.vocabulary import Alignment, Vocabulary


class Named(Protocol):
    """What a writer needs to know of a tensor before it is made."""

    @property
    def name(self) -> str:
        """Its name in the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> str:
        """Its dtype, by torch's name."""


class Listing(Protocol):
    """A plan, as far as writing goes: the tensors in order."""

    @property
    def tensors(self) -> Sequence[Named]:
        """Every tensor."""


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor of one checkpoint, and how its rows lie in the result's vocabulary (None: as they are)."""

    checkpoint: Checkpoint
    name: str
    alignment: Alignment | None = None


@dataclass(frozen=True, eq=False)
class TensorPlan:
    """One output tensor: where each model's part of it is found, and the method's parameters for it.

    `source` gives the shape, and the tensor itself where it is copied: no floating-point numbers, or no `models`.
    `transposed`: a matrix that is stored [in, out]. `positions`: which of the recipe's models `models` are.
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
        """Whether the method makes this tensor; else it is copied."""
        return self.is_float and bool(self.models)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every source that is read for it."""
        return (self.source, *self.models, *([self.base] if self.base else ())) if self.is_merged else (self.source,)


@dataclass(frozen=True, eq=False)
class LayerOrigin:
    """The layer that a layer of a sliced result comes from. others: the same layer's further sources."""

    checkpoint: Checkpoint
    index: int
    others: tuple[tuple[Checkpoint, int], ...] = ()


def source_of(tensor: TensorPlan, checkpoint: Checkpoint) -> Source | None:
    """Return a checkpoint's tensor among those that one of the result is planned from; None where it has no part."""
    sources = (tensor.source, *tensor.models, *([tensor.base] if tensor.base else []))
    return next((source for source in sources if source.checkpoint.exact_name == checkpoint.exact_name), None)


@dataclass(frozen=True)
class Plan:
    """Every output tensor, in the template model's order, and what is to be said of the inputs.

    tied: whether the result's output head is its input embedding; layer_origins: for each stack that is made of slices,
    the model and layer that each of its layers comes from; head_of: the model whose config says what the output head
    is, where it is excluded from the merge and not the template model's.
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
