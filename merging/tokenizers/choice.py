"""Whose tokenizer the result has, and which token has which row: the base's, the union of all, or a named model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from common.errors import UsageError
from common.terminal_text import quoted
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.hub import CheckpointRef, locate
from merging.checkpoints.tensor_names import main_embedding, role_of
from merging.tokenizers.token_ids import read_tokenizer, token_ids
from merging.tokenizers.vocabulary import ChosenRow, Vocabulary, listed

if TYPE_CHECKING:
    from merging.recipe.tokens import TokenRequest


def embedding_rows(checkpoint: Checkpoint) -> int | None:
    """Return the number of rows of the input embedding, or None where no tensor is known as one."""
    shape = _embedding(checkpoint)
    return shape[0] if shape else None


def embedding_width(checkpoint: Checkpoint) -> int | None:
    """Return the number of columns of the input embedding, or None where no matrix is known as one."""
    shape = _embedding(checkpoint)
    return shape[1] if len(shape) == 2 else None


def extra_rows(checkpoint: Checkpoint) -> int:
    """Return how many rows the input embedding has by design beyond the vocabulary of the config and the output head.

    Mllama has 8 for images; 0 for other models.
    """
    stated, rows = checkpoint.text_config.get("vocab_size"), embedding_rows(checkpoint)
    heads = [info.shape[0] for name, info in checkpoint.tensors.items() if role_of(name) == "head" and info.shape]
    if rows is None or not isinstance(stated, int) or stated not in heads:
        return 0
    return max(0, rows - stated)


def _embedding(checkpoint: Checkpoint) -> tuple[int, ...]:
    name = main_embedding(checkpoint.tensors)
    return checkpoint.tensors[name].shape if name else ()


def choose_vocabulary(
    policy: str, template_model: Checkpoint, others: Sequence[Checkpoint], multiple: int | None = None
) -> Vocabulary:
    """Return the result's vocabulary.

    "union" keeps the rows of the template model and appends each token that another model has a row for; padding rows
    of the template model are used first.

    Args:
        policy: "base" (the template model's tokenizer), "union", or the folder or hub id of a model.
        template_model: The base or the first model.
        others: The other inputs.
        multiple: Round the number of rows up to a multiple of this; tokens without a row then get one.

    Raises:
        UsageError: A tokenizer is missing, or lists tokens that no model has a row for.
    """
    tokens, rows = token_ids(template_model.folder), embedding_rows(template_model)
    if policy == "union" and tokens is None:
        raise UsageError(f"--tokenizer union needs a tokenizer in {template_model.name}, {_why_none(template_model)}.")
    if policy not in ("base", "union"):
        return _named(policy, template_model, others, multiple)
    kept, tokens_without_rows = _split(tokens, None if multiple else rows)
    first = max(kept.values(), default=-1) + 1 if kept else 0
    added: tuple[str, ...] = ()
    if policy == "union" and kept is not None:
        theirs = dict.fromkeys(token for other in others for token in _with_row(other))
        added = tuple(token for token in theirs if token not in kept)
        kept |= {token: first + i for i, token in enumerate(added)}
        tokens_without_rows = tuple(token for token in tokens_without_rows if token not in kept)
    return Vocabulary(
        folder=template_model.folder,
        name=template_model.name,
        tokens=kept,
        min_rows=first + len(added) if added or multiple else 0,
        added=added,
        tokens_without_rows=tokens_without_rows,
        multiple=multiple or 1,
    )


def _named(policy: str, template_model: Checkpoint, others: Sequence[Checkpoint], multiple: int | None) -> Vocabulary:
    """The vocabulary of one of the models, or of another folder or hub id that has a tokenizer."""
    for model in (template_model, *others):
        if policy in (model.name, model.ref.path):
            rows = embedding_rows(model)
            kept, tokens_without_rows = _split(token_ids(model.folder), None if multiple else rows)
            if kept is None:
                raise UsageError(f"--tokenizer {policy}: that model needs a tokenizer, {_why_none(model)}.")
            if rows is not None:
                rows = max(rows, max(kept.values(), default=-1) + 1)
            return Vocabulary(
                model.folder,
                model.name,
                kept,
                fixed_rows=rows,
                tokens_without_rows=tokens_without_rows,
                multiple=multiple or 1,
            )
    folder = locate(CheckpointRef.parse(policy))
    tokens = token_ids(folder)
    if tokens is None:
        raise UsageError(f"--tokenizer {policy}: there is no tokenizer in it that transformers reads.")
    known = {token for model in (template_model, *others) for token in _with_row(model)}
    unknown = tuple(token for token in tokens if token not in known)
    if unknown:
        raise UsageError(f"--tokenizer {policy} lists {listed(unknown)} that none of the models has a row for.")
    return Vocabulary(folder, policy, tokens, fixed_rows=max(tokens.values()) + 1, multiple=multiple or 1)


def with_tokens(vocabulary: Vocabulary, requests: Sequence[TokenRequest], inputs: Sequence[Checkpoint]) -> Vocabulary:
    """Return the vocabulary with the tokens that a recipe asks for, and where their rows come from.

    Tokens that it lacks are added after its last. Raises UsageError where there is no tokenizer, for a model that is
    none of the inputs, and for a token that no model has and no source is given for.
    """
    if not requests:
        return vocabulary
    if vocabulary.tokens is None:
        raise UsageError(f"tokenizer.tokens needs a tokenizer in {vocabulary.name}, which has none.")
    ids = dict(vocabulary.tokens)
    first = max(ids.values(), default=-1) + 1
    new = tuple(request.token for request in requests if request.token not in ids)
    ids |= {token: first + i for i, token in enumerate(new)}
    known = {token for model in inputs for token in _with_row(model)}
    for request in requests:
        if not request.has_source and request.token not in known:
            raise UsageError(
                f"tokenizer.tokens.{request.token}: no model has this token; give its source (another token of a "
                "model, or zero)."
            )
    rows = first + len(new)
    return replace(
        vocabulary,
        tokens=ids,
        fixed_rows=None if vocabulary.fixed_rows is None else max(vocabulary.fixed_rows, rows),
        min_rows=max(vocabulary.min_rows, rows) if new else vocabulary.min_rows,
        added=(*vocabulary.added, *new),
        tokens_without_rows=tuple(token for token in vocabulary.tokens_without_rows if token not in new),
        chosen={ids[r.token]: _chosen(r, inputs) for r in requests if r.has_source},
    )


def _chosen(request: TokenRequest, inputs: Sequence[Checkpoint]) -> ChosenRow:
    """The row that a request names, in one of the inputs."""
    where = f"tokenizer.tokens.{request.token}.source"
    if request.zero:
        return ChosenRow(None, force=request.force)
    model = next((c for c in inputs if request.model in (c.name, c.ref.path, c.exact_name)), None)
    if model is None:
        raise UsageError(f"{where}: {request.model} must be one of the models ({', '.join(c.name for c in inputs)}).")
    rows = embedding_rows(model) or 0
    row = request.source_id
    if row is None:
        token = request.source_token or request.token
        row = (token_ids(model.folder) or {}).get(token, rows)
        if row >= rows:
            raise UsageError(f"{where}: {model.name} has no row for the token {quoted(token)}.")
    if row >= rows:
        raise UsageError(f"{where}.token_id {row} must be below {model.name}'s {rows} rows.")
    return ChosenRow(model, row, request.force)


def _why_none(checkpoint: Checkpoint) -> str:
    """Why a checkpoint's tokens are not known."""
    if read_tokenizer(checkpoint.folder) is None:
        return "which has none"
    return "whose tokenizer is made by code of its own, which is not run"


def _split(tokens: Mapping[str, int] | None, rows: int | None) -> tuple[dict[str, int] | None, tuple[str, ...]]:
    """The tokens that have a row, and those that have none; all and none where rows do not matter (None)."""
    if tokens is None or rows is None:
        return (None if tokens is None else dict(tokens)), ()
    return {t: i for t, i in tokens.items() if i < rows}, tuple(t for t, i in tokens.items() if i >= rows)


def _with_row(checkpoint: Checkpoint) -> list[str]:
    """The checkpoint's tokens that have a row, by id."""
    kept, _ = _split(token_ids(checkpoint.folder), embedding_rows(checkpoint))
    return sorted(kept, key=kept.__getitem__) if kept else []
