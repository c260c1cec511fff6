"""An adapter that is to be made, or several from one read: everything decided, nothing written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merging.checkpoints.adapters.adapter import AdaptedWeights
from merging.checkpoints.checkpoint import Checkpoint
from merging.lora.plan import AdapterPlan
from merging.lora.whole import base_shape
from merging.output.digests import digest_of, tensor_digest
from merging.output.records.lock import describe_input, files_of
from merging.plan.merge_plan import Relaxing, Variant
from merging.plan.slices import Inputs
from merging.tokenizers.chat_template import ChatTemplate, template_of

if TYPE_CHECKING:
    from merging.lora.tensors import Maker
    from merging.methods.contract import Method


@dataclass(frozen=True)
class AdapterWork:
    """What `merging.plan.merge_plan.Work` is for a model.

    settings: the adapter_config.json; implementation: of the
    method."""

    program: str
    label: str
    paper: str
    inputs: Inputs
    plan: AdapterPlan
    settings: Mapping[str, Any]
    template: ChatTemplate
    recipe: Mapping[str, Any]
    sources: Mapping[str, str]
    lineage: Mapping[str, Any]
    notes: tuple[str, ...]
    implementation: Callable[[], Method]
    relaxing: Relaxing | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    merge_recipe: Mapping[str, Any] | None = None

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The results, one for each omega."""
        return self.relaxing.variants if self.relaxing else (Variant(),)

    @property
    def bytes(self) -> int:
        """Size of all results in bytes."""
        return self.plan.bytes * len(self.variants)

    @property
    def base(self) -> Checkpoint:
        """The base of all the adapters."""
        assert self.inputs.base is not None
        return self.inputs.base

    @property
    def has_tokenizer(self) -> bool:
        """Whether the result brings a tokenizer: where its own differs from the base's, or its chat template does."""
        vocabulary = self.plan.of_model.vocabulary
        return (
            vocabulary.folder != self.base.folder
            or bool(vocabulary.added)
            or self.template.text != template_of(self.base.folder)
        )

    @property
    def rows(self) -> int | None:
        """The rows of the result's input embedding where the base has another number, which PEFT must find there."""
        tables = [(t.shape[0], t.base) for t in self.plan.wholes.values() if t.is_embedding and t.base is not None]
        return next((rows for rows, source in tables if base_shape(source)[0] != rows), None)

    @property
    def remarks(self) -> list[str]:
        """Return the reports for the user of the result."""
        said = (
            ["The adapter brings a tokenizer of its own, to be loaded from its folder."] if self.has_tokenizer else []
        )
        if self.rows is not None:
            said.append(
                f"The adapter has embeddings of {self.rows} rows, its base has another number: call "
                f"`model.resize_token_embeddings({self.rows})` before you load the adapter."
            )
        return said

    def make(self) -> Maker:
        """Load torch and the importance, and return what computes the tensors."""
        import torch

        from merging.engine.execution import ExecutionConfig
        from merging.lora.tensors import Maker

        changed = set(self.plan.names)
        tensors = tuple(tensor for tensor in self.plan.of_model.tensors if tensor.name in changed)
        part = replace(self.plan.of_model, tensors=tensors)
        relaxation = self.relaxing.make(self.base, part) if self.relaxing else None
        job = ExecutionConfig(self.implementation(), torch.device("cpu"), relaxation=relaxation)
        return Maker(self.plan.method, job, relaxation)


def lasting_files(checkpoint: Checkpoint) -> list[Path]:
    """Return the files of an input that are digested whole: all but its base's weights, which are not read whole."""
    weights = checkpoint.weights
    base = weights.base if isinstance(weights, AdaptedWeights) else weights
    return [file for file in files_of(checkpoint) if file not in base.files]


def described_inputs(work: AdapterWork) -> list[dict[str, Any]]:
    """Return what a lock says of the inputs, with digests of all files but the base's weights."""
    found = []
    for checkpoint in work.inputs.all:
        files = lasting_files(checkpoint)
        found.append(describe_input(checkpoint, {f: digest_of(f) for f in files}, files))
    return found


def described_base(work: AdapterWork) -> dict[str, Any]:
    """Return what a lock says of the base's weights: digests of their names, shapes and dtypes, and of what is read."""
    headers = hashlib.sha256()
    for name, info in sorted(work.base.tensors.items()):
        headers.update(f"{name} {list(info.shape)} {info.dtype}\n".encode())
    read = {t.base.name for t in work.plan.wholes.values() if t.base is not None}
    return {
        "headers": headers.hexdigest(),
        "tensors": {name: tensor_digest([work.base.read(name)]) for name in sorted(read)},
    }
