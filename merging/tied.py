"""Output heads that are the input embedding: which checkpoint ties them, and whether the result does.

The rule: the result ties its head only if every input does. Where one has a head of its own, the embedding of a model
that ties stands for its head, and the result stores a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from console.errors import CheckpointError
from merging.checkpoint import Checkpoint
from merging.layout import Inputs
from merging.names import INPUT_EMBEDDING, OUTPUT_HEAD

COMPARED_ROWS = 4096
"""Rows compared at a time where a tied checkpoint stores its head besides."""


@dataclass(frozen=True)
class Heads:
    """The output head of the result and of each input: `head` is its name, `embeddings` the tied inputs' by identity.

    `copies`: the heads that a tied checkpoint stores besides its embedding, by identity; they are not written.
    """

    head: str | None
    tied: bool
    embeddings: Mapping[int, str]
    copies: Mapping[int, str]
    notes: tuple[str, ...] = ()

    def names(self, donor: Checkpoint) -> list[str]:
        """Return the names of the result's tensors where the donor gives them."""
        names = [name for name in donor.tensors if name != self.copies.get(id(donor))]
        return names if self.head is None or self.tied or self.head in names else [*names, self.head]

    def stored(self, checkpoint: Checkpoint, name: str) -> str | None:
        """Return the tensor that is stored for `name`: the embedding for a tied head; None where there is none."""
        if name in checkpoint.tensors and name != self.copies.get(id(checkpoint)):
            return name
        return self.embeddings.get(id(checkpoint)) if OUTPUT_HEAD.search(name) else None


def heads_of(inputs: Inputs) -> Heads:
    """Find out who ties. Raises CheckpointError for a config that says tied beside a head that differs."""
    heads: dict[int, str] = {}
    embeddings: dict[int, str] = {}
    copies: dict[int, str] = {}
    notes: list[str] = []
    donor = inputs.donor
    for checkpoint in inputs.all:
        head = next((name for name in checkpoint.tensors if OUTPUT_HEAD.search(name)), None)
        embedding = next((name for name in checkpoint.tensors if INPUT_EMBEDDING.search(name)), None)
        if embedding is not None and checkpoint.ties_embeddings:
            embeddings[id(checkpoint)] = embedding
            if head is not None:
                _check_copy(checkpoint, head, embedding)
                copies[id(checkpoint)] = head
                if checkpoint is donor:
                    notes.append(f"{donor.name} ties {head} to its embedding and stores both: one is enough.")
        elif head is not None:
            heads[id(checkpoint)] = head
    head = heads.get(id(donor)) or next(iter(heads.values()), None)
    if head is not None and id(donor) not in heads and id(donor) not in embeddings:
        head = None  # the donor has no head at all, an encoder perhaps
    if head is not None:
        untied = [c.name for c in inputs.all if id(c) in heads]
        for checkpoint in inputs.all:
            if id(checkpoint) in embeddings:
                notes.append(
                    f"{checkpoint.name} ties its embeddings: its {embeddings[id(checkpoint)]} serves as {head}."
                )
        if id(donor) in embeddings:
            notes.append(f"{head} is stored in the result, since {', '.join(untied[:3])} has one of its own.")
    return Heads(head, id(donor) in embeddings and head is None, embeddings, copies, tuple(notes))


def _check_copy(checkpoint: Checkpoint, head: str, embedding: str) -> None:
    """Raise CheckpointError unless the stored head is the embedding (or its file is not here to tell)."""
    if not checkpoint.tensors[head].file.exists():
        return
    same = checkpoint.tensors[head].shape == checkpoint.tensors[embedding].shape
    if same:
        ours, theirs = checkpoint.rows(head), checkpoint.rows(embedding)
        starts = range(0, ours.shape[0], COMPARED_ROWS)
        same = all(bool((ours[rows] == theirs[rows]).all()) for rows in (slice(s, s + COMPARED_ROWS) for s in starts))
    if not same:
        raise CheckpointError(
            f"{checkpoint.name}: config.json says that {head} is tied to {embedding}, and the weights hold "
            f"another {head}; set tie_word_embeddings to false in config.json, or take the tensor out."
        )
