"""What will happen, from headers and configs alone; refuses plans that cannot work. No weights are read."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from console.errors import CheckpointError, FailureError, UsageError
from merging.checkpoint import CODES, FLOATS, Checkpoint, TensorInfo, tensor_bytes
from merging.vocabulary import INPUT_EMBEDDING, Alignment, alignment_of, describe, is_vocabulary_tensor

COMPUTED_BUFFER = re.compile(r"(rotary_emb\.inv_freq|attn\.(masked_)?bias)$")
"""Buffers that old checkpoints store and transformers recomputes; models may differ in having them."""
HEAD = re.compile(r"(lm_head|embed_out)\.weight$")


@dataclass(frozen=True)
class TensorPlan:
    """One output tensor: where each model's part of it is found, and how its rows are aligned."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sources: tuple[str, ...]
    alignments: tuple[Alignment | None, ...]
    is_float: bool
    is_embedding: bool


@dataclass(frozen=True)
class Plan:
    """Every output tensor, in the donor's order, and what is to be said of the inputs."""

    tensors: tuple[TensorPlan, ...]
    notes: tuple[str, ...]
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of the output in bytes."""
        return sum(tensor_bytes(tensor.shape, tensor.dtype) for tensor in self.tensors)


def check_distinct(base: Checkpoint | None, models: Sequence[Checkpoint]) -> None:
    """Refuse the base among the models, and one model listed twice. Raises UsageError."""
    seen: dict[Path, str] = {}
    for model in models:
        folder = model.folder.resolve()
        if base is not None and folder == base.folder.resolve():
            raise UsageError(f"The base model {base.name} is listed among the models to merge; take it out of them.")
        if folder in seen:
            raise UsageError(f"{model.name} is listed twice among the models to merge (also as {seen[folder]}).")
        seen[folder] = model.name


def plan(donor: Checkpoint, others: Sequence[Checkpoint], dtype: str | None) -> Plan:
    """Lay every tensor of `donor` beside its counterpart in each of the `others` (the donor may be one of them).

    A donor that ties its output head to its embedding and yet stores both is written with the embedding alone (the two
    are compared, the only weights read here).

    dtype: of the output's floating-point tensors; None keeps the donor's. Raises CheckpointError naming the first
    three differences where shapes or names do not fit.
    """
    problems: list[str] = []
    notes: list[str] = []
    left_out: dict[str, tuple[str, ...]] = {}
    columns: list[dict[str, tuple[str, Alignment | None]]] = []
    head = _stored_twice(donor)
    if head is not None:
        notes.append(f"{donor.name} ties {head} to its embedding and stores both: the embedding alone is written.")
    wanted = {name: info for name, info in donor.tensors.items() if name != head}
    for other in others:
        matched, extra = _match(donor, wanted, other, problems, notes)
        columns.append(matched)
        if extra:
            left_out[other.name] = extra
            notes.append(f"{other.name}: left out {', '.join(extra[:3])}, which {donor.name} computes or ties.")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(f"The models do not fit together: {'; '.join(problems[:3])}{more}.")
    tensors = []
    for name, info in wanted.items():
        is_float = info.dtype in FLOATS
        if info.dtype not in CODES:
            raise CheckpointError(f"{donor.name}: tensor {name} is stored as {info.dtype}, which cannot be merged.")
        found = [column[name] for column in columns]
        tensors.append(
            TensorPlan(
                name=name,
                shape=info.shape,
                dtype=(dtype or info.dtype) if is_float else info.dtype,
                sources=tuple(source for source, _ in found),
                alignments=tuple(alignment for _, alignment in found),
                is_float=is_float,
                is_embedding=len(info.shape) == 2 and bool(INPUT_EMBEDDING.search(name)),
            )
        )
    return Plan(tuple(tensors), tuple(dict.fromkeys(notes)), left_out)


def _stored_twice(donor: Checkpoint) -> str | None:
    """The output head of a checkpoint that ties it and stores it besides, equal to its embedding."""
    head = next((name for name in donor.tensors if HEAD.search(name)), None)
    embedding = next((name for name in donor.tensors if INPUT_EMBEDDING.search(name)), None)
    if head is None or embedding is None or not donor.ties_embeddings:
        return None
    if donor.tensors[head].shape != donor.tensors[embedding].shape:
        return None
    return head if donor.read(head).equal(donor.read(embedding)) else None


def _match(
    donor: Checkpoint,
    wanted: Mapping[str, TensorInfo],
    other: Checkpoint,
    problems: list[str],
    notes: list[str],
) -> tuple[dict[str, tuple[str, Alignment | None]], tuple[str, ...]]:
    """Find the other checkpoint's tensor for each of the donor's; collect what does not fit."""
    matched: dict[str, tuple[str, Alignment | None]] = {}
    if other is donor:
        return {name: (name, None) for name in wanted}, ()
    for name, info in wanted.items():
        source = name if name in other.tensors else _tied_source(name, other)
        if source is None:
            problems.append(f"{other.name} has no tensor {name} {list(info.shape)}, which {donor.name} has")
            continue
        if source != name:
            notes.append(f"{other.name} ties its embeddings: its {source} serves as {name}.")
        theirs = other.tensors[source]
        if theirs.dtype not in FLOATS and info.dtype in FLOATS:
            problems.append(f"{name} is stored as {theirs.dtype} in {other.name}, a floating-point type was expected")
        matched[name] = (source, None)
        if is_vocabulary_tensor(name, donor) and theirs.shape[1:] == info.shape[1:]:
            matched[name] = (source, _aligned(donor, other, name, info, theirs, problems, notes))
        elif theirs.shape != info.shape:
            problems.append(f"{name} is {list(info.shape)} in {donor.name} and {list(theirs.shape)} in {other.name}")
    used = {source for source, _ in matched.values()}
    extra = [name for name in other.tensors if name not in used and name not in wanted]
    for name in extra:
        if HEAD.search(name) and donor.ties_embeddings and not other.ties_embeddings:
            problems.append(f"{other.name} has an output head of its own ({name}) and {donor.name} ties it")
        elif not COMPUTED_BUFFER.search(name) and not HEAD.search(name):
            problems.append(f"{other.name} has a tensor {name}, which {donor.name} has not")
    return matched, tuple(extra)


def _tied_source(name: str, other: Checkpoint) -> str | None:
    """The input embedding that stands for an output head that a tied checkpoint does not store."""
    if HEAD.search(name) and other.ties_embeddings:
        return next((candidate for candidate in other.tensors if INPUT_EMBEDDING.search(candidate)), None)
    return None


def _aligned(
    donor: Checkpoint, other: Checkpoint, name: str, ours: TensorInfo, theirs: TensorInfo,
    problems: list[str], notes: list[str],
) -> Alignment | None:  # fmt: skip
    rows, their_rows = ours.shape[0], theirs.shape[0]
    alignment = alignment_of(donor.folder, rows, other.folder, their_rows)
    if alignment is None:
        problems.append(
            f"{name} has {rows} rows in {donor.name} and {their_rows} in {other.name}, and without a tokenizer in both "
            "their rows cannot be matched by token"
        )
        return None
    if len(alignment.missing) > rows / 2:
        problems.append(
            f"{other.name} has only {rows - len(alignment.missing)} of the {rows} tokens of {donor.name}: "
            "their tokenizers are not of one family"
        )
    sentence = describe(other.name, donor.name, their_rows, alignment)
    if sentence:
        notes.append(sentence)
    return alignment if alignment.rows is not None or their_rows != rows else None


def check_space(folder: Path, needed: int) -> None:
    """Refuse before the first byte where the disk cannot hold the output. Raises FailureError."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise FailureError(
            f"No space for the output at {folder}: it needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free."
        )
