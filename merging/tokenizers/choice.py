"""Vocabulary of the result: the base's, the union of all models', or a named model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from common.errors import UsageError
from common.terminal_text import quoted
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.download import locate
from merging.checkpoints.hub import CheckpointRef
from merging.checkpoints.tensor_names import main_embedding, role_of
from merging.tokenizers.token_ids import read_tokenizer, token_ids
from merging.tokenizers.vocabulary import ChosenRow, Vocabulary, listed

if TYPE_CHECKING:
    from merging.recipe.tokens import TokenRequest


def embedding_rows(checkpoint: Checkpoint) -> int | None:
    """Return the number of rows of the input embedding; None where there is no such tensor."""
    shape = _embedding(checkpoint)
    return shape[0] if shape else None


def embedding_width(checkpoint: Checkpoint) -> int | None:
    """Return the number of columns of the input embedding; None where there is no such matrix."""
    shape = _embedding(checkpoint)
    return shape[1] if len(shape) == 2 else None


def extra_rows(checkpoint: Checkpoint) -> int:
    """Return the number of rows that the input embedding has beyond vocab_size and the output head (Mllama: 8)."""
    vocab_size, rows = checkpoint.text_config.get("vocab_size"), embedding_rows(checkpoint)
    heads = [info.shape[0] for name, info in checkpoint.tensors.items() if role_of(name) == "head" and info.shape]
    if rows is None or not isinstance(vocab_size, int) or vocab_size not in heads:
        return 0
    return max(0, rows - vocab_size)


def _embedding(checkpoint: Checkpoint) -> tuple[int, ...]:
    name = main_embedding(checkpoint.tensors)
    return checkpoint.tensors[name].shape if name else ()


def choose_vocabulary(
    policy: str, template_model: Checkpoint, other_models: Sequence[Checkpoint], multiple: int | None = None
) -> Vocabulary:
    """Return the result's vocabulary.

    "union" keeps the rows of the template model and appends each token that another model has a row for; padding rows
    of the template model are used first.

    Args:
        policy: "base" (the template model's tokenizer), "union", or the folder or hub id of a model.
        template_model: The base or the first model.
        other_models: The other inputs.
        multiple: Round the number of rows up to a multiple of this; tokens without a row then get one.

    Raises:
        UsageError: A tokenizer is missing, or lists tokens that no model has a row for.
    """
    tokens, rows = token_ids(template_model.folder), embedding_rows(template_model)
    if policy == "union" and tokens is None:
        raise UsageError(
            f"--tokenizer union needs a tokenizer in {template_model.name}, "
            f"{_reason_without_tokenizer(template_model)}."
        )
    if policy not in ("base", "union"):
        return _named(policy, template_model, other_models, multiple)
    ids, tokens_without_rows = _split_by_row(tokens, None if multiple else rows)
    first = max(ids.values(), default=-1) + 1 if ids else 0
    added: tuple[str, ...] = ()
    if policy == "union" and ids is not None:
        candidates = dict.fromkeys(token for model in other_models for token in _tokens_with_row(model))
        added = tuple(token for token in candidates if token not in ids)
        ids |= {token: first + i for i, token in enumerate(added)}
        tokens_without_rows = tuple(token for token in tokens_without_rows if token not in ids)
    return Vocabulary(
        folder=template_model.folder,
        name=template_model.name,
        tokens=ids,
        min_rows=first + len(added) if added or multiple else 0,
        added=added,
        tokens_without_rows=tokens_without_rows,
        multiple=multiple or 1,
    )


def _named(
    policy: str, template_model: Checkpoint, other_models: Sequence[Checkpoint], multiple: int | None
) -> Vocabulary:
    """Return the vocabulary of one of the models, or of another folder or hub id with a tokenizer."""
    for model in (template_model, *other_models):
        if policy in (model.name, model.ref.path):
            rows = embedding_rows(model)
            ids, tokens_without_rows = _split_by_row(token_ids(model.folder), None if multiple else rows)
            if ids is None:
                raise UsageError(
                    f"--tokenizer {policy}: that model needs a tokenizer, {_reason_without_tokenizer(model)}."
                )
            if rows is not None:
                rows = max(rows, max(ids.values(), default=-1) + 1)
            return Vocabulary(
                model.folder,
                model.name,
                ids,
                fixed_rows=rows,
                tokens_without_rows=tokens_without_rows,
                multiple=multiple or 1,
            )
    folder = locate(CheckpointRef.parse(policy))
    tokens = token_ids(folder)
    if tokens is None:
        raise UsageError(f"--tokenizer {policy}: it has no tokenizer that transformers can load.")
    available = {token for model in (template_model, *other_models) for token in _tokens_with_row(model)}
    unknown = tuple(token for token in tokens if token not in available)
    if unknown:
        raise UsageError(f"--tokenizer {policy} lists {listed(unknown)} that none of the models has a row for.")
    return Vocabulary(folder, policy, tokens, fixed_rows=max(tokens.values()) + 1, multiple=multiple or 1)


def with_tokens(vocabulary: Vocabulary, requests: Sequence[TokenRequest], inputs: Sequence[Checkpoint]) -> Vocabulary:
    """Return the vocabulary with the tokens of a recipe's `tokenizer.tokens`; new tokens are appended.

    Args:
        vocabulary: The vocabulary of the result so far.
        requests: The recipe's tokens with the sources of their rows.
        inputs: The checkpoints of the merge.

    Raises:
        UsageError: There is no tokenizer, a named model is not among the inputs, or a token has neither a row in any
            model nor a source.
    """
    if not requests:
        return vocabulary
    if vocabulary.tokens is None:
        raise UsageError(f"tokenizer.tokens needs a tokenizer in {vocabulary.name}, which has none.")
    ids = dict(vocabulary.tokens)
    first = max(ids.values(), default=-1) + 1
    new = tuple(request.token for request in requests if request.token not in ids)
    ids |= {token: first + i for i, token in enumerate(new)}
    available = {token for model in inputs for token in _tokens_with_row(model)}
    for request in requests:
        if not request.has_source and request.token not in available:
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
    """Return the row of one of the inputs that a request names."""
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


def _reason_without_tokenizer(checkpoint: Checkpoint) -> str:
    """Return the reason for which a checkpoint's tokens are unknown, as the end of a sentence."""
    if read_tokenizer(checkpoint.folder) is None:
        return "which has none"
    return "whose tokenizer is defined by custom code, which is not run"


def _split_by_row(tokens: Mapping[str, int] | None, rows: int | None) -> tuple[dict[str, int] | None, tuple[str, ...]]:
    """Split tokens into those with and without a row; rows None: all have one."""
    if tokens is None or rows is None:
        return (None if tokens is None else dict(tokens)), ()
    return {t: i for t, i in tokens.items() if i < rows}, tuple(t for t, i in tokens.items() if i >= rows)


def _tokens_with_row(checkpoint: Checkpoint) -> list[str]:
    """Return the checkpoint's tokens that have a row, sorted by id."""
    ids, _ = _split_by_row(token_ids(checkpoint.folder), embedding_rows(checkpoint))
    return sorted(ids, key=ids.__getitem__) if ids else []
