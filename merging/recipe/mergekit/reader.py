"""Reader of mergekit's YAML: contributing models, output slices and parameter schedules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from common.errors import UsageError, nearest
from common.files.json_values import JsonObject, JsonValue
from common.terminal_text import quoted
from merging.recipe.merge_recipe import Draft
from merging.recipe.mergekit.keys import check_keys, places_of_parameters
from merging.recipe.mergekit.sources import LAYOUTS, Group, Source, read_groups
from merging.recipe.mergekit.values import as_mapping, model_name, plain, with_revision, written_name
from merging.recipe.method_registry import MergeMethod, Parameter, find_method
from merging.recipe.schedules import (
    DTYPES,
    RECIPE_KEYS,
    OutputSlice,
    ParameterSchedule,
    ParameterSetting,
    ParameterValue,
)
from merging.recipe.tokens import read_tokens

KEYS = (
    "merge_method", "base_model", *LAYOUTS, "parameters", "dtype", "out_dtype", "tokenizer", "tokenizer_source",
    "chat_template", "random_seed", "revision",
)  # fmt: skip
PROJECT_KEYS = ("numerics", "seed", "exclude", "exclude_from", "allow_config_mismatch", "extra_tensors")
"""Keys of this project that are allowed next to mergekit's."""


def is_mergekit(config: Mapping[str, JsonValue]) -> bool:
    """Return True for a YAML in mergekit's form instead of the flags' keys."""
    entries = [entry for key in LAYOUTS for entry in _entries(config.get(key))]
    return "merge_method" in config or any(isinstance(entry, Mapping) for entry in entries)


def _entries(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else list(value.values()) if isinstance(value, Mapping) else []


def read_mergekit(flags: Mapping[str, JsonValue], config: Mapping[str, JsonValue], named: Sequence[str]) -> Draft:
    """Read a recipe in mergekit's form.

    Args:
        flags: Flags, which override the file everywhere.
        config: Content of the file.
        named: Models of --models_to_merge, which replace those of the file.

    Raises:
        UsageError: Naming a key that is not supported, with its path.
    """
    notes: list[str] = []
    elsewhere = {
        **places_of_parameters(""),
        **dict.fromkeys(("model", "models_to_merge"), "under `models`, as a list of `model: NAME`"),
        **dict.fromkeys(("sources", "layer_range", "residual_weight"), "under `slices`"),
        "method": "as `merge_method`",
        "lora": "as part of a model: `model: BASE+ADAPTER`",
    }
    check_keys(config, (*KEYS, *PROJECT_KEYS), "", notes, elsewhere)
    method = _method(flags, config)
    groups = read_groups(method, config, named, notes)
    settings = _general(method, flags, config, groups, notes)
    base = settings.get("base_model")
    if method.base == "template" and base is not None:
        groups = [_with_base(group, method, base) for group in groups]
    contributors = [_contributors(group, method, base, notes) for group in groups]
    models = tuple(dict.fromkeys(source.model for sources in contributors for source in sources))
    fixed = {name: p.for_models(flags[name], len(models)) for name, p in method.parameters.items() if name in flags}
    output_slices = [_output_slice(g, s, method, models, fixed) for g, s in zip(groups, contributors, strict=True)]
    scopes = [scope for group in groups for scope in group.all_scopes]
    sources = {
        name: "flag" if name in fixed else "config" if any(name in s for s in scopes) else f"default: {_origin(p)}"
        for name, p in method.parameters.items()
    }
    lacking = [
        parameter
        for name, parameter in method.parameters.items()
        if not all(schedule.is_complete for output_slice in output_slices for schedule in output_slice.schedules(name))
    ]
    for parameter in lacking:
        if parameter.default is None and sources[parameter.name].startswith("default"):
            key = written_name(parameter)
            misplaced = [f" {note}" for note in notes if f".parameters.{key} has no effect" in note]
            raise UsageError(f"parameters.{key} must be given: {parameter.help}.{''.join(misplaced[:1])}")
    return Draft(
        method=method,
        models=models,
        output_slices=tuple(_completed(output_slice, lacking) for output_slice in output_slices),
        sources=sources,
        settings=settings,
        notes=tuple(dict.fromkeys((*notes, *_idle(method, groups, base), *_defaults(method, lacking, sources)))),
    )


def _method(flags: Mapping[str, JsonValue], config: Mapping[str, JsonValue]) -> MergeMethod:
    name = flags.get("method") or config.get("merge_method")
    if not name:
        raise UsageError("merge_method is missing; `python merge.py --help` lists the methods.")
    method = find_method(str(name))
    for flag in flags:
        if flag not in RECIPE_KEYS and flag not in method.parameters:
            valid = [*RECIPE_KEYS, *method.parameters]
            raise UsageError(f"{method.name} has no parameter {quoted(flag)}.{nearest(flag, valid)}")
    return method


def _general(
    method: MergeMethod,
    flags: Mapping[str, JsonValue],
    config: Mapping[str, JsonValue],
    groups: Sequence[Group],
    notes: list[str],
) -> JsonObject:
    """Return the general settings of flags and file, by this project's names."""
    settings = {"dtype": "auto"} if method.in_mergekit else {}
    settings |= {key: config[key] for key in (*PROJECT_KEYS, "chat_template") if config.get(key) is not None}
    for key in ("dtype", "out_dtype"):
        if config.get(key) is not None:
            settings["dtype"] = _dtype(config[key], key)
    settings |= _seed(method, flags, config, notes)
    if config.get("tokenizer") is not None and config.get("tokenizer_source") is not None:
        raise UsageError("A recipe has either tokenizer or tokenizer_source, found both.")
    if config.get("tokenizer_source") is not None:
        settings["tokenizer"] = _tokenizer_name(config["tokenizer_source"], "tokenizer_source")
    elif config.get("tokenizer") is not None:
        settings |= _tokenizer(config["tokenizer"], notes)
    bases = [(f"{group.where}.base_model", group.base) for group in groups if group.base is not None]
    if config.get("base_model") is not None:
        name = model_name(config["base_model"], "base_model")
        settings["base_model"] = with_revision(name, config.get("revision"), "revision", notes)
    elif config.get("revision") is not None:
        notes.append("revision has no effect: it belongs to no model.")
    if config.get("base_model") is None and bases:
        settings["base_model"] = bases[0][1]
    settings |= {key: value for key, value in flags.items() if key in RECIPE_KEYS}
    for where, base in bases:
        if base != settings["base_model"]:
            raise UsageError(f"{where} is {base}; a recipe has one base for all its slices, {settings['base_model']}.")
    return settings


def _seed(
    method: MergeMethod, flags: Mapping[str, JsonValue], config: Mapping[str, JsonValue], notes: list[str]
) -> JsonObject:
    """Return `random_seed` as `seed`; mergekit reads it only on its command line."""
    if config.get("random_seed") is None:
        return {}
    if not method.mergekit_is_random:
        notes.append(f"random_seed has no effect: {method.name} draws no random numbers.")
    elif "seed" in flags or config.get("seed") is not None:
        notes.append("random_seed has no effect: seed is given too.")
    else:
        notes.append(
            f"random_seed: {config['random_seed']} seeds the masks here; mergekit 0.1.5 reads a seed on its command "
            "line alone, and draws other masks."
        )
        return {"seed": config["random_seed"]}
    return {}


def _dtype(value: object, key: str) -> str:
    name = str(value).removeprefix("torch.")
    if name not in (*DTYPES, "auto"):
        raise UsageError(f"{key} must be one of {', '.join(DTYPES)}, found {quoted(value)}.{nearest(name, DTYPES)}")
    return name


def _tokenizer_name(value: object, where: str) -> str:
    """Return the tokenizer source: base, union, or a model (`model:NAME` in mergekit's early versions)."""
    return model_name(value, where).removeprefix("model:")


def _tokenizer(value: object, notes: list[str]) -> JsonObject:
    """Return mergekit's `tokenizer` (default source: union) as tokenizer, tokens and pad_to_multiple_of."""
    if isinstance(value, str):
        return {"tokenizer": _tokenizer_name(value, "tokenizer")}
    content = as_mapping(value, "tokenizer")
    check_keys(content, ("source", "tokens", "pad_to_multiple_of"), "tokenizer", notes)
    source = _tokenizer_name(content.get("source", "union"), "tokenizer.source")
    return {
        "tokenizer": source,
        "pad_to_multiple_of": content.get("pad_to_multiple_of"),
        "tokens": read_tokens(content.get("tokens"), notes),
    }


def _with_base(group: Group, method: MergeMethod, base: str) -> Group:
    """Return the group with the base among its models, as in mergekit for methods without a base."""
    counts = method.mergekit_counts_base
    if not counts or group.is_slice or any(source.model == base for source in group.sources):
        return group
    if "weights" in method.parameters and not any("weights" in scope for scope in group.scopes):
        raise UsageError(
            f"base_model: {method.name} in mergekit's form averages the base as well, and {base} has no weight; "
            f"list it under {group.where} with its weight (0: it gives only tokenizer and config)."
        )
    return replace(group, sources=(*group.sources, Source("base_model", base, None, {})))


def _contributors(group: Group, method: MergeMethod, base: str | None, notes: list[str]) -> tuple[Source, ...]:
    """Return the entries that are merged: all but the base, where the method starts from it or its weight is 0.

    In a slice that lists the base several times, the first entry is the base and the others are merged into it. Empty
    where only the base is listed: its tensors are copied.
    """
    counts = method.mergekit_counts_base
    if counts and method.base == "template":
        silent = [s for s in group.sources if s.model == base and _schedule("weights", s, group).constant == 0]
        return tuple(source for source in group.sources if source not in silent or len(group.sources) == 1)
    if counts:
        return group.sources
    listed = [source for source in group.sources if source.model == base]
    merged = tuple(source for source in group.sources if source.model != base)
    if len(listed) > 1 and group.is_slice:
        merged = tuple(source for source in group.sources if source is not listed[0])
    if not merged:
        notes.append(f"{group.where} lists only the base {base}: its tensors are copied.")
        return ()
    if group.is_slice and base is not None and not listed:
        raise UsageError(
            f"{group.where} names no layers of the base {base}, which {method.name} needs; add it to its sources."
        )
    return merged


def _output_slice(
    group: Group,
    sources: Sequence[Source],
    method: MergeMethod,
    models: tuple[str, ...],
    fixed: Mapping[str, ParameterSetting],
) -> OutputSlice:
    """Return the output slice of a group with the parameters of flags (`fixed`) and file."""
    positions = [models.index(source.model) for source in sources]
    parameters: dict[str, ParameterSchedule | tuple[ParameterSchedule, ...]] = {}
    for name, parameter in method.parameters.items():
        setting = fixed.get(name)
        if isinstance(setting, list):
            parameters[name] = tuple(ParameterSchedule.fixed(setting[position]) for position in positions)
        elif setting is not None:
            parameters[name] = ParameterSchedule.fixed(setting)
        elif parameter.per_model:
            parameters[name] = tuple(_schedule(name, source, group) for source in sources)
        else:  # a model's entry has it only for methods of one model
            parameters[name] = _schedule(name, sources[0] if sources else None, group)
    unmerged = [source.layers for source in group.sources if not any(source is merged for merged in sources)]
    return OutputSlice(
        models=tuple(positions),
        parameters=parameters,
        layers=tuple(s.layers for s in sources if s.layers is not None) if group.is_slice else None,
        base_layers=unmerged[0] if unmerged else None,
        module=group.module,
    )


def _schedule(name: str, source: Source | None, group: Group) -> ParameterSchedule:
    """Return the schedule of a parameter: the rules of the model, then those of the enclosing levels."""
    scopes = (*([source.scope] if source else []), *group.scopes)
    return ParameterSchedule.of(rule for scope in scopes for rule in scope.get(name, ()))


def _completed(output_slice: OutputSlice, lacking: Iterable[Parameter]) -> OutputSlice:
    """Return the output slice with mergekit's defaults, or this project's where mergekit requires a value."""
    parameters = dict(output_slice.parameters)
    for parameter in lacking:
        if parameter.default is not None:
            last = (None, (_default(parameter),))
            schedules = tuple(ParameterSchedule.of((*s.rules, last)) for s in output_slice.schedules(parameter.name))
            parameters[parameter.name] = schedules if parameter.per_model else schedules[0]
    return replace(output_slice, parameters=parameters)


def _default(parameter: Parameter) -> ParameterValue:
    default = parameter.mergekit.default
    if default is None:
        return parameter.parse(parameter.default)
    return parameter.parse(parameter.mergekit.values.get(plain(default), default))


def _origin(parameter: Parameter) -> str:
    return parameter.source if parameter.mergekit.default is None else "mergekit 0.1.5"


def _idle(method: MergeMethod, groups: Sequence[Group], base: str | None) -> Iterator[str]:
    """Yield a note for each entry of the base with parameters, which have no effect."""
    counts = method.mergekit_counts_base
    for source in (source for group in groups for source in group.sources):
        if source.model == base and source.scope and not counts:
            yield (f"{source.where}.parameters have no effect: {base} is the base, which the others are compared with.")


def _defaults(method: MergeMethod, lacking: Iterable[Parameter], sources: Mapping[str, str]) -> Iterator[str]:
    """Yield a note for each default from mergekit, and for a weight that mergekit requires."""
    for parameter in lacking:
        where = "not given everywhere" if sources[parameter.name] == "config" else "not given"
        if parameter.mergekit.default is not None:
            name, default = written_name(parameter), plain(parameter.mergekit.default)
            yield (
                f"{name} is {where}: {default}, as in mergekit; without a file the default is "
                f"{plain(parameter.default)} ({parameter.source})."
            )
        elif parameter.name == "weights" and method.in_mergekit:
            yield f"weight is {where}: {plain(parameter.default)} here; mergekit 0.1.5 requires it."
