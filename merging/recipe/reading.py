"""Reading of merge recipes from flags and YAML, and their YAML form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from common.errors import UsageError, nearest
from common.files.bounded_reading import UnreadableError, read_yaml
from common.files.json_values import JsonObject, JsonValue
from common.terminal_text import quoted
from merging.recipe.checks import check
from merging.recipe.merge_recipe import Draft, MergeRecipe, PlanOptions
from merging.recipe.mergekit import writer
from merging.recipe.mergekit.other_programs import refuse_other_programs, several_recipes
from merging.recipe.mergekit.reader import is_mergekit, read_mergekit
from merging.recipe.method_registry import MergeMethod, Parameter, find_method
from merging.recipe.schedules import DTYPES, RECIPE_KEYS, OutputSlice, ParameterSchedule, ParameterSetting

BUILT_IN_TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")
"""Names of mergekit 0.1.5's chat templates: configs/chat_templates/NAME.jinja."""


def recipe_as_yaml(recipe: MergeRecipe) -> JsonObject:
    """Return a recipe as a YAML mapping for --config: with the flags' keys, or else in mergekit's form."""
    if not recipe.is_plain:
        return writer.lossless(recipe)
    return {
        "method": recipe.method,
        **({"base_model": recipe.base_model} if recipe.base_model else {}),
        "models_to_merge": list(recipe.models),
        **recipe.parameters,
        **({"dtype": recipe.dtype} if recipe.has_dtype or recipe.dtype == "auto" else {}),
        "numerics": recipe.numerics,
        "seed": recipe.seed,
        "tokenizer": recipe.tokenizer,
        **({"pad_to_multiple_of": recipe.pad_to_multiple_of} if recipe.pad_to_multiple_of else {}),
        "chat_template": recipe.chat_template,
        **recipe.exclusion,
        **recipe.options.as_yaml_dict(),
    }


def read_config(file: Path) -> JsonObject:
    """Read a recipe's YAML. Raises UsageError for a file that is missing, no YAML, or no mapping."""
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


def make_recipe(flags: Mapping[str, JsonValue], config: Mapping[str, JsonValue]) -> MergeRecipe:
    """Return the recipe of flags and YAML; flags override the YAML.

    Args:
        flags: {flag without dashes: value} of the flags that were set.
        config: Content of the YAML, in this project's or mergekit's form.

    Raises:
        UsageError: Naming the key.
    """
    refuse_other_programs(config)
    draft = (
        read_mergekit(flags, config, _names(flags.get("models_to_merge")))
        if is_mergekit(config)
        else _read_flat(flags, config)
    )
    method, keys = draft.method, draft.settings
    base = keys.get("base_model")
    if base is None and method.base == "required":
        raise UsageError(
            f"{method.name} needs --base_model (base_model in a file): it merges what each model changed of its base."
        )
    for output_slice in draft.output_slices:
        if output_slice.models:  # empty where only the base is listed
            _check_count(method, len(output_slice.models))
    numerics = _one_of("numerics", keys.get("numerics", "float32"), ("float32", "reference"))
    recipe = MergeRecipe(
        method=method.name,
        models=draft.models,
        base_model=str(base) if base is not None else None,
        output_slices=draft.output_slices,
        sources=draft.sources,
        dtype=_one_of("dtype", keys.get("dtype", "bfloat16"), (*DTYPES, "auto")),
        numerics=numerics,
        seed=_seed(keys.get("seed", 42)),
        tokenizer=_tokenizer(keys.get("tokenizer", "base")),
        pad_to_multiple_of=_multiple(keys.get("pad_to_multiple_of")),
        chat_template=_template(keys.get("chat_template", "base"), (*draft.models, *([str(base)] if base else []))),
        tokens=keys.get("tokens", ()),
        exclude=_pattern(keys.get("exclude")),
        exclude_from=_owner(keys),
        notes=draft.notes,
        has_dtype=keys.get("dtype", "auto") != "auto",
        options=PlanOptions(
            allow_config_mismatch=keys.get("allow_config_mismatch", False),
            extra_tensors=keys.get("extra_tensors"),
            keep_wide="dtype" not in keys and numerics == "float32",
        ),
    )
    check(recipe, method)
    return recipe


def _read_flat(flags: Mapping[str, JsonValue], config: Mapping[str, JsonValue]) -> Draft:
    """Read flags, and a YAML with the same keys."""
    keys = {**config, **flags}
    if not keys.get("method"):
        raise UsageError("--method is missing; `python merge.py --help` lists the methods.")
    method = find_method(str(keys["method"]))
    for key in keys:
        if key not in RECIPE_KEYS and key not in method.parameters:
            valid_keys = [*RECIPE_KEYS, *method.parameters]
            raise UsageError(f"{method.name} has no parameter {quoted(key)}.{nearest(key, valid_keys)}")
    models = _names(keys.get("models_to_merge"))
    if not models:
        raise UsageError("--models_to_merge is missing: give the fine-tuned models as A,B,C.")
    _check_count(method, len(models))
    parameters: dict[str, ParameterSchedule | tuple[ParameterSchedule, ...]] = {}
    sources: dict[str, str] = {}
    for name, parameter in method.parameters.items():
        value, sources[name] = _value(parameter, name, flags, config, len(models))
        parameters[name] = (
            tuple(map(ParameterSchedule.fixed, value)) if isinstance(value, list) else ParameterSchedule.fixed(value)
        )
    output_slice = OutputSlice(models=tuple(range(len(models))), parameters=parameters)
    return Draft(method, models, (output_slice,), sources, keys)


def _check_count(method: MergeMethod, n_models: int) -> None:
    if n_models < method.min_models:
        raise UsageError(f"{method.name} needs at least {method.min_models} models, {n_models} given.")
    if n_models > method.max_models:
        raise UsageError(f"{method.name} takes {method.max_models} model besides the base, {n_models} given.")


def _names(value: object) -> tuple[str, ...]:
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
    parameter: Parameter, name: str, flags: Mapping[str, JsonValue], config: Mapping[str, JsonValue], n: int
) -> tuple[ParameterSetting, str]:
    for source, values in (("flag", flags), ("config", config)):
        if values.get(name) is not None:
            return parameter.for_models(values[name], n), source
    if parameter.default is None:
        raise UsageError(f"--{name} must be given: {parameter.help}.")
    return parameter.for_models(parameter.default, n), f"default: {parameter.source}"


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise UsageError(
            f"{name} must be one of {', '.join(choices)}, found {quoted(value)}.{nearest(str(value), choices)}"
        )
    return str(value)


def _seed(value: JsonValue) -> int:
    try:
        if isinstance(value, float | bool):
            raise ValueError
        return int(value)
    except (TypeError, ValueError):
        raise UsageError(f"seed must be a whole number, found {quoted(value)}.") from None


def _tokenizer(value: object) -> str:
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise UsageError(f"tokenizer must be base, union or a model's name, found {quoted(value)}.")


def _multiple(value: object) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise UsageError(f"pad_to_multiple_of must be a whole number from 1, found {quoted(value)}.")


def _pattern(value: JsonValue) -> str | None:
    """Return the regular expression of `exclude`; a list becomes an alternation."""
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


def _owner(keys: Mapping[str, JsonValue]) -> str:
    owner = keys.get("exclude_from")
    if owner is not None and keys.get("exclude") is None:
        raise UsageError("exclude_from is the source of the excluded tensors: give exclude too.")
    return "base" if owner is None else str(owner)


def _template(value: object, models: tuple[str, ...]) -> str:
    choices = ("base", "auto", *BUILT_IN_TEMPLATES, *models)
    if isinstance(value, str) and (value in choices or "{{" in value or "{%" in value):
        return value
    raise UsageError(
        f"chat_template must be base, auto, one of {', '.join(BUILT_IN_TEMPLATES)}, the name of one of the models or a "
        f"Jinja template, found {quoted(value)}.{nearest(str(value), choices)}"
    )
