"""A merge recipe: method, models, parameters, and how to compute, from flags and from YAML. No weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UsageError, nearest
from common.files.bounded_reading import UnreadableError, read_yaml
from common.terminal_text import quoted
from merging.recipe.checks import check, check_values, remarks
from merging.recipe.mergekit import writer
from merging.recipe.mergekit.other_programs import refuse_other_programs, several_recipes
from merging.recipe.mergekit.reader import Draft, is_mergekit, read_mergekit
from merging.recipe.method_registry import MergeMethod, Parameter, find_method
from merging.recipe.options import PlanOptions
from merging.recipe.schedules import DTYPES, SETTINGS, OutputSlice, ParameterSchedule
from merging.recipe.tokens import TokenRequest

BUILT_IN_TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
"""Chat templates by name, as mergekit 0.1.5 has them: configs/chat_templates/NAME.jinja."""
__all__ = [
    "DTYPES",
    "SETTINGS",
    "MergeRecipe",
    "OutputSlice",
    "ParameterSchedule",
    "check_values",
    "make_recipe",
    "read_config",
    "remarks",
]


@dataclass(frozen=True)
class MergeRecipe:
    """Everything a merge depends on besides the weights.

    sources: where each parameter's value comes from; notes: what is to be said of the file that it was read from;
    dtype: of the result's floating-point tensors; "auto" keeps that of the template model. dtype_given: whether flags
    or file name one. options: the treatment of inputs that differ.
    """

    method: str
    models: tuple[str, ...]
    base_model: str | None
    output_slices: tuple[OutputSlice, ...]
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    dtype: str = "bfloat16"
    numerics: str = "float32"
    seed: int = 42
    tokenizer: str = "base"
    pad_to_multiple_of: int | None = None
    chat_template: str = "base"
    tokens: tuple[TokenRequest, ...] = ()
    exclude: str | None = None
    exclude_from: str = "base"
    notes: tuple[str, ...] = field(default=(), compare=False)
    dtype_given: bool = field(default=True, compare=False)
    options: PlanOptions = field(default_factory=PlanOptions)

    @property
    def is_plain(self) -> bool:
        """True where whole models are merged with one value per parameter, which is all that flags can express."""
        only = self.output_slices[0]
        is_whole = len(self.output_slices) == 1 and only.layers is None and only.module is None
        has_all_models = bool(self.models) and only.models == tuple(range(len(self.models)))
        is_constant = all(s.constant is not None for name in only.parameters for s in only.schedules(name))
        return is_whole and has_all_models and is_constant and not self.tokens

    @property
    def exclusion(self) -> dict[str, str]:
        """The keys of a file that say what is not merged."""
        return {"exclude": self.exclude, "exclude_from": self.exclude_from} if self.exclude else {}

    @property
    def stored_dtype(self) -> str | None:
        """dtype of the result's floating-point tensors; None keeps that of the template model."""
        return None if self.dtype == "auto" else self.dtype

    @property
    def uses_base(self) -> bool:
        """Whether the method starts from the base, which otherwise gives only tokenizer and config (and may itself be
        one of the models)."""
        policy = find_method(self.method).base
        everywhere = all(output_slice.layers is None or output_slice.base_layers for output_slice in self.output_slices)
        takes_part = self.base_model is not None and self.base_model not in self.models and everywhere
        return policy == "required" or (policy == "optional" and takes_part)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Each parameter's value, or list of values per model; a description of it where it varies."""
        view: dict[str, Any] = {}
        for name in self.output_slices[0].parameters:
            told = [_told(output_slice.parameters[name]) for output_slice in self.output_slices]
            view[name] = told[0] if all(one == told[0] for one in told) else told
        return view

    def as_yaml_dict(self) -> dict[str, Any]:
        """Return the recipe as --config takes it: with the flags' keys, or where they do not suffice in mergekit's."""
        if not self.is_plain:
            return writer.lossless(self)
        return {
            "method": self.method,
            **({"base_model": self.base_model} if self.base_model else {}),
            "models_to_merge": list(self.models),
            **self.parameters,
            **({"dtype": self.dtype} if self.dtype_given or self.dtype == "auto" else {}),
            "numerics": self.numerics,
            "seed": self.seed,
            "tokenizer": self.tokenizer,
            **({"pad_to_multiple_of": self.pad_to_multiple_of} if self.pad_to_multiple_of else {}),
            "chat_template": self.chat_template,
            **self.exclusion,
            **self.options.as_yaml_dict(),
        }


def _told(schedule: ParameterSchedule | tuple[ParameterSchedule, ...]) -> Any:
    if isinstance(schedule, tuple):
        return [_told(one) for one in schedule]
    return str(schedule) if schedule.constant is None else schedule.constant


def read_config(file: Path) -> dict[str, Any]:
    """Read a recipe's YAML. Raises UsageError for a file that is missing, no mapping, or no YAML."""
    try:
        documents = read_yaml(file)
    except FileNotFoundError:
        raise UsageError(f"--config {file} does not exist.") from None
    except UnreadableError as error:
        raise UsageError(f"--config {error}") from error
    except OSError as error:
        raise UsageError(f"--config {file} cannot be read ({error.strerror}).") from error
    if len(documents) > 1:
        raise UsageError(several_recipes(file, documents))
    data = documents[0] if documents else None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UsageError(f"--config {file} should hold keys and values, such as `method: ties`.")
    return data


def make_recipe(flags: Mapping[str, Any], config: Mapping[str, Any]) -> MergeRecipe:
    """Combine what the flags and the YAML (ours or mergekit's) say; flags win. Raises UsageError that names the key."""
    refuse_other_programs(config)
    draft = (
        read_mergekit(flags, config, _names(flags.get("models_to_merge")))
        if is_mergekit(config)
        else _read_flat(flags, config)
    )
    method, given = draft.method, draft.given
    base = given.get("base_model")
    if base is None and method.base == "required":
        raise UsageError(
            f"{method.name} needs --base_model (base_model in a file): it merges what each model changed of its base."
        )
    for output_slice in draft.output_slices:
        if output_slice.models:  # none where the base alone is listed
            _check_count(method, len(output_slice.models))
    numerics = _one_of("numerics", given.get("numerics", "float32"), ("float32", "reference"))
    recipe = MergeRecipe(
        method=method.name,
        models=draft.models,
        base_model=str(base) if base is not None else None,
        output_slices=draft.output_slices,
        sources=draft.sources,
        dtype=_one_of("dtype", given.get("dtype", "bfloat16"), (*DTYPES, "auto")),
        numerics=numerics,
        seed=_seed(given.get("seed", 42)),
        tokenizer=_tokenizer(given.get("tokenizer", "base")),
        pad_to_multiple_of=_multiple(given.get("pad_to_multiple_of")),
        chat_template=_template(given.get("chat_template", "base"), (*draft.models, *([str(base)] if base else []))),
        tokens=given.get("tokens", ()),
        exclude=_pattern(given.get("exclude")),
        exclude_from=_owner(given),
        notes=draft.notes,
        dtype_given=given.get("dtype", "auto") != "auto",
        options=PlanOptions(
            allow_config_mismatch=given.get("allow_config_mismatch", False),
            extra_tensors=given.get("extra_tensors"),
            keep_wide="dtype" not in given and numerics == "float32",
        ),
    )
    check(recipe, method)
    return recipe


def _read_flat(flags: Mapping[str, Any], config: Mapping[str, Any]) -> Draft:
    """Read the flags and a YAML that has their names."""
    given = {**config, **flags}
    if not given.get("method"):
        raise UsageError("--method is missing; `python merge.py --help` lists the methods.")
    method = find_method(str(given["method"]))
    for key in given:
        if key not in SETTINGS and key not in method.parameters:
            known = [*SETTINGS, *method.parameters]
            raise UsageError(f"{method.name} has no parameter {quoted(key)}.{nearest(key, known)}")
    models = _names(given.get("models_to_merge"))
    if not models:
        raise UsageError("--models_to_merge is missing: give the fine-tuned models as A,B,C.")
    _check_count(method, len(models))
    parameters: dict[str, ParameterSchedule | tuple[ParameterSchedule, ...]] = {}
    sources: dict[str, str] = {}
    for name, parameter in method.parameters.items():
        value, sources[name] = _value(parameter, name, flags, config, len(models))
        parameters[name] = (
            tuple(map(ParameterSchedule.fixed, value)) if parameter.per_model else ParameterSchedule.fixed(value)
        )
    output_slice = OutputSlice(models=tuple(range(len(models))), parameters=parameters)
    return Draft(method, models, (output_slice,), sources, given)


def _check_count(method: MergeMethod, n_models: int) -> None:
    if n_models < method.min_models:
        raise UsageError(f"{method.name} needs at least {method.min_models} models, {n_models} given.")
    if n_models > method.max_models:
        raise UsageError(f"{method.name} takes {method.max_models} model besides the base, {n_models} given.")


def _names(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)):
        raise UsageError(f"models_to_merge must be a list of names, found {quoted(value)}.")
    listed = tuple(str(name).strip() for name in names)
    if any(listed) and not all(listed):
        raise UsageError(f"models_to_merge has an empty name among {len(listed)}: is there a comma too many?")
    return tuple(name for name in listed if name)


def _value(
    parameter: Parameter, name: str, flags: Mapping[str, Any], config: Mapping[str, Any], n: int
) -> tuple[Any, str]:
    for source, values in (("flag", flags), ("config", config)):
        if values.get(name) is not None:
            return parameter.for_models(values[name], n), source
    if parameter.default is None:
        raise UsageError(f"--{name} must be given: {parameter.help}.")
    return parameter.for_models(parameter.default, n), f"default: {parameter.source}"


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise UsageError(
            f"{name} must be one of {', '.join(known)}, found {quoted(value)}.{nearest(str(value), known)}"
        )
    return str(value)


def _seed(value: Any) -> int:
    try:
        if isinstance(value, float | bool):
            raise ValueError
        return int(value)
    except (TypeError, ValueError):
        raise UsageError(f"seed must be a whole number, found {quoted(value)}.") from None


def _tokenizer(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise UsageError(f"tokenizer must be base, union or a model's name, found {quoted(value)}.")


def _multiple(value: Any) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise UsageError(f"pad_to_multiple_of must be a whole number from 1, found {quoted(value)}.")


def _pattern(value: Any) -> str | None:
    """The regular expression of `exclude`; a list of them matches what any of them matches."""
    if value is None:
        return None
    parts = value if isinstance(value, list) else [value]
    if not parts or not all(isinstance(part, str) and part for part in parts):
        raise UsageError(f"exclude must be a regular expression or a list of them, found {quoted(value)}.")
    for part in parts:
        try:
            re.compile(part)
        except re.error as error:
            raise UsageError(f"exclude {quoted(part)} is no regular expression ({error}).") from None
    return "|".join(parts)


def _owner(given: Mapping[str, Any]) -> str:
    owner = given.get("exclude_from")
    if owner is not None and given.get("exclude") is None:
        raise UsageError("exclude_from is the source of the excluded tensors: give exclude too.")
    return "base" if owner is None else str(owner)


def _template(value: Any, models: tuple[str, ...]) -> str:
    known = ("base", "auto", *BUILT_IN_TEMPLATES, *models)
    if isinstance(value, str) and (value in known or "{{" in value or "{%" in value):
        return value
    raise UsageError(
        f"chat_template must be base, auto, one of {', '.join(BUILT_IN_TEMPLATES)}, the name of one of the models or a "
        f"Jinja template, found {quoted(value)}.{nearest(str(value), known)}"
    )
