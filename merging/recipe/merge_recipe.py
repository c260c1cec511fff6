"""Merge recipe: method, models, parameters, dtype, tokenizer and rules; everything a merge depends on but weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.errors import UsageError
from common.files.json_values import JsonObject, JsonValue
from common.terminal_text import quoted
from merging.recipe.method_registry import MergeMethod, find_method
from merging.recipe.schedules import OutputSlice, ParameterSchedule
from merging.recipe.tokens import TokenRequest

EXTRA_TENSORS = ("keep", "drop", "error")
PLAN_KEYS = ("allow_config_mismatch", "extra_tensors")
"""Recipe keys of `PlanOptions`."""


@dataclass(frozen=True)
class PlanOptions:
    """Rules for inputs that differ.

    Attributes:
        allow_config_mismatch: Merge models whose configs differ in keys that change the function of the weights.
        extra_tensors: Rule for tensors that not every input has: "keep" (as in the template model), "drop" or "error";
            None keeps multi-token prediction and refuses other tensors.
        keep_wide: Keep the dtype of tensors that every input stores in a wider dtype than its other tensors.
    """

    allow_config_mismatch: bool = False
    extra_tensors: str | None = None
    keep_wide: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        """Raise UsageError for invalid values."""
        if not isinstance(self.allow_config_mismatch, bool):
            raise UsageError(
                f"allow_config_mismatch must be true or false, found {quoted(self.allow_config_mismatch)}."
            )
        if self.extra_tensors not in (None, *EXTRA_TENSORS):
            raise UsageError(f"extra_tensors must be {', '.join(EXTRA_TENSORS)}, found {quoted(self.extra_tensors)}.")

    def as_yaml_dict(self) -> dict[str, object]:
        """Return the keys of a recipe that differ from the defaults."""
        return {
            **({"allow_config_mismatch": True} if self.allow_config_mismatch else {}),
            **({"extra_tensors": self.extra_tensors} if self.extra_tensors else {}),
        }


DEFAULTS = PlanOptions()


@dataclass(frozen=True)
class Draft:
    """A parsed recipe whose general settings are not checked yet."""

    method: MergeMethod
    models: tuple[str, ...]
    output_slices: tuple[OutputSlice, ...]
    sources: Mapping[str, str]
    settings: Mapping[str, JsonValue]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class MergeRecipe:
    """Everything a merge depends on besides the weights.

    Attributes:
        method: Name of the merge method.
        models: The models to merge, as users name them.
        base_model: The base; None where the method works without one.
        output_slices: Layers of the result with their models and parameters; one for whole models.
        sources: {parameter: "flag", "config" or "default: SOURCE"}.
        dtype: Dtype of the result's floating-point tensors; "auto" keeps that of the template model.
        numerics: "float32", or "reference" for the original program's bf16 arithmetic.
        seed: Seed of random masks.
        tokenizer: "base", "union", or a model's name.
        pad_to_multiple_of: The number of embedding rows is rounded up to a multiple of this.
        chat_template: "base", "auto", a name, a model's name, or Jinja text.
        tokens: Sources of rows for single tokens.
        exclude: Regular expression of tensors that are not merged.
        exclude_from: Source of the excluded tensors.
        notes: Notes on the file that the recipe was read from.
        has_dtype: True where flags or file set a dtype.
        options: Rules for inputs that differ.
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
    has_dtype: bool = field(default=True, compare=False)
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
    def model_names(self) -> list[str]:
        """The base, where there is one, and the models."""
        return [*([] if self.base_model is None else [self.base_model]), *self.models]

    @property
    def exclusion(self) -> dict[str, str]:
        """The YAML keys `exclude` and `exclude_from`; empty where nothing is excluded."""
        return {"exclude": self.exclude, "exclude_from": self.exclude_from} if self.exclude else {}

    @property
    def stored_dtype(self) -> str | None:
        """Dtype of the result's floating-point tensors; None keeps that of the template model."""
        return None if self.dtype == "auto" else self.dtype

    @property
    def uses_base(self) -> bool:
        """True where the method computes with the base; otherwise the base gives only tokenizer and config."""
        policy = find_method(self.method).base
        everywhere = all(output_slice.layers is None or output_slice.base_layers for output_slice in self.output_slices)
        takes_part = self.base_model is not None and self.base_model not in self.models and everywhere
        return policy == "required" or (policy == "optional" and takes_part)

    @property
    def parameters(self) -> Mapping[str, JsonValue]:
        """Value of each parameter, a list per model; a text where it varies over layers or tensors."""
        view: JsonObject = {}
        for name in self.output_slices[0].parameters:
            values = [_plain_value(output_slice.parameters[name]) for output_slice in self.output_slices]
            view[name] = values[0] if all(value == values[0] for value in values) else values
        return view


def _plain_value(schedule: ParameterSchedule | tuple[ParameterSchedule, ...]) -> JsonValue:
    if isinstance(schedule, tuple):
        return [_plain_value(one) for one in schedule]
    return str(schedule) if schedule.constant is None else schedule.constant
