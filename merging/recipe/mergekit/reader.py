"""mergekit's YAML read as a recipe: which models contribute, and which value of a parameter holds where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from console.errors import UsageError, nearest
from merging.recipe.mergekit.sources import LAYOUTS, Group, Source, read_groups
from merging.recipe.mergekit.values import as_mapping, check_keys, model_name, plain, written_name
from merging.registry import MergeMethod, Parameter, find_method
from merging.settings import DTYPES, SETTINGS, Section, Setting

KEYS = (
    "merge_method", "base_model", *LAYOUTS, "parameters", "dtype", "out_dtype", "tokenizer", "tokenizer_source",
    "chat_template",
)  # fmt: skip
OURS = ("numerics", "seed")
"""General settings of ours that may stand beside mergekit's keys."""


@dataclass(frozen=True)
class Draft:
    """What was read: a recipe whose general settings (`given`) are not checked yet."""

    method: MergeMethod
    models: tuple[str, ...]
    sections: tuple[Section, ...]
    sources: Mapping[str, str]
    given: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def is_mergekit(config: Mapping[str, Any]) -> bool:
    """Whether a YAML is in mergekit's form rather than in ours with the flags' names."""
    entries = [entry for key in LAYOUTS for entry in _entries(config.get(key))]
    return "merge_method" in config or any(isinstance(entry, Mapping) for entry in entries)


def _entries(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else list(value.values()) if isinstance(value, Mapping) else []


def read_mergekit(flags: Mapping[str, Any], config: Mapping[str, Any], named: Sequence[str]) -> Draft:
    """Read a recipe in mergekit's form. A flag replaces everywhere what it names; `named` are --models_to_merge.

    Raises UsageError naming the key that is not understood, and where it stands.
    """
    check_keys(config, (*KEYS, *OURS), "")
    method = _method(flags, config)
    groups = read_groups(method, config, named)
    given = _general(flags, config, groups)
    base = given.get("base_model")
    if method.base == "donor" and base is not None:
        groups = [_with_base(group, method, base) for group in groups]
    contributors = [_contributors(group, method, base) for group in groups]
    models = tuple(dict.fromkeys(source.model for sources in contributors for source in sources))
    fixed = {name: p.for_models(flags[name], len(models)) for name, p in method.parameters.items() if name in flags}
    sections = [_section(g, s, base, method, models, fixed) for g, s in zip(groups, contributors, strict=True)]
    scopes = [scope for group in groups for scope in group.all_scopes]
    sources = {
        name: "flag" if name in fixed else "config" if any(name in s for s in scopes) else f"default: {p.source}"
        for name, p in method.parameters.items()
    }
    lacking = [
        parameter
        for name, parameter in method.parameters.items()
        if not all(setting.is_complete for section in sections for setting in section.settings(name))
    ]
    for parameter in lacking:
        if parameter.default is None and sources[parameter.name].startswith("default"):
            raise UsageError(f"parameters.{written_name(parameter)} must be given: {parameter.help}.")
    return Draft(
        method=method,
        models=models,
        sections=tuple(_completed(section, lacking) for section in sections),
        sources=sources,
        given=given,
        notes=(*_idle(method, groups, base), *_defaults(lacking, given)),
    )


def _method(flags: Mapping[str, Any], config: Mapping[str, Any]) -> MergeMethod:
    name = flags.get("method") or config.get("merge_method")
    if not name:
        raise UsageError("merge_method is missing; `python merge.py --help` lists the methods.")
    method = find_method(str(name))
    for flag in flags:
        if flag not in SETTINGS and flag not in method.parameters:
            known = [*SETTINGS, *method.parameters]
            raise UsageError(f"{method.name} has no parameter {flag!r}.{nearest(flag, known)}")
    return method


def _general(flags: Mapping[str, Any], config: Mapping[str, Any], groups: Sequence[Group]) -> dict[str, Any]:
    """The general settings that flags or file give, by our names."""
    given = {key: config[key] for key in (*OURS, "chat_template") if config.get(key) is not None}
    for key in ("dtype", "out_dtype"):
        if config.get(key) is not None:
            given["dtype"] = _dtype(config[key], key)
    if config.get("tokenizer") is not None and config.get("tokenizer_source") is not None:
        raise UsageError("A recipe has either tokenizer or tokenizer_source, found both.")
    if config.get("tokenizer_source") is not None:
        given["tokenizer"] = model_name(config["tokenizer_source"], "tokenizer_source")
    elif config.get("tokenizer") is not None:
        given |= _tokenizer(config["tokenizer"])
    bases = [(f"{group.where}.base_model", group.base) for group in groups if group.base is not None]
    if config.get("base_model") is not None:
        given["base_model"] = model_name(config["base_model"], "base_model")
    elif bases:
        given["base_model"] = bases[0][1]
    given |= {key: value for key, value in flags.items() if key in SETTINGS}
    for where, base in bases:
        if base != given["base_model"]:
            raise UsageError(f"{where} is {base}; a recipe has one base for all its slices, {given['base_model']}.")
    return given


def _dtype(value: Any, key: str) -> str:
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"{key} must be one of {', '.join(DTYPES)}, found {value!r}.{nearest(name, DTYPES)}")
    return name


def _tokenizer(value: Any) -> dict[str, Any]:
    """mergekit's `tokenizer`: whose vocabulary, which is the union of all where it does not say, and its padding."""
    if isinstance(value, str):
        return {"tokenizer": value}
    content = as_mapping(value, "tokenizer")
    check_keys(content, ("source", "tokens", "pad_to_multiple_of"), "tokenizer")
    if content.get("tokens"):
        raise UsageError("tokenizer.tokens is not supported; take it out (`source` is base, union or a model).")
    source = model_name(content.get("source", "union"), "tokenizer.source")
    return {"tokenizer": source, "pad_to_multiple_of": content.get("pad_to_multiple_of")}


def _with_base(group: Group, method: MergeMethod, base: str) -> Group:
    """The group with the base among its models, as mergekit has it for a method that does not know a base."""
    counts = method.mergekit is not None and method.mergekit.base_counts
    if not counts or group.is_slice or any(source.model == base for source in group.sources):
        return group
    if "weights" in method.parameters and not any("weights" in scope for scope in group.scopes):
        raise UsageError(
            f"base_model: {method.name} in mergekit's form averages the base as well, and {base} has no weight; "
            f"list it under {group.where} with its weight (0: it gives only tokenizer and config)."
        )
    return replace(group, sources=(*group.sources, Source("base_model", base, None, {})))


def _contributors(group: Group, method: MergeMethod, base: str | None) -> tuple[Source, ...]:
    """The models that are merged: all, but for the base where the method starts from it (or averages it with 0)."""
    counts = method.mergekit is not None and method.mergekit.base_counts
    if counts and method.base == "donor":
        silent = [s for s in group.sources if s.model == base and _setting("weights", s, group).constant == 0]
        return tuple(source for source in group.sources if source not in silent or len(group.sources) == 1)
    found = tuple(source for source in group.sources if counts or source.model != base)
    if not found:
        raise UsageError(f"{group.where} lists only the base {base}; add a model to merge into it.")
    if group.is_slice and base is not None and not counts and len(found) == len(group.sources):
        raise UsageError(
            f"{group.where} names no layers of the base {base}, which {method.name} needs; add it to its sources."
        )
    return found


def _section(
    group: Group,
    sources: Sequence[Source],
    base: str | None,
    method: MergeMethod,
    models: tuple[str, ...],
    fixed: Mapping[str, Any],
) -> Section:
    """The section of a group, its parameters as far as flags (`fixed`) and file give them."""
    positions = [models.index(source.model) for source in sources]
    parameters: dict[str, Setting | tuple[Setting, ...]] = {}
    for name, parameter in method.parameters.items():
        if name in fixed and parameter.per_model:
            parameters[name] = tuple(Setting.fixed(fixed[name][position]) for position in positions)
        elif name in fixed:
            parameters[name] = Setting.fixed(fixed[name])
        elif parameter.per_model:
            parameters[name] = tuple(_setting(name, source, group) for source in sources)
        else:  # a model's entry has it only where the method takes one model
            parameters[name] = _setting(name, sources[0], group)
    left = [source.layers for source in group.sources if source not in sources]
    return Section(
        models=tuple(positions),
        parameters=parameters,
        layers=tuple(s.layers for s in sources if s.layers is not None) if group.is_slice else None,
        base_layers=left[0] if left else None,
        module=group.module,
    )


def _setting(name: str, source: Source, group: Group) -> Setting:
    """What the file says of a parameter: the model's own rules, then those around it."""
    return Setting.of(rule for scope in (source.scope, *group.scopes) for rule in scope.get(name, ()))


def _completed(section: Section, lacking: Iterable[Parameter]) -> Section:
    """The section with our default where the file says nothing."""
    parameters = dict(section.parameters)
    for parameter in lacking:
        if parameter.default is not None:
            last = (None, (parameter.parse(parameter.default),))
            settings = tuple(Setting.of((*s.rules, last)) for s in section.settings(parameter.name))
            parameters[parameter.name] = settings if parameter.per_model else settings[0]
    return replace(section, parameters=parameters)


def _idle(method: MergeMethod, groups: Sequence[Group], base: str | None) -> Iterator[str]:
    """A sentence for each thing in the file that changes nothing."""
    counts = method.mergekit is not None and method.mergekit.base_counts
    for source in (source for group in groups for source in group.sources):
        if source.model == base and source.scope and not counts:
            yield f"{source.where}.parameters change nothing: {base} is the base, which the others are compared with."
    for key in method.mergekit.idle if method.mergekit else ():
        if any(key in scope for group in groups for scope in group.all_scopes):
            yield f"{key} changes nothing here."


def _defaults(lacking: Iterable[Parameter], given: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each default that is not mergekit's."""
    for parameter in lacking:
        if parameter.mergekit.default is not None:
            name, theirs = written_name(parameter), plain(parameter.mergekit.default)
            yield (
                f"{name} is not given: {plain(parameter.default)} here ({parameter.source}); "
                f"mergekit would take {theirs}: write `{name}: {theirs}` for that."
            )
    if "dtype" not in given:
        yield "dtype is not given: bfloat16 here; mergekit would keep the models' own."
