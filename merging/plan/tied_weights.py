"""Shared tensors: output heads tied to the embedding, and copies that old checkpoints store.

The result ties its head only if every input does. Where one input has a separate head, the embedding of a tied model
serves as its head, and the result stores a head. A copy (T5's three embeddings, BERT's two output biases, a tied head)
is written only where it differs in some input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import CheckpointError
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.model_config import is_tied_within, stated_tie
from merging.checkpoints.tensor_names import main_embedding, role_of
from merging.plan.slices import Inputs

if TYPE_CHECKING:
    from torch import Tensor

COMPARED_ROWS = 4096
"""Rows compared at a time where a checkpoint stores a tensor twice."""


@dataclass(frozen=True)
class Heads:
    """Output head of the result, and shared tensors of each input.

    Attributes:
        head: Name of the output head that the result stores, or of a tied one that it does not; None without a head.
        tied: True where the result's head is its input embedding.
        same: By id() of a checkpoint: {name of a copy, or of a tied head that is not stored: tensor that it equals}.
        dropped: Names that are copies in every input that has them.
        notes: Notes on tied weights.
    """

    head: str | None
    tied: bool
    same: Mapping[int, Mapping[str, str]]
    dropped: frozenset[str]
    notes: tuple[str, ...] = ()

    def names(self, template_model: Checkpoint) -> list[str]:
        """Return the names of the result's tensors, given the template model."""
        names = [name for name in template_model.tensors if name not in self.dropped]
        return names if self.head is None or self.tied or self.head in names else [*names, self.head]

    def stored(self, checkpoint: Checkpoint, name: str) -> str | None:
        """Return the stored tensor for `name`, or the one that it is tied to; None where there is none."""
        stored_name = self.same[id(checkpoint)].get(name, name)
        return stored_name if stored_name in checkpoint.tensors else None


def heads_of(inputs: Inputs) -> Heads:
    """Compare the shared tensors of the inputs.

    Raises:
        CheckpointError: A config has tie_word_embeddings and the stored head differs from the embedding.
    """
    template_model = inputs.template_model
    same = {id(c): _find_copies(c) for c in inputs.all}
    main_names = {id(c): {n for n in c.tensors if role_of(n) and n not in same[id(c)]} for c in inputs.all}
    ties = {
        id(c): (stated_tie(c.config) is not False or is_tied_within(c.config)) and _has_no_head(c, main_names[id(c)])
        for c in inputs.all
    }
    dropped = frozenset(n for copies in same.values() for n in copies) - {
        n for names in main_names.values() for n in names
    }
    heads = [name for c in inputs.all for name in sorted(main_names[id(c)]) if role_of(name) == "head"]
    head = heads[0] if heads and (ties[id(template_model)] or heads[0] in template_model.tensors) else None
    for checkpoint in inputs.all:
        embedding = main_of(checkpoint, "input")
        if head is not None and ties[id(checkpoint)] and embedding is not None:
            same[id(checkpoint)][head] = embedding
        lacking = (
            same[id(template_model)].keys() - checkpoint.tensors.keys()
        )  # the template model's copies, which another need not have
        for name in lacking:
            main = main_of(checkpoint, role_of(name) or "")
            if main is not None and role_of(name) != "head":
                same[id(checkpoint)].setdefault(name, main)
    return Heads(
        head, ties[id(template_model)] and head is None, same, dropped, tuple(_notes(inputs, head, ties, same, dropped))
    )


def main_of(checkpoint: Checkpoint, role: str) -> str | None:
    """Return the tensor of a role with the shortest path (`shared` in T5), which the others are copies of."""
    if role == "input":
        return main_embedding(checkpoint.tensors)
    names = [name for name in checkpoint.tensors if role_of(name) == role]
    return min(names, key=lambda name: (name.count("."), len(name)), default=None)


def _has_no_head(checkpoint: Checkpoint, names: Iterable[str]) -> bool:
    """Return True where a checkpoint has an embedding and no separate head."""
    return main_of(checkpoint, "input") is not None and not any(role_of(name) == "head" for name in names)


def _find_copies(checkpoint: Checkpoint) -> dict[str, str]:
    """Return {name of a copy: tensor it equals}; without tie_word_embeddings an equal head counts as tied."""
    copies, ties = {}, stated_tie(checkpoint.config)
    for name in checkpoint.tensors:
        role = role_of(name)
        main = main_of(checkpoint, "input" if role == "head" else role) if role else None
        if main is None or main == name or (role == "head" and ties is False):
            continue
        if _equal(checkpoint, name, main, unknown=bool(ties) or role != "head"):
            copies[name] = main
        elif role == "head" and ties:
            raise CheckpointError(
                f"{checkpoint.name}: config.json says that {name} is tied to {main}, and the weights hold another "
                f"{name}; set tie_word_embeddings to false in config.json, or take the tensor out."
            )
    return copies


def _equal(checkpoint: Checkpoint, name: str, other: str, unknown: bool) -> bool:
    """Return True for equal tensors, and `unknown` where only headers were fetched; the run itself compares them."""
    if checkpoint.tensors[name].shape != checkpoint.tensors[other].shape:
        return False
    if not (checkpoint.tensors[name].file.exists() and checkpoint.tensors[other].file.exists()):
        return unknown
    first, second = checkpoint.rows(name), checkpoint.rows(other)
    starts = range(0, first.shape[0], COMPARED_ROWS)
    return all(_same(first[rows], second[rows]) for rows in (slice(s, s + COMPARED_ROWS) for s in starts))


def _same(one: Tensor, other: Tensor) -> bool:
    """Return True where two blocks have the same bytes, so that NaN equals NaN."""
    import torch

    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


def _notes(
    inputs: Inputs, head: str | None, ties: Mapping[int, bool], same: Mapping[int, Mapping[str, str]],
    dropped: frozenset[str],
) -> Iterable[str]:  # fmt: skip
    template = inputs.template_model
    for name in template.tensors:
        if name in dropped:
            yield f"{template.name} stores {name}, a copy of its {same[id(template)][name]}, which is dropped."
    if head is None:
        return
    for checkpoint in inputs.all:
        if ties[id(checkpoint)]:
            yield f"{checkpoint.name} ties its embeddings: its {same[id(checkpoint)][head]} serves as {head}."
    if ties[id(template)]:
        untied = [checkpoint.name for checkpoint in inputs.all if not ties[id(checkpoint)]]
        yield f"{head} is stored in the result, since {', '.join(untied[:3])} has a separate one."
