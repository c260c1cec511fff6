"""A recipe written in mergekit's YAML: for mergekit itself, or with our own words where mergekit has none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from merging.recipe.mergekit.values import plain, written_name
from merging.recipe.method_registry import MergeMethod, Parameter, find_method
from merging.recipe.schedules import OutputSlice, ParameterSchedule

if TYPE_CHECKING:
    from merging.recipe.merge_recipe import MergeRecipe

SHORTEST_TEMPLATE = 20
"""mergekit 0.1.5 takes a shorter chat template for a mistaken name."""


def as_mergekit(recipe: MergeRecipe) -> tuple[dict[str, Any], list[str]]:
    """Return the recipe as mergekit takes it, and a sentence for each thing that mergekit cannot express.

    Every parameter is written, so that mergekit takes the same values, and it is told to compute in float32.
    """
    method = find_method(recipe.method)
    compute = "bfloat16" if recipe.numerics == "reference" else "float32"
    base = recipe.base_model if _has_base(recipe, method) else None
    document = _document(recipe, method, _ParameterWriter(method, strict=True), base)
    document["dtype"] = compute
    if recipe.dtype == "auto":
        del document["dtype"]  # mergekit then keeps the models' own, and computes in it
    elif recipe.dtype != compute:
        document["out_dtype"] = recipe.dtype
    if recipe.tokenizer != "base" or recipe.pad_to_multiple_of or recipe.tokens:
        document |= _tokenizer(recipe)
    if _template_of_mergekit(recipe):
        document["chat_template"] = recipe.chat_template
    return document, list(_inexpressible(recipe, method, base))


def lossless(recipe: MergeRecipe) -> dict[str, Any]:
    """Return any recipe in mergekit's form with our own words and settings beside, so that it reads back equal."""
    method = find_method(recipe.method)
    return {
        **_document(recipe, method, _ParameterWriter(method, strict=False), recipe.base_model),
        **({"dtype": recipe.dtype} if recipe.dtype_given or recipe.dtype == "auto" else {}),
        **_tokenizer(recipe),
        "chat_template": recipe.chat_template,
        **recipe.exclusion,
        "numerics": recipe.numerics,
        "seed": recipe.seed,
        **recipe.options.as_yaml_dict(),
    }


def _tokenizer(recipe: MergeRecipe) -> dict[str, Any]:
    """Whose vocabulary, and what its rows are rounded up to."""
    if recipe.pad_to_multiple_of is None and not recipe.tokens:
        return {"tokenizer_source": recipe.tokenizer}
    tokens = {request.token: request.as_yaml_dict() for request in recipe.tokens}
    padding = {} if recipe.pad_to_multiple_of is None else {"pad_to_multiple_of": recipe.pad_to_multiple_of}
    return {"tokenizer": {"source": recipe.tokenizer, **({"tokens": tokens} if tokens else {}), **padding}}


def to_text(document: Mapping[str, Any]) -> str:
    """Return YAML in the order of the keys, with lists of numbers on one line."""
    return yaml.dump(dict(document), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def write_mergekit(folder: Path, document: Mapping[str, Any], unsaid: Sequence[str]) -> Path:
    """Write mergekit_config.yml, what mergekit cannot express as comments above it; returns the file."""
    file = folder / "mergekit_config.yml"
    comments = "".join(f"# {' '.join(sentence.split())}\n" for sentence in unsaid)
    file.write_text(comments + to_text(document), encoding="utf-8")
    return file


class _Dumper(yaml.SafeDumper):
    """Writes lists of numbers inline, as mergekit does, and equal values in full instead of by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _list(dumper: _Dumper, data: list[Any]) -> yaml.SequenceNode:
    inline = all(isinstance(entry, int | float) for entry in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=inline)


_Dumper.add_representer(list, _list)


@dataclass(frozen=True)
class _ParameterWriter:
    """How the method's parameters are called and valued; strict: only as mergekit itself has them."""

    method: MergeMethod
    strict: bool

    def parameters(self) -> dict[str, Parameter]:
        """The parameters that can be written, by the key they are written under."""
        listed = self.method.parameters.values()
        return {written_name(p): p for p in listed if p.mergekit.name is not None or not self.strict}

    def yaml_value(self, parameter: Parameter, schedule: ParameterSchedule) -> Any:
        """A setting as YAML: a value, a list over the layers, or a list of filters with their values."""
        written: list[dict[str, Any]] = []
        for part, values in schedule.rules:
            writer = [self._value(parameter, value) for value in values]
            value = writer if len(writer) > 1 else writer[0]
            written.append({"value": value} if part is None else {"filter": part, "value": value})
        return written[0]["value"] if len(written) == 1 and "filter" not in written[0] else written

    def _value(self, parameter: Parameter, value: Any) -> Any:
        theirs = {ours: theirs == "true" for theirs, ours in parameter.mergekit.values.items()}
        return theirs.get(value, parameter.mergekit.default if theirs and self.strict else value)


def _document(recipe: MergeRecipe, method: MergeMethod, writer: _ParameterWriter, base: str | None) -> dict[str, Any]:
    """The method, the models and the parameters; what is alike everywhere stands at the top."""
    shared: dict[str, Any] = {}
    for key, parameter in writer.parameters().items():
        schedules = {
            schedule for output_slice in recipe.output_slices for schedule in output_slice.schedules(parameter.name)
        }
        if len(schedules) == 1:
            shared[key] = writer.yaml_value(parameter, schedules.pop())
    own = {key: p for key, p in writer.parameters().items() if key not in shared}
    return {
        "merge_method": recipe.method,
        **({"base_model": _model(base)} if base is not None else {}),
        **_layout(recipe, method, writer, own, base),
        **({"parameters": shared} if shared else {}),
    }


def _layout(
    recipe: MergeRecipe, method: MergeMethod, writer: _ParameterWriter, own: Mapping[str, Parameter], base: str | None
) -> dict[str, Any]:
    """`models`, `slices` or `modules` with the parameters in `own`."""
    parts: dict[str | None, dict[str, Any]] = {}
    for output_slice in recipe.output_slices:
        around = {
            key: writer.yaml_value(p, output_slice.schedules(p.name)[0]) for key, p in own.items() if not p.per_model
        }  # fmt: skip
        entries = _entries(recipe, method, writer, own, base, output_slice)
        part = parts.setdefault(output_slice.module, {})
        if output_slice.layers is None:
            part |= {"models": entries, **({"parameters": around} if around else {})}
        else:
            part.setdefault("slices", []).append({"sources": entries, **({"parameters": around} if around else {})})
    return parts.get(None, {"modules": parts})


def _entries(
    recipe: MergeRecipe,
    method: MergeMethod,
    writer: _ParameterWriter,
    own: Mapping[str, Parameter],
    base: str | None,
    output_slice: OutputSlice,
) -> list[dict[str, Any]]:
    """The models of a section; the base among them where it must be named."""
    entries: list[dict[str, Any]] = []
    for i, position in enumerate(output_slice.models):
        parameters = {
            key: writer.yaml_value(p, output_slice.schedules(p.name)[i]) for key, p in own.items() if p.per_model
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
        entries.insert(0 if listed else len(entries), entry)  # of several entries of the base the first is the base
    return entries


def _has_base(recipe: MergeRecipe, method: MergeMethod) -> bool:
    """Whether mergekit can be given the base without counting it among the models."""
    whole = any(output_slice.layers is None for output_slice in recipe.output_slices)
    counts = method.mergekit is not None and method.mergekit.base_counts
    return recipe.base_model in recipe.models or not (counts and whole) or "weights" in method.parameters


def _model(name: str) -> Any:
    """A model as mergekit names it: a folder with @ or + in its path must not be read as a revision or adapter."""
    odd = ("@" in name or "+" in name) and Path(name).expanduser().is_dir()
    return {"model": {"path": name}} if odd else name


def _template_of_mergekit(recipe: MergeRecipe) -> bool:
    """Whether mergekit understands the chat template: it knows none by the name of a model."""
    written_out = "{{" in recipe.chat_template or "{%" in recipe.chat_template
    by_name = ("auto", "alpaca", "chatml", "exaone", "llama3", "mistral")
    return recipe.chat_template in by_name or (written_out and len(recipe.chat_template) >= SHORTEST_TEMPLATE)


def _inexpressible(recipe: MergeRecipe, method: MergeMethod, base: str | None) -> Iterator[str]:
    if method.mergekit is None:
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
        theirs = parameter.mergekit
        for value in sorted(map(str, values)):
            if theirs.name is None and value != str(theirs.always):
                yield f"{parameter.name} {value}: mergekit always does as {parameter.name} {theirs.always}."
            if theirs.values and value not in theirs.values.values():
                yield (
                    f"{parameter.name} {value}: mergekit has only {' and '.join(theirs.values.values())}; "
                    f"{plain(theirs.default)} is written."
                )
    if method.mergekit is not None and method.mergekit.random:
        yield f"seed {recipe.seed}: mergekit draws its masks from other random numbers."
    if recipe.exclude is not None:
        yield f"exclude {recipe.exclude}: mergekit merges every tensor; here those are {recipe.exclude_from}'s."
    if recipe.chat_template != "base" and not _template_of_mergekit(recipe):
        yield f"chat_template {recipe.chat_template}: mergekit takes only auto, its own templates by name, and Jinja."
