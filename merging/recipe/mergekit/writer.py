"""Writer of recipes in mergekit's YAML: for mergekit itself, or with this project's keys where mergekit has none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from common.files.json_values import JsonObject, JsonValue
from merging.recipe.merge_recipe import MergeRecipe
from merging.recipe.mergekit.values import plain, written_name
from merging.recipe.method_registry import MergeMethod, Parameter, find_method
from merging.recipe.schedules import OutputSlice, ParameterSchedule, ParameterValue

SHORTEST_TEMPLATE = 20
"""Characters; mergekit 0.1.5 takes a shorter chat template for a name."""


def as_mergekit(recipe: MergeRecipe) -> tuple[JsonObject, list[str]]:
    """Return the recipe for mergekit, and a note for each setting that mergekit cannot express.

    Every parameter is written, so that defaults do not matter, and dtype makes mergekit compute in float32.
    """
    method = find_method(recipe.method)
    compute = "bfloat16" if recipe.numerics == "reference" else "float32"
    base = recipe.base_model if _has_base(recipe, method) else None
    document = _document(recipe, method, base, strict=True)
    document["dtype"] = compute
    if recipe.dtype == "auto":
        del document["dtype"]  # mergekit then keeps the models' dtype and computes in it
    elif recipe.dtype != compute:
        document["out_dtype"] = recipe.dtype
    if recipe.tokenizer != "base" or recipe.pad_to_multiple_of or recipe.tokens:
        document |= _tokenizer(recipe)
    if _template_of_mergekit(recipe):
        document["chat_template"] = recipe.chat_template
    return document, list(_inexpressible(recipe, method, base))


def lossless(recipe: MergeRecipe) -> JsonObject:
    """Return a recipe in mergekit's form with this project's keys, so that reading it gives an equal recipe."""
    method = find_method(recipe.method)
    return {
        **_document(recipe, method, recipe.base_model, strict=False),
        **({"dtype": recipe.dtype} if recipe.has_dtype or recipe.dtype == "auto" else {}),
        **_tokenizer(recipe),
        "chat_template": recipe.chat_template,
        **recipe.exclusion,
        "numerics": recipe.numerics,
        "seed": recipe.seed,
        **recipe.options.as_yaml_dict(),
    }


def _tokenizer(recipe: MergeRecipe) -> JsonObject:
    """Return the keys for vocabulary, single tokens and padding."""
    if recipe.pad_to_multiple_of is None and not recipe.tokens:
        return {"tokenizer_source": recipe.tokenizer}
    tokens = {request.token: request.as_yaml_dict() for request in recipe.tokens}
    padding = {} if recipe.pad_to_multiple_of is None else {"pad_to_multiple_of": recipe.pad_to_multiple_of}
    return {"tokenizer": {"source": recipe.tokenizer, **({"tokens": tokens} if tokens else {}), **padding}}


def to_text(document: Mapping[str, JsonValue]) -> str:
    """Return YAML text in the order of the keys, with lists of numbers on one line."""
    return yaml.dump(dict(document), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def write_mergekit(folder: Path, document: Mapping[str, JsonValue], inexpressible: Sequence[str]) -> Path:
    """Write mergekit_config.yml with `inexpressible` as comments at its top; return the file."""
    file = folder / "mergekit_config.yml"
    comments = "".join(f"# {' '.join(sentence.split())}\n" for sentence in inexpressible)
    file.write_text(comments + to_text(document), encoding="utf-8")
    return file


class _Dumper(yaml.SafeDumper):
    """YAML dumper with lists of numbers inline, as in mergekit, and without aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _list(dumper: _Dumper, data: list[JsonValue]) -> yaml.SequenceNode:
    inline = all(isinstance(entry, int | float) for entry in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=inline)


_Dumper.add_representer(list, _list)


def _written_parameters(method: MergeMethod, strict: bool) -> dict[str, Parameter]:
    """Return {key: parameter} of a method; strict: only those that mergekit has."""
    listed = method.parameters.values()
    return {written_name(p): p for p in listed if p.mergekit.name is not None or not strict}


def _yaml_value(parameter: Parameter, schedule: ParameterSchedule, strict: bool) -> JsonValue:
    """Return a schedule as YAML: a value, a gradient over layers, or a list of filters with values.

    strict: only values that mergekit has.
    """
    by_word: dict[ParameterValue, bool] = {word: flag == "true" for flag, word in parameter.mergekit.values.items()}
    written: list[JsonObject] = []
    for part, values in schedule.rules:
        words = [by_word.get(value, parameter.mergekit.default if by_word and strict else value) for value in values]
        value = words if len(words) > 1 else words[0]
        written.append({"value": value} if part is None else {"filter": part, "value": value})
    return written[0]["value"] if len(written) == 1 and "filter" not in written[0] else written


def _document(recipe: MergeRecipe, method: MergeMethod, base: str | None, strict: bool) -> JsonObject:
    """Return method, models and parameters; parameters that are equal everywhere go to the top level.

    strict: only names and values that mergekit has.
    """
    shared: JsonObject = {}
    written = _written_parameters(method, strict)
    for key, parameter in written.items():
        schedules = {
            schedule for output_slice in recipe.output_slices for schedule in output_slice.schedules(parameter.name)
        }
        if len(schedules) == 1:
            shared[key] = _yaml_value(parameter, schedules.pop(), strict)
    local = {key: p for key, p in written.items() if key not in shared}
    return {
        "merge_method": recipe.method,
        **({"base_model": _model(base)} if base is not None else {}),
        **_layout(recipe, method, local, base, strict),
        **({"parameters": shared} if shared else {}),
    }


def _layout(
    recipe: MergeRecipe, method: MergeMethod, local: Mapping[str, Parameter], base: str | None, strict: bool
) -> JsonObject:
    """Return `models`, `slices` or `modules` with the parameters of `local`."""
    parts: dict[str | None, JsonObject] = {}
    for output_slice in recipe.output_slices:
        slice_parameters = {
            key: _yaml_value(p, output_slice.schedules(p.name)[0], strict)
            for key, p in local.items()
            if not p.per_model
        }
        entries = _entries(recipe, method, local, base, output_slice, strict)
        part = parts.setdefault(output_slice.module, {})
        if output_slice.layers is None:
            part |= {"models": entries, **({"parameters": slice_parameters} if slice_parameters else {})}
        else:
            part.setdefault("slices", []).append(
                {"sources": entries, **({"parameters": slice_parameters} if slice_parameters else {})}
            )
    return parts.get(None, {"modules": parts})


def _entries(
    recipe: MergeRecipe,
    method: MergeMethod,
    local: Mapping[str, Parameter],
    base: str | None,
    output_slice: OutputSlice,
    strict: bool,
) -> list[JsonObject]:
    """Return the models of an output slice, with the base where mergekit needs it."""
    entries: list[JsonObject] = []
    for i, position in enumerate(output_slice.models):
        parameters = {
            key: _yaml_value(p, output_slice.schedules(p.name)[i], strict) for key, p in local.items() if p.per_model
        }
        entries.append(
            {
                "model": _model(recipe.models[position]),
                **({"layer_range": list(output_slice.layers[i])} if output_slice.layers else {}),
                **({"parameters": parameters} if parameters else {}),
            }
        )
    listed = any(recipe.models[position] == base for position in output_slice.models)
    silent = method.base == "template" and not output_slice.layers and not listed
    if base is not None and (output_slice.base_layers or silent or not output_slice.models):
        entry = {
            "model": _model(base),
            **({"layer_range": list(output_slice.base_layers)} if output_slice.base_layers else {}),
            **({"parameters": {"weight": 0.0}} if method.base == "template" else {}),
        }
        entries.insert(0 if listed else len(entries), entry)  # the first of several entries of the base is the base
    return entries


def _has_base(recipe: MergeRecipe, method: MergeMethod) -> bool:
    """Return True where mergekit's base_model does not add the base to the models."""
    whole = any(output_slice.layers is None for output_slice in recipe.output_slices)
    counts = method.mergekit_counts_base
    return recipe.base_model in recipe.models or not (counts and whole) or "weights" in method.parameters


def _model(name: str) -> str | JsonObject:
    """Return a model for mergekit; a folder with @ or + in its path is written as a mapping."""
    odd = ("@" in name or "+" in name) and Path(name).expanduser().is_dir()
    return {"model": {"path": name}} if odd else name


def _template_of_mergekit(recipe: MergeRecipe) -> bool:
    """Return True where mergekit accepts the chat template; it accepts no model names."""
    written_out = "{{" in recipe.chat_template or "{%" in recipe.chat_template
    by_name = ("auto", "alpaca", "chatml", "exaone", "llama3", "mistral")
    return recipe.chat_template in by_name or (written_out and len(recipe.chat_template) >= SHORTEST_TEMPLATE)


def _inexpressible(recipe: MergeRecipe, method: MergeMethod, base: str | None) -> Iterator[str]:
    if not method.in_mergekit:
        yield f"mergekit has no method {method.name}."
    if base != recipe.base_model:
        yield (
            f"mergekit's {method.name} would count the base {recipe.base_model} among the models: base_model is left "
            "out, and with it whose config and tokenizer the result has."
        )
    for parameter in method.parameters.values():
        values = {
            v for output_slice in recipe.output_slices for s in output_slice.schedules(parameter.name) for v in s.values
        }
        mergekit = parameter.mergekit
        for value in sorted(map(str, values)):
            if mergekit.name is None and value != str(mergekit.always):
                yield f"{parameter.name} {value}: mergekit always does as {parameter.name} {mergekit.always}."
            if mergekit.values and value not in mergekit.values.values():
                yield (
                    f"{parameter.name} {value}: mergekit has only {' and '.join(mergekit.values.values())}; "
                    f"{plain(mergekit.default)} is written."
                )
    if method.mergekit_is_random:
        yield f"seed {recipe.seed}: mergekit draws its masks from other random numbers."
    if recipe.exclude is not None:
        yield f"exclude {recipe.exclude}: mergekit merges every tensor; here those are {recipe.exclude_from}'s."
    if recipe.chat_template != "base" and not _template_of_mergekit(recipe):
        yield f"chat_template {recipe.chat_template}: mergekit takes only auto, its own templates by name, and Jinja."
