"""Sources of rows for single tokens: mergekit's `tokenizer.tokens`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from common.errors import UsageError
from common.files.json_values import JsonObject, JsonValue
from common.terminal_text import quoted
from merging.recipe.mergekit.keys import check_keys
from merging.recipe.mergekit.values import as_mapping, model_name
from merging.recipe.method_registry import as_bool


@dataclass(frozen=True)
class TokenRequest:
    """A token of the result and the source of its row in models that lack it.

    Attributes:
        token: The token string.
        model: Model with the source row; None for zeros, or for the default rule.
        zero: The row is zeros.
        source_token, source_id: Another token of that model, by string or id.
        force: Replace the rows of models that have the token, too.
    """

    token: str
    model: str | None = None
    zero: bool = False
    source_token: str | None = None
    source_id: int | None = None
    force: bool = False

    @property
    def has_source(self) -> bool:
        """True where the recipe names the source of the row."""
        return self.zero or self.model is not None

    def renamed(self, name: Callable[[str], str]) -> TokenRequest:
        """Return the request with its model renamed."""
        return self if self.model is None else replace(self, model=name(self.model))

    def as_yaml_dict(self) -> JsonObject:
        """Return the entry in mergekit's form."""
        source: Any = {"kind": "zero"} if self.zero else self.model
        if self.source_token is not None or self.source_id is not None:
            by_id = self.source_token is None
            which = {"token_id": self.source_id} if by_id else {"token": self.source_token}
            source = {"kind": "model_token", "model": self.model, **which}
        return {**({"source": source} if source is not None else {}), **({"force": True} if self.force else {})}


def read_tokens(value: object, notes: list[str]) -> tuple[TokenRequest, ...]:
    """Read `tokenizer.tokens`.

    Args:
        value: {token: {source: a model, {kind: zero} or {kind: model_token, model, token or token_id}, force}}.
        notes: Receives a note for each key without effect.

    Raises:
        UsageError: An entry has another form.
    """
    return tuple(
        _request(str(token), as_mapping(entry, f"tokenizer.tokens.{token}"), notes)
        for token, entry in as_mapping(value, "tokenizer.tokens").items()
    )


def _request(token: str, entry: Mapping[str, JsonValue], notes: list[str]) -> TokenRequest:
    where = f"tokenizer.tokens.{token}"
    check_keys(entry, ("source", "force"), where, notes)
    force = as_bool(entry.get("force", False))
    if force is None:
        raise UsageError(f"{where}.force must be true or false, found {quoted(entry['force'])}.")
    source = entry.get("source")
    kind = source.get("kind") if isinstance(source, Mapping) else None
    if source is None:
        if force:
            raise UsageError(f"{where}.force needs a source, the row that replaces the models' own.")
        return TokenRequest(token)
    if kind == "zero":
        return TokenRequest(token, zero=True, force=force)
    if kind is None:
        return TokenRequest(token, model_name(source, f"{where}.source"), force=force)
    if kind != "model_token":
        raise UsageError(f"{where}.source.kind must be model_token or zero, found {quoted(kind)}.")
    check_keys(source, ("kind", "model", "token", "token_id"), f"{where}.source", notes)
    by_token, by_id = source.get("token"), source.get("token_id")
    if (by_token is None) == (by_id is None):
        raise UsageError(f"{where}.source needs either token or token_id.")
    if by_id is not None and (type(by_id) is not int or by_id < 0):
        raise UsageError(f"{where}.source.token_id must be a whole number from 0, found {quoted(by_id)}.")
    name = model_name(source.get("model"), f"{where}.source.model")
    return TokenRequest(
        token, name, source_token=None if by_token is None else str(by_token), source_id=by_id, force=force
    )
