"""Planner: from a recipe to a `MergePlan`, for models and adapters, for merges and relaxations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import HeadersUnknownError, UsageError
from common.files.json_values import JsonValue
from merging.checkpoints.checkpoint import Checkpoint, open_all
from merging.checkpoints.hub import CheckpointRef
from merging.checkpoints.model_folder import tokenizer_files
from merging.checkpoints.text_part import with_text_parts
from merging.lora.algebra import check_recipe as check_adapter_recipe
from merging.lora.inputs import base_name, check_same_base, different_bases, open_adapters
from merging.lora.layout import AdapterPlan, lay_out
from merging.output.load_check import check_loads, known_names
from merging.output.preparation import prepare_files
from merging.output.records.run_record import read_lineage, read_merge_recipe
from merging.plan.checks import check_distinct
from merging.plan.merge_plan import Lineage, MergePlan, OutputConfig, RelaxationSpec
from merging.plan.planner import plan as plan_tensors
from merging.plan.slices import Inputs
from merging.plan.types import Plan
from merging.plan.unmerged_tensors import Exclusion
from merging.recipe import MergeRecipe, recipe_as_yaml, remarks
from merging.recipe.checks import check_values, idle_filters
from merging.recipe.mergekit.writer import as_mergekit
from merging.recipe.method_registry import find_method
from merging.tokenizers.chat_template import ChatTemplate, choose_template
from merging.tokenizers.choice import choose_vocabulary, with_tokens
from merging.tokenizers.token_ids import read_tokenizers, token_ids

if TYPE_CHECKING:
    from merging.methods.contract import Method


def plan_merge(
    recipe: MergeRecipe,
    output: OutputConfig,
    relaxation: RelaxationSpec | None = None,
    headers_only: bool = False,
) -> MergePlan:
    """Open the models and decide everything about the run.

    Args:
        recipe: method, models and parameters; of a run that only relaxes, the merged model alone.
        output: its kind of result and its load check.
        relaxation: AIM; None for a merge without it.
        headers_only: download no weights; such a plan can be reported and not executed.

    Raises:
        UsageError: for a recipe that does not fit the models.
        CheckpointError: for inputs that are broken or do not fit together.
    """
    method = find_method(recipe.method)
    is_adapter, is_alone = output.save_as == "adapter", relaxation is not None and relaxation.is_alone
    layout: Plan | AdapterPlan
    if is_adapter:
        check_adapter_recipe(recipe)
        inputs, model, layout = _plan_adapter(recipe, relaxation, headers_only, output.tries_loading)
    else:
        inputs, model = _plan_model(recipe, relaxation, headers_only, output.tries_loading and not headers_only)
        layout = model
    template = choose_template(recipe.chat_template, model.vocabulary.folder, inputs.template_model, inputs.all[1:])
    tokenizer = new_tokenizer(model.vocabulary.folder, inputs)
    return MergePlan(
        program="performAIM.py" if is_alone else "merge.py",
        label="relaxing" if is_alone else "merging",
        kind=output.save_as,
        inputs=inputs,
        model=model,
        layout=layout,
        template=template,
        recipe=_lock_recipe(recipe, relaxation, is_adapter, bool(tokenizer)),
        sources={} if is_alone else recipe.sources,
        lineage=_lineage(recipe, inputs, is_adapter, is_alone),
        notes=(
            *(() if is_alone else remarks(recipe)),
            *idle_filters(recipe, _tensor_names(model)),
            *model.notes,
            *([*layout.notes, *different_bases(inputs.models)] if isinstance(layout, AdapterPlan) else ()),
            *(() if is_adapter else _copied(model, recipe.exclude)),
            *(relaxation.notes if relaxation else ()),
            *(_tokenizer_note(inputs, model) if is_alone else ()),
            f"Chat template: {template.origin}.",
        ),
        implementation=(relaxation.implementation if relaxation else None) or (lambda: _load_method(method.name)),
        seed=recipe.seed,
        reference=recipe.numerics == "reference",
        device="cpu" if is_adapter or (recipe.numerics == "reference" and not is_alone) else None,
        relaxation=relaxation,
        files={**(relaxation.files if relaxation else {}), **tokenizer},
        whole_matrix=any(method.whole_matrix) and not is_adapter,
        mergekit=None if is_adapter or is_alone else _mergekit_form(recipe, relaxation),
        merge_recipe=read_merge_recipe(inputs.template_model) if is_alone else None,
    )


def _load_method(name: str) -> Method:
    """Return the method's functions; loads torch."""
    from merging.methods.contract import load_method

    return load_method(name)


def new_tokenizer(folder: Path, inputs: Inputs) -> dict[str, Path]:
    """Return the files of the result's tokenizer, by name, where it is none of the inputs'."""
    if folder in [checkpoint.folder for checkpoint in inputs.all]:
        return {}
    return {f"tokenizer/{file.name}": file for file in tokenizer_files(folder)}


def _plan_model(
    recipe: MergeRecipe, relaxation: RelaxationSpec | None, headers_only: bool, loads: bool
) -> tuple[Inputs, Plan]:
    """Open the models and plan every tensor. loads: transformers is imported later anyway.

    Where weights are yet to be downloaded, that is done from the headers on the hub first, so that what does not fit
    together is refused before the first download.
    """
    names = [*recipe.models, *([recipe.base_model] if recipe.base_model else [])]
    try:
        opened = open_all(names, headers_only=True)
    except HeadersUnknownError:
        if headers_only:
            raise
        return _plan_tensors(recipe, open_all(names), relaxation, loads)
    inputs, model = _plan_tensors(recipe, opened, relaxation, loads)
    if headers_only or all(info.file.exists() for checkpoint in opened for info in checkpoint.tensors.values()):
        return inputs, model
    with prepare_files(inputs, model, ChatTemplate(None, "")) as files:
        if loads:
            check_loads(model, files.configs, known_names(model, inputs.template_model))
    return _plan_tensors(recipe, open_all(names), relaxation, loads)


def _plan_adapter(
    recipe: MergeRecipe, relaxation: RelaxationSpec | None, headers_only: bool, loads: bool
) -> tuple[Inputs, Plan, AdapterPlan]:
    """Open the adapters and plan every tensor; the base is downloaded only where its values are needed.

    The dtype is the recipe's where somebody gave it, else the adapters' own.
    """
    names = [*recipe.models, base_name(recipe)]
    opened = open_adapters(names, headers_only)
    while True:
        inputs, model = _plan_tensors(recipe, opened, relaxation, loads, is_adapter=True)
        layout = lay_out(inputs, model, recipe.method, recipe.stored_dtype if recipe.has_dtype else None)
        reads_base = relaxation is not None or bool(layout.wholes)
        if headers_only or not reads_base or all(info.file.exists() for info in opened[-1].tensors.values()):
            return inputs, model, layout
        opened = open_all(names)


def _plan_tensors(
    recipe: MergeRecipe,
    opened: Sequence[Checkpoint],
    relaxation: RelaxationSpec | None,
    loads: bool,
    is_adapter: bool = False,
) -> tuple[Inputs, Plan]:
    """Plan every tensor of the whole model. opened: the models, then the base if there is one."""
    is_alone = relaxation is not None and relaxation.is_alone
    count = len(recipe.models)
    base = opened[-1] if len(opened) > count else None
    template = opened[0] if is_alone or base is None else base
    uses_base = is_alone or is_adapter or recipe.uses_base
    _check_models(recipe, opened[:count], base if uses_base else None, is_adapter, is_alone)
    rest = [checkpoint for checkpoint in opened if checkpoint is not template]
    adapted = dict(zip(map(id, rest), with_text_parts(template, rest), strict=True))
    aligned = [adapted.get(id(checkpoint), checkpoint) for checkpoint in opened]
    inputs = Inputs(template, tuple(aligned[:count]), aligned[-1] if uses_base and base is not None else None)
    read_tokenizers([checkpoint.folder for checkpoint in inputs.all], in_subprocess=not loads)
    rest = [checkpoint for checkpoint in inputs.all if checkpoint is not template]
    owner = rest[0] if is_alone and token_ids(template.folder) is None else template
    vocabulary = choose_vocabulary(recipe.tokenizer, owner, [] if is_alone else rest, recipe.pad_to_multiple_of)
    vocabulary = with_tokens(vocabulary, recipe.tokens, inputs.all)
    exclusion = Exclusion.of(recipe.exclude, recipe.exclude_from, inputs) if recipe.exclude is not None else None
    dtype = None if is_adapter else recipe.stored_dtype
    model = plan_tensors(inputs, recipe.output_slices, dtype, vocabulary, exclusion, recipe.options)
    for tensor in model.tensors:
        if tensor.is_merged:
            check_values(find_method(recipe.method), tensor.parameters)
    return inputs, model


def _check_models(
    recipe: MergeRecipe, models: Sequence[Checkpoint], base: Checkpoint | None, is_adapter: bool, is_alone: bool
) -> None:
    """Refuse a model that is listed twice or is the base, and adapters of different bases. Raises UsageError."""
    if is_adapter and base is not None:
        check_same_base(models, base)
    if is_alone and base is not None and models[0].exact_name == base.exact_name:
        raise UsageError(f"--merged_model and --pretrained_model_name are both {models[0].name}: nothing to relax.")
    is_sliced = all(output_slice.layers is not None for output_slice in recipe.output_slices)
    check_distinct(None if is_sliced and recipe.base_model in recipe.models else base, models)


def _lock_recipe(
    recipe: MergeRecipe, relaxation: RelaxationSpec | None, is_adapter: bool, has_new_tokenizer: bool
) -> Mapping[str, JsonValue]:
    """The keys that a lock repeats the run from; the dtype of an adapter only where somebody gave it."""
    if relaxation is not None and relaxation.is_alone:
        return relaxation.recipe
    if has_new_tokenizer:  # the name must mean the same from any folder
        recipe = replace(recipe, tokenizer=CheckpointRef.parse(recipe.tokenizer).full_name)
    keys = recipe_as_yaml(recipe)
    if is_adapter:
        if not recipe.has_dtype:
            keys = {key: value for key, value in keys.items() if key not in ("dtype", "out_dtype")}
        keys["save_as"] = "adapter"
    return {**keys, **(relaxation.recipe if relaxation else {})}


def _mergekit_form(
    recipe: MergeRecipe, relaxation: RelaxationSpec | None
) -> tuple[Mapping[str, JsonValue], Sequence[str]]:
    """The recipe in mergekit's form, and what that lacks."""
    document, unsupported = as_mergekit(recipe)
    return document, [*unsupported, *(["AIM: the result was also relaxed."] if relaxation else [])]


def _lineage(recipe: MergeRecipe, inputs: Inputs, is_adapter: bool, is_alone: bool) -> Lineage:
    """Method, base, models and omega; of a run that only relaxes, those of the model that is relaxed."""
    models = [model.ref.full_name for model in inputs.models]
    if not is_alone:
        base = inputs.template_model.ref.full_name if recipe.base_model or is_adapter else None
        return {"method": recipe.method, "base_model": base, "models": models, "omega": None}
    assert inputs.base is not None
    lineage = read_lineage(inputs.template_model)
    if lineage["base_model"] is None or is_adapter:
        lineage["base_model"] = inputs.base.ref.full_name
    if is_adapter and not lineage["models"]:
        lineage["models"] = models
    return lineage


def _tensor_names(model: Plan) -> set[str]:
    """The names of the result's tensors and of those that they are made of."""
    return {name for tensor in model.tensors for name in (tensor.name, *(source.name for source in tensor.sources))}


def _tokenizer_note(inputs: Inputs, model: Plan) -> list[str]:
    """The sentence on a merged model that lacks a tokenizer."""
    vocabulary, merged = model.vocabulary, inputs.template_model
    if vocabulary.folder == merged.folder or vocabulary.tokens is None:
        return []
    return [f"{merged.name} has no tokenizer; the base's is saved."]


def _copied(model: Plan, excluded: str | None) -> list[str]:
    """The sentences on tensors that are copied: no floating-point numbers, or in no part that is merged.

    excluded: a regular expression of those that the plan itself names.
    """
    integers = [tensor.name for tensor in model.tensors if not tensor.is_float]
    unmerged = [tensor.name for tensor in model.tensors if tensor.is_float and not tensor.is_merged]
    unmerged = [name for name in unmerged if excluded is None or not re.search(excluded, name)]
    sentences = []
    if integers:
        sentences.append(f"Copied, not merged: {', '.join(integers[:3])} ({len(integers)} tensors of whole numbers).")
    if unmerged:
        sentences.append(
            f"Copied, not merged: {', '.join(unmerged[:3])} ({len(unmerged)} tensors, into which no model is merged)."
        )
    return sentences
