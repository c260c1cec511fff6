"""One merge of adapters from its recipe: open them, decide everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from common.errors import HeadersUnknownError, UsageError
from common.files.paths import read_json
from merging.checkpoints.checkpoint import Checkpoint, open_all
from merging.checkpoints.hub import CheckpointRef
from merging.lora.algebra import check_recipe
from merging.lora.plan import lay_out
from merging.lora.produce import CONFIG
from merging.lora.settings import adapter_settings
from merging.lora.work import AdapterWork
from merging.plan.checks import check_distinct
from merging.plan.merge_plan import Relaxing
from merging.plan.planner import plan
from merging.plan.slices import Inputs
from merging.plan.types import Plan
from merging.planning import foreign_tokenizer, lasting_name
from merging.recipe import MergeRecipe, recipe_as_yaml, remarks
from merging.recipe.checks import check_values
from merging.recipe.method_registry import find_method
from merging.tokenizers.chat_template import choose_template
from merging.tokenizers.choice import choose_vocabulary
from merging.tokenizers.token_ids import read_tokenizers

if TYPE_CHECKING:
    from merging.methods.contract import Method


def plan_adapter_merge(
    recipe: MergeRecipe, relaxing: Relaxing | None = None, headers_only: bool = False
) -> AdapterWork:
    """Open the adapters and decide everything about the merge. The base is downloaded only where its values are needed.

    The dtype is the recipe's where somebody gave it, else the adapters' own. headers_only: download no weights; such a
    work can be described and not produced.
    """
    check_recipe(recipe)
    names = [*recipe.models, base_of(recipe)]
    work = _planned(recipe, _opened(names, headers_only), relaxing)
    needed = relaxing is not None or bool(work.plan.wholes)
    if needed and not headers_only and not all(info.file.exists() for info in work.base.tensors.values()):
        return _planned(recipe, open_all(names), relaxing)
    return work


def base_of(recipe: MergeRecipe) -> str:
    """Return the name of the base. Raises UsageError for a model that is no BASE+ADAPTER."""
    refs = [CheckpointRef.parse(name) for name in recipe.models]
    for ref in refs:
        if ref.adapter is None:
            raise UsageError(f"--save_as adapter needs every model as BASE+ADAPTER; {ref} is a whole model.")
    return recipe.base_model or str(refs[0].alone)


def check_same_base(models: Sequence[Checkpoint], base: Checkpoint) -> None:
    """Refuse adapters that lie over another base. Raises UsageError."""
    for model in models:
        if model.parts[0].exact_name != base.exact_name:
            raise UsageError(
                f"--save_as adapter: {model.name} has another base than {base.name}; an adapter is the change of one "
                "base (give it by the same name everywhere)."
            )


def adapter_configs(models: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """Return the adapters' own configs."""
    return [read_json(model.parts[1].folder / CONFIG, "") for model in models]


def base_modules(base: Checkpoint) -> list[str]:
    """Return the modules of a base that have a weight."""
    return [name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight")]


def _opened(names: Sequence[str], headers_only: bool) -> list[Checkpoint]:
    try:
        return open_all(names, headers_only, adapters_only=True)
    except HeadersUnknownError:
        if headers_only:
            raise
        return open_all(names)


def _planned(recipe: MergeRecipe, opened: Sequence[Checkpoint], relaxing: Relaxing | None) -> AdapterWork:
    models, base = opened[:-1], opened[-1]
    check_same_base(models, base)
    check_distinct(base, models)
    if recipe.tokens:
        raise UsageError("tokenizer.tokens is for merges of models; with --save_as adapter leave it out.")
    if recipe.exclude is not None:
        raise UsageError("--exclude is for merges of models; with --save_as adapter leave it out.")
    method = find_method(recipe.method)
    inputs = Inputs(base, tuple(models), base)
    read_tokenizers(checkpoint.folder for checkpoint in inputs.all)
    vocabulary = choose_vocabulary(recipe.tokenizer, base, models)
    of_model = plan(inputs, recipe.output_slices, None, vocabulary, options=recipe.options)
    for tensor in of_model.tensors:
        if tensor.is_merged:
            check_values(method, tensor.parameters)
    planned = lay_out(inputs, of_model, recipe.method, recipe.stored_dtype if recipe.has_dtype else None)
    configs = adapter_configs(models)
    template = choose_template(recipe.chat_template, vocabulary.folder, base, models)
    files = {**(relaxing.files if relaxing else {}), **foreign_tokenizer(vocabulary.folder, inputs)}
    return AdapterWork(
        program="merge.py",
        label="merging",
        paper=method.paper,
        inputs=inputs,
        plan=planned,
        settings=adapter_settings(planned, configs, base.ref, base_modules(base)),
        template=template,
        recipe=_asked(recipe, inputs, of_model, relaxing),
        sources=recipe.sources,
        lineage={
            "method": recipe.method,
            "base_model": base.ref.full_name,
            "models": [model.ref.full_name for model in models],
            "omega": None,
        },
        notes=(
            *remarks(recipe),
            *of_model.notes,
            *planned.notes,
            *_other_bases(models, configs),
            f"Chat template: {template.origin}.",
        ),
        implementation=lambda: _load(method.name),
        relaxing=relaxing,
        files=files,
    )


def _asked(recipe: MergeRecipe, inputs: Inputs, of_model: Plan, relaxing: Relaxing | None) -> dict[str, Any]:
    """The recipe that a lock repeats the merge from; without a dtype where nobody gave one."""
    asked = recipe_as_yaml(recipe)
    if not recipe.has_dtype:
        asked = {key: value for key, value in asked.items() if key not in ("dtype", "out_dtype")}
    if foreign_tokenizer(of_model.vocabulary.folder, inputs):
        asked["tokenizer" if "tokenizer" in asked else "tokenizer_source"] = lasting_name(recipe.tokenizer)
    return {**asked, "save_as": "adapter", **(relaxing.recipe if relaxing else {})}


def _other_bases(models: Sequence[Checkpoint], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The sentence on adapters whose configs name different bases."""
    stated = {str(config.get("base_model_name_or_path")): model for config, model in zip(configs, models, strict=True)}
    if len(stated) < 2:
        return []
    told = "; ".join(f"{model.ref.adapter} on {name}" for name, model in stated.items())
    return [
        f"The adapters say that they were trained on bases of different names ({told}); they are treated as one base."
    ]


def _load(method: str) -> Method:
    from merging.methods.contract import load_method  # loads torch

    return load_method(method)
