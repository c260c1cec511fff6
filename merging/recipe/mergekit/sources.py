"""Which models mergekit's YAML names, whole or by layers: `models`, `slices` or `modules` as groups of sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from console.errors import UsageError
from merging.recipe.mergekit.values import (
    Scope,
    as_list,
    as_mapping,
    check_keys,
    inside,
    layer_range,
    model_name,
    read_scope,
)
from merging.registry import MergeMethod

LAYOUTS = ("models", "slices", "modules")


@dataclass(frozen=True)
class Source:
    """One model of a group: where it stands, its layers (None: all) and its own parameters."""

    where: str
    model: str
    layers: tuple[int, int] | None
    scope: Scope


@dataclass(frozen=True)
class Group:
    """The models that are merged into one run of layers, and the parameters around them, the nearest first."""

    where: str
    sources: tuple[Source, ...]
    scopes: tuple[Scope, ...]
    module: str | None = None
    base: str | None = None

    @property
    def is_slice(self) -> bool:
        """Whether the layers are given."""
        return self.sources[0].layers is not None

    @property
    def all_scopes(self) -> tuple[Scope, ...]:
        """Every place where the group's parameters are set."""
        return (*self.scopes, *(source.scope for source in self.sources))


def read_groups(method: MergeMethod, config: Mapping[str, Any], named: Sequence[str]) -> list[Group]:
    """Read every group of the recipe; `named` models (of a flag) stand for those of the file. Raises UsageError."""
    given = [key for key in LAYOUTS if config.get(key)]
    if named and given in (["slices"], ["modules"]):
        raise UsageError(
            f"--models_to_merge cannot stand for the models of a file with {given[0]}, which names their layers; "
            "change the file."
        )
    if len(given) != 1 and not (named and not given):
        found = " and ".join(given) or "none"
        raise UsageError(f"A recipe has exactly one of {', '.join(LAYOUTS)}, found {found}.")
    outer = read_scope(method, config.get("parameters"), "parameters")
    if given == ["modules"]:
        return list(_modules(method, config["modules"], outer))
    if given == ["slices"]:
        return list(_slices(method, config["slices"], "slices", (outer,)))
    group = _whole(method, config.get("models") or [], "models", (outer,), named)
    return [group]


def _modules(method: MergeMethod, value: Any, outer: Scope) -> Iterator[Group]:
    for name, content in as_mapping(value, "modules").items():
        where = f"modules.{name}"
        module = as_mapping(content, where)
        check_keys(module, ("models", "slices", "parameters"), where)
        scopes = (read_scope(method, module.get("parameters"), inside(where, "parameters")), outer)
        if bool(module.get("models")) == bool(module.get("slices")):
            raise UsageError(f"{where} should have either models or slices.")
        if module.get("slices"):
            yield from _slices(method, module["slices"], inside(where, "slices"), scopes, str(name))
        else:
            yield _whole(method, module["models"], inside(where, "models"), scopes, (), str(name))


def _whole(
    method: MergeMethod,
    value: Any,
    where: str,
    scopes: tuple[Scope, ...],
    named: Sequence[str],
    module: str | None = None,
) -> Group:
    """The group of whole models; those that a flag names keep the parameters that the file has for them."""
    entries = as_list(value, where) if value or not named else []
    sources = [_source(method, entry, f"{where}[{i}]") for i, entry in enumerate(entries)]
    if named:
        known = {source.model: source for source in sources}
        sources = [known.get(name, Source("--models_to_merge", name, None, {})) for name in named]
    return Group(where, _distinct(sources), scopes, module)


def _slices(
    method: MergeMethod, value: Any, where: str, scopes: tuple[Scope, ...], module: str | None = None
) -> Iterator[Group]:
    for i, entry in enumerate(as_list(value, where)):
        at = f"{where}[{i}]"
        content = as_mapping(entry, at)
        check_keys(content, ("sources", "parameters", "base_model", "residual_weight"), at)
        if content.get("residual_weight") is not None:
            raise UsageError(
                f"{at}.residual_weight is not supported (mergekit 0.1.5 does nothing with it); take it out."
            )
        listed = as_list(content.get("sources"), f"{at}.sources")
        sources = [_source(method, s, f"{at}.sources[{k}]", sliced=True) for k, s in enumerate(listed)]
        lengths = {source.where: source.layers[1] - source.layers[0] for source in sources if source.layers}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{length} in {w}" for w, length in lengths.items())
            raise UsageError(f"{at}: every source of a slice should have the same number of layers, found {told}.")
        base = content.get("base_model")
        yield Group(
            where=at,
            sources=_distinct(sources),
            scopes=(read_scope(method, content.get("parameters"), f"{at}.parameters"), *scopes),
            module=module,
            base=None if base is None else model_name(base, f"{at}.base_model"),
        )


def _source(method: MergeMethod, entry: Any, where: str, sliced: bool = False) -> Source:
    content = as_mapping(entry, where)
    check_keys(content, ("model", "parameters", *(["layer_range"] if sliced else [])), where)
    return Source(
        where=where,
        model=model_name(content.get("model"), f"{where}.model"),
        layers=layer_range(content.get("layer_range"), f"{where}.layer_range") if sliced else None,
        scope=read_scope(method, content.get("parameters"), f"{where}.parameters", of_model=True),
    )


def _distinct(sources: Sequence[Source]) -> tuple[Source, ...]:
    seen: dict[str, Source] = {}
    for source in sources:
        if source.model in seen:
            raise UsageError(f"{source.where}: {source.model} is listed twice (also as {seen[source.model].where}).")
        seen[source.model] = source
    return tuple(sources)
