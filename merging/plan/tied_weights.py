"""Tensors that are one and the same: output heads tied to the embedding, and what old checkpoints store several times.

The rule: the result ties its head only if every input does. Where one has a head of its own, the embedding of a model
that ties stands for its head, and the result stores a head. A copy (T5's three embeddings, BERT's two output biases, a
tied head) is written only where some input has something else there.
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
    """The output head of the result, and what is one tensor in each input.

    `same`, by a checkpoint's identity: {name of a copy, or of a tied head that is not stored: the tensor that it is}.
    `dropped`: the names that are copies in every input that has them.
    """

    head: str | None
    tied: bool
    same: Mapping[int, Mapping[str, str]]
    dropped: frozenset[str]
    notes: tuple[str, ...] = ()

    def names(self, template_model: Checkpoint) -> list[str]:
        """Return the names of the result's tensors where the template model gives them."""
        names = [name for name in template_model.tensors if name not in self.dropped]
        return names if self.head is None or self.tied or self.head in names else [*names, self.head]

    def stored(self, checkpoint: Checkpoint, name: str) -> str | None:
        """Return the tensor that is stored for `name`, perhaps one that it is tied to; None where there is none."""
        found = self.same[id(checkpoint)].get(name, name)
        return found if found in checkpoint.tensors else None


def heads_of(inputs: Inputs) -> Heads:
    """Find out who ties what. Raises CheckpointError for a config that says tied beside a head that differs."""
    template_model = inputs.template_model
    same = {id(c): _copies(c) for c in inputs.all}
    main_names = {id(c): {n for n in c.tensors if role_of(n) and n not in same[id(c)]} for c in inputs.all}
    ties = {
        id(c): (stated_tie(c.config) is not False or is_tied_within(c.config)) and _shares(c, main_names[id(c)])
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
    """Return the tensor of a role that the others of it are copies of: the one highest up, as `shared` in T5."""
    if role == "input":
        return main_embedding(checkpoint.tensors)
    names = [name for name in checkpoint.tensors if role_of(name) == role]
    return min(names, key=lambda name: (name.count("."), len(name)), default=None)


def _shares(checkpoint: Checkpoint, own: Iterable[str]) -> bool:
    """Whether a checkpoint has an embedding and no head of its own."""
    return main_of(checkpoint, "input") is not None and not any(role_of(name) == "head" for name in own)


def _copies(checkpoint: Checkpoint) -> dict[str, str]:
    """Return {name of a copy: the tensor it equals}. Where the config does not say, a head that is equal is tied."""
    copies, stated = {}, stated_tie(checkpoint.config)
    for name in checkpoint.tensors:
        role = role_of(name)
        main = main_of(checkpoint, "input" if role == "head" else role) if role else None
        if main is None or main == name or (role == "head" and stated is False):
            continue
        if _equal(checkpoint, name, main, unknown=bool(stated) or role != "head"):
            copies[name] = main
        elif role == "head" and stated:
            raise CheckpointError(
                f"{checkpoint.name}: config.json says that {name} is tied to {main}, and the weights hold another "
                f"{name}; set tie_word_embeddings to false in config.json, or take the tensor out."
            )
    return copies


def _equal(checkpoint: Checkpoint, name: str, other: str, unknown: bool) -> bool:
    """Whether two tensors are the same; `unknown` where only headers were fetched: the run itself will compare."""
    if checkpoint.tensors[name].shape != checkpoint.tensors[other].shape:
        return False
    if not (checkpoint.tensors[name].file.exists() and checkpoint.tensors[other].file.exists()):
        return unknown
    ours, theirs = checkpoint.rows(name), checkpoint.rows(other)
    starts = range(0, ours.shape[0], COMPARED_ROWS)
    return all(_same(ours[rows], theirs[rows]) for rows in (slice(s, s + COMPARED_ROWS) for s in starts))


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two blocks hold the same bytes; NaN is itself then."""
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
            yield f"{template.name} stores {name}, which is its {same[id(template)][name]}, besides: one is enough."
    if head is None:
        return
    for checkpoint in inputs.all:
        if ties[id(checkpoint)]:
            yield f"{checkpoint.name} ties its embeddings: its {same[id(checkpoint)][head]} serves as {head}."
    if ties[id(template)]:
        untied = [checkpoint.name for checkpoint in inputs.all if not ties[id(checkpoint)]]
        yield f"{head} is stored in the result, since {', '.join(untied[:3])} has one of its own."
