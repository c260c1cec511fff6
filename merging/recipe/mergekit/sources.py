"""Groups of sources in mergekit's YAML: `models`, `slices` or `modules`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from common.errors import UsageError
from common.files.json_values import JsonValue
from merging.recipe.mergekit.keys import check_keys, inside, places_of_general, places_of_parameters
from merging.recipe.mergekit.values import (
    Scope,
    as_list,
    as_mapping,
    layer_range,
    model_name,
    read_scope,
    with_revision,
)
from merging.recipe.method_registry import MergeMethod

LAYOUTS = ("models", "slices", "modules")


@dataclass(frozen=True)
class Source:
    """One model of a group: its path in the recipe, its layers (None: all) and its parameters."""

    where: str
    model: str
    layers: tuple[int, int] | None
    scope: Scope


@dataclass(frozen=True)
class Group:
    """Models that are merged into one range of layers, and the enclosing parameters, the nearest first."""

    where: str
    sources: tuple[Source, ...]
    scopes: tuple[Scope, ...]
    module: str | None = None
    base: str | None = None

    @property
    def is_slice(self) -> bool:
        """True where the sources have layer ranges."""
        return self.sources[0].layers is not None

    @property
    def all_scopes(self) -> tuple[Scope, ...]:
        """All parameter mappings of the group and its sources."""
        return (*self.scopes, *(source.scope for source in self.sources))


def read_groups(
    method: MergeMethod, config: Mapping[str, JsonValue], named: Sequence[str], notes: list[str]
) -> list[Group]:
    """Read every group of the recipe.

    Args:
        method: The recipe's method.
        config: The recipe.
        named: Models of --models_to_merge, which replace those of the file.
        notes: Receives a note for each key without effect.

    Raises:
        UsageError: Naming an invalid key with its path.
    """
    return _Reader(method, str(config.get("merge_method", "")), notes).groups(config, named)


@dataclass(frozen=True)
class _Reader:
    """Reader of the groups of one recipe; `notes` receives keys without effect."""

    method: MergeMethod
    written_method: str
    notes: list[str]

    def groups(self, config: Mapping[str, JsonValue], named: Sequence[str]) -> list[Group]:
        layouts = [key for key in LAYOUTS if config.get(key)]
        if named and layouts in (["slices"], ["modules"]):
            raise UsageError(
                f"--models_to_merge cannot replace the models of a file with {layouts[0]}, which names their layers; "
                "change the file."
            )
        if len(layouts) != 1 and not (named and not layouts):
            present = " and ".join(layouts) or "none"
            raise UsageError(f"A recipe has exactly one of {', '.join(LAYOUTS)}, found {present}.")
        outer = self._scope(config.get("parameters"), "parameters")
        if layouts == ["modules"]:
            return list(self._modules(config["modules"], outer))
        if layouts == ["slices"]:
            return self._stack(config["slices"], "slices", (outer,))
        return [self._whole(config.get("models") or [], "models", (outer,), named)]

    def _scope(self, value: JsonValue, where: str, of_model: bool = False) -> Scope:
        return read_scope(self.method, value, where, self.notes, of_model)

    def _modules(self, value: JsonValue, outer: Scope) -> Iterator[Group]:
        for name, content in as_mapping(value, "modules").items():
            where = f"modules.{name}"
            module = as_mapping(content, where)
            valid = ("models", "slices", "parameters")
            places = places_of_parameters(where) | places_of_general(valid)
            check_keys(module, valid, where, self.notes, places)
            scopes = (self._scope(module.get("parameters"), inside(where, "parameters")), outer)
            if bool(module.get("models")) == bool(module.get("slices")):
                raise UsageError(f"{where} should have either models or slices.")
            if module.get("slices"):
                yield from self._stack(module["slices"], inside(where, "slices"), scopes, str(name))
            else:
                yield self._whole(module["models"], inside(where, "models"), scopes, (), str(name))

    def _whole(
        self,
        value: JsonValue,
        where: str,
        scopes: tuple[Scope, ...],
        named: Sequence[str],
        module: str | None = None,
    ) -> Group:
        """Return the group of whole models; models named by a flag keep their parameters of the file."""
        entries = as_list(value, where) if value or not named else []
        sources = [self._source(entry, f"{where}[{i}]") for i, entry in enumerate(entries)]
        if named:
            by_name = {source.model: source for source in sources}
            sources = [by_name.get(name, Source("--models_to_merge", name, None, {})) for name in named]
        self._note_repeats(sources)
        return Group(where, tuple(sources), scopes, module)

    def _slices(
        self, value: JsonValue, where: str, scopes: tuple[Scope, ...], module: str | None = None
    ) -> Iterator[Group]:
        for i, entry in enumerate(as_list(value, where)):
            at = f"{where}[{i}]"
            content = as_mapping(entry, at)
            self._check_slice(content, at)
            listed = as_list(content.get("sources"), f"{at}.sources")
            sources = [self._source(s, f"{at}.sources[{k}]", sliced=True) for k, s in enumerate(listed)]
            lengths = {source.where: source.layers[1] - source.layers[0] for source in sources if source.layers}
            if len(set(lengths.values())) > 1:
                counts = ", ".join(f"{length} in {w}" for w, length in lengths.items())
                raise UsageError(
                    f"{at}: every source of a slice should have the same number of layers, found {counts}."
                )
            self._note_repeats(sources)
            base = content.get("base_model")
            yield Group(
                where=at,
                sources=tuple(sources),
                scopes=(self._scope(content.get("parameters"), f"{at}.parameters"), *scopes),
                module=module,
                base=None if base is None else model_name(base, f"{at}.base_model"),
            )

    def _stack(self, value: JsonValue, where: str, scopes: tuple[Scope, ...], module: str | None = None) -> list[Group]:
        """Return the groups of all slices, with a note where mergekit ignores sources of the last one."""
        groups = list(self._slices(value, where, scopes, module))
        first, last = len(groups[0].sources), len(groups[-1].sources)
        if last > first:
            self.notes.append(
                f"{where}: tensors after the layers are merged from all {last} sources of the last slice; mergekit "
                f"0.1.5 takes its first {first} there, as many as the first slice has."
            )
        return groups

    def _check_slice(self, content: Mapping[str, JsonValue], at: str) -> None:
        """Check the keys of a slice; its merge_method must be the recipe's."""
        valid = ("sources", "parameters", "base_model", "residual_weight", "merge_method")
        places = places_of_parameters(at) | places_of_general(valid)
        places |= dict.fromkeys(("model", "layer_range"), f"under `{at}.sources`")
        check_keys(content, valid, at, self.notes, places)
        if content.get("residual_weight") is not None:
            self.notes.append(f"{at}.residual_weight has no effect: mergekit 0.1.5 does nothing with it either.")
        slice_method = content.get("merge_method")
        if slice_method is not None and slice_method != self.written_method:
            raise UsageError(
                f"{at}.merge_method is {slice_method}; a recipe has one method for all its slices, "
                f"{self.written_method or 'given at the top level'}: merge in several runs."
            )
        if slice_method is not None:
            self.notes.append(f"{at}.merge_method has no effect: it repeats the recipe's.")

    def _source(self, entry: JsonValue, where: str, sliced: bool = False) -> Source:
        content = as_mapping(entry, where)
        valid = ("model", "parameters", "revision", *(["layer_range"] if sliced else []))
        places = places_of_parameters(where) | places_of_general()
        places["lora"] = "as part of the model: `model: BASE+ADAPTER`, or `model: {model: BASE, lora: ADAPTER}`"
        del places["models"]
        if not sliced and "layer_range" in content:
            self.notes.append(
                f"{where}.layer_range has no effect under `models`, where all layers are merged; `slices` takes some."
            )
            content = {key: value for key, value in content.items() if key != "layer_range"}
        check_keys(content, valid, where, self.notes, places)
        name = model_name(content.get("model"), f"{where}.model")
        return Source(
            where=where,
            model=with_revision(name, content.get("revision"), f"{where}.revision", self.notes),
            layers=layer_range(content.get("layer_range"), f"{where}.layer_range") if sliced else None,
            scope=self._scope(content.get("parameters"), f"{where}.parameters", of_model=True),
        )

    def _note_repeats(self, sources: Sequence[Source]) -> None:
        first_entries: dict[str, Source] = {}
        for source in sources:
            if source.model in first_entries:
                self.notes.append(
                    f"{source.where}: {source.model} is listed again (also as "
                    f"{first_entries[source.model].where}), and each entry counts; mergekit 0.1.5 refuses that."
                )
            first_entries[source.model] = source
