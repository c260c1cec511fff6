"""A merge recipe: method, models, parameters, and how to compute, from flags and from YAML. No weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from console.errors import UsageError, nearest
from merging.registry import MergeMethod, Parameter, find_method

DTYPES = ("bfloat16", "float16", "float32")
SETTINGS = ("method", "base_model", "models_to_merge", "dtype", "numerics", "seed")
"""Keys of a recipe besides the method's own parameters; each is a flag of the same name."""


@dataclass(frozen=True)
class MergeRecipe:
    """Everything a merge depends on besides the weights."""

    method: str
    models: tuple[str, ...]
    base_model: str | None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "bfloat16"
    numerics: str = "float32"
    seed: int = 42

    def as_yaml_dict(self) -> dict[str, Any]:
        """Return the recipe as --config takes it."""
        return {
            "method": self.method,
            **({"base_model": self.base_model} if self.base_model else {}),
            "models_to_merge": list(self.models),
            **self.parameters,
            "dtype": self.dtype,
            "numerics": self.numerics,
            "seed": self.seed,
        }


def read_config(file: Path) -> dict[str, Any]:
    """Read a recipe's YAML. Raises UsageError for a file that is missing, no mapping, or no YAML."""
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"--config {file} does not exist.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {file} is not valid YAML ({' '.join(str(error).split())}).") from error
    except OSError as error:
        raise UsageError(f"--config {file} cannot be read ({error.strerror}).") from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UsageError(f"--config {file} should hold keys and values, such as `method: ties`.")
    return data


def make_recipe(flags: Mapping[str, Any], config: Mapping[str, Any]) -> MergeRecipe:
    """Combine what the flags and the YAML say; flags win. Raises UsageError naming what is wrong."""
    given = {**config, **flags}
    if not given.get("method"):
        raise UsageError("--method is missing; `python merge.py --help` lists the methods.")
    method = find_method(str(given["method"]))
    for key in given:
        if key not in SETTINGS and key not in method.parameters:
            known = [*SETTINGS, *method.parameters]
            raise UsageError(f"{method.name} has no parameter {key!r}.{nearest(key, known)}")
    models = _names(given.get("models_to_merge"))
    if not models:
        raise UsageError("--models_to_merge is missing: give the fine-tuned models as A,B,C.")
    if len(models) < method.min_models:
        raise UsageError(f"{method.name} needs at least {method.min_models} models, {len(models)} given.")
    if len(models) > method.max_models:
        raise UsageError(f"{method.name} takes {method.max_models} model besides the base, {len(models)} given.")
    base = given.get("base_model")
    if base is None and method.base == "required":
        raise UsageError(f"{method.name} needs --base_model: it merges what each model changed of its base.")
    parameters, sources = {}, {}
    for name, parameter in method.parameters.items():
        parameters[name], sources[name] = _value(parameter, name, flags, config, len(models))
    recipe = MergeRecipe(
        method=method.name,
        models=models,
        base_model=str(base) if base is not None else None,
        parameters=parameters,
        sources=sources,
        dtype=_one_of("dtype", given.get("dtype", "bfloat16"), DTYPES),
        numerics=_one_of("numerics", given.get("numerics", "float32"), ("float32", "reference")),
        seed=_seed(given.get("seed", 42)),
    )
    _check(recipe, method)
    return recipe


def _check(recipe: MergeRecipe, method: MergeMethod) -> None:
    if recipe.numerics == "reference" and not method.has_reference:
        raise UsageError(f"--numerics reference repeats the original program, which had no {method.name}.")
    densities = recipe.parameters.get("density", [])
    if recipe.numerics == "reference" and any(d < 1 for d in densities):
        raise UsageError(
            "--numerics reference reproduces the original program, which merged at density 1; add --density 1."
        )
    for density, epsilon in zip(densities, recipe.parameters.get("epsilon", []) if densities else [], strict=False):
        if density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            raise UsageError(
                f"{recipe.method} keeps entries with probability density - epsilon to density + epsilon, which must "
                f"lie between 0 and 1; found {density:g} and {epsilon:g}."
            )
    weights = recipe.parameters.get("weights", [1.0])
    divides = recipe.parameters.get("normalize_weights") or (
        method.base == "donor" and recipe.parameters.get("normalize")
    )
    if divides and abs(sum(weights)) < 1e-8:
        raise UsageError(f"{method.name} divides by the sum of the weights, which is 0; change --weights.")


def remarks(recipe: MergeRecipe) -> list[str]:
    """Return a sentence for each setting that does nothing."""
    said = []
    densities = recipe.parameters.get("density", [])
    if densities and all(d >= 1 for d in densities):
        what = "trims" if recipe.method == "ties" else "drops"
        said.append(f"density 1: {recipe.method} {what} nothing.")
    if recipe.method != "ties" and any(d == 0 for d in densities):
        said.append("density 0: everything of that model is dropped.")
    if len(recipe.models) == 1:
        said.append("One model: there is nothing to reconcile.")
    return said


def _value(
    parameter: Parameter, name: str, flags: Mapping[str, Any], config: Mapping[str, Any], n: int
) -> tuple[Any, str]:
    for source, values in (("flag", flags), ("config", config)):
        if values.get(name) is not None:
            return parameter.for_models(values[name], n), source
    if parameter.default is None:
        raise UsageError(f"--{name} must be given: {parameter.help}.")
    return parameter.for_models(parameter.default, n), f"default: {parameter.source}"


def _names(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)):
        raise UsageError(f"models_to_merge must be a list of names, found {value!r}.")
    return tuple(str(name).strip() for name in names if str(name).strip())


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise UsageError(f"{name} must be one of {', '.join(known)}, found {value!r}.{nearest(str(value), known)}")
    return str(value)


def _seed(value: Any) -> int:
    try:
        if isinstance(value, float | bool):
            raise ValueError
        return int(value)
    except (TypeError, ValueError):
        raise UsageError(f"seed must be a whole number, found {value!r}.") from None
