"""One merge from its recipe: open the models, decide everything, make it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.device import resolve_device
from common.errors import HeadersUnknownError
from merging.checkpoints.checkpoint import Checkpoint, open_all
from merging.checkpoints.hub import CheckpointRef
from merging.checkpoints.model_folder import tokenizer_files
from merging.checkpoints.text_part import with_text_parts
from merging.output.load_check import check_loads, known_names
from merging.output.preparation import prepared
from merging.pipeline import check_asked, produce
from merging.plan.checks import check_distinct
from merging.plan.merge_plan import Output, Relaxing, Variant, Work
from merging.plan.planner import plan
from merging.plan.slices import Inputs
from merging.plan.types import Plan
from merging.plan.unmerged_tensors import Exclusion
from merging.recipe import MergeRecipe, recipe_as_yaml, remarks
from merging.recipe.checks import check_values, idle_filters
from merging.recipe.mergekit.writer import as_mergekit
from merging.recipe.method_registry import find_method
from merging.tokenizers.chat_template import ChatTemplate, choose_template
from merging.tokenizers.choice import choose_vocabulary, with_tokens
from merging.tokenizers.token_ids import read_tokenizers

if TYPE_CHECKING:
    from merging.engine.execution import ExecutionConfig


def merge(recipe: MergeRecipe, output: Output, relaxing: Relaxing | None = None) -> Path:
    """Merge as the recipe says and return the folder. Raises UsageError, CheckpointError or FailureError."""
    check_asked(output, relaxing.kept if relaxing else [])
    with output.process_group.main_process_first():
        work = plan_merge(recipe, output, relaxing)
    return produce(work, output)


def plan_merge(
    recipe: MergeRecipe, output: Output, relaxing: Relaxing | None = None, headers_only: bool = False
) -> Work:
    """Open the models and decide everything about the merge.

    headers_only: download no weights; such a work can be described and not produced.
    """
    method = find_method(recipe.method)
    inputs, merge_plan = _fitted(recipe, headers_only, loads=output.tries_loading and not headers_only)
    models, template_model = inputs.models, inputs.template_model
    folder = merge_plan.vocabulary.folder
    template = choose_template(recipe.chat_template, folder, template_model, inputs.all[1:])

    def make_job() -> ExecutionConfig:
        from merging.engine import loop  # loads torch
        from merging.engine.execution import ExecutionConfig
        from merging.methods.contract import load_method

        job = ExecutionConfig(
            method=load_method(method.name),
            device=resolve_device("cpu" if recipe.numerics == "reference" else output.device, output.process_group),
            seed=recipe.seed,
            reference=recipe.numerics == "reference",
            relaxation=relaxing.make(template_model, merge_plan) if relaxing else None,
        )
        return loop.with_model_statistics(merge_plan, job)

    document, unsaid = as_mergekit(recipe)
    asked = recipe_as_yaml(recipe)
    files = dict(relaxing.files) if relaxing else {}
    if foreign := foreign_tokenizer(folder, inputs):
        files |= foreign
        asked = recipe_as_yaml(replace(recipe, tokenizer=lasting_name(recipe.tokenizer)))
    if relaxing:
        asked |= relaxing.recipe
    return Work(
        program="merge.py",
        label="merging",
        paper=method.paper,
        inputs=inputs,
        plan=merge_plan,
        template=template,
        recipe=asked,
        sources=recipe.sources,
        lineage={
            "method": recipe.method,
            "base_model": template_model.ref.full_name if recipe.base_model else None,
            "models": [model.ref.full_name for model in models],
            "omega": None,
        },
        notes=(
            *remarks(recipe),
            *idle_filters(recipe, names_in(merge_plan)),
            *merge_plan.notes,
            *copied(merge_plan, recipe.exclude),
            f"Chat template: {template.origin}.",
        ),
        make_job=make_job,
        variants=relaxing.variants if relaxing else (Variant(),),
        files=files,
        whole_matrix=any(method.whole_matrix),
        finished=relaxing.finished if relaxing else lambda _: None,
        preview=(lambda: relaxing.preview(template_model, merge_plan)) if relaxing else tuple,
        mergekit=(document, [*unsaid, *(["AIM: the result was also relaxed."] if relaxing else [])]),
    )


def names_in(merge_plan: Plan) -> set[str]:
    """Return the names of the result's tensors and of those that they are made of."""
    return {
        name for tensor in merge_plan.tensors for name in (tensor.name, *(source.name for source in tensor.sources))
    }


def foreign_tokenizer(folder: Path, inputs: Inputs) -> dict[str, Path]:
    """Return the files of the result's tokenizer, by name, where it is none of the inputs'."""
    if folder in [checkpoint.folder for checkpoint in inputs.all]:
        return {}
    return {f"tokenizer/{file.name}": file for file in tokenizer_files(folder)}


def lasting_name(name: str) -> str:
    """Return a model's name as it means the same from any folder."""
    return CheckpointRef.parse(name).full_name


def _fitted(recipe: MergeRecipe, headers_only: bool, loads: bool) -> tuple[Inputs, Plan]:
    """Open the models and lay their tensors side by side. loads: whether transformers is imported later anyway.

    Where weights are yet to be downloaded, that is done from the headers on the hub first, so that what does not fit
    together is refused before the first download.
    """
    names = [*recipe.models, *([recipe.base_model] if recipe.base_model else [])]
    try:
        opened = open_all(names, headers_only=True)
    except HeadersUnknownError:
        if headers_only:
            raise
        return _lay_out(recipe, open_all(names), loads)
    found = _lay_out(recipe, opened, loads)
    if headers_only or all(info.file.exists() for checkpoint in opened for info in checkpoint.tensors.values()):
        return found
    with prepared(*found, ChatTemplate(None, "")) as small:
        if loads:
            check_loads(found[1], small.configs, known_names(found[1], found[0].template_model))
    return _lay_out(recipe, open_all(names), loads)


def _lay_out(recipe: MergeRecipe, opened: Sequence[Checkpoint], loads: bool) -> tuple[Inputs, Plan]:
    models, template_model = opened[: len(recipe.models)], opened[-1] if recipe.base_model else opened[0]
    base = template_model if recipe.uses_base else None
    sliced = all(output_slice.layers is not None for output_slice in recipe.output_slices)
    check_distinct(None if sliced and recipe.base_model in recipe.models else base, models)
    laid = {id(one): part for one, part in zip(models, with_text_parts(template_model, models), strict=True)}
    inputs = Inputs(template_model, tuple(laid[id(model)] for model in models), base)
    others = [checkpoint for checkpoint in inputs.all if checkpoint is not template_model]
    read_tokenizers([checkpoint.folder for checkpoint in inputs.all], in_subprocess=not loads)
    vocabulary = choose_vocabulary(recipe.tokenizer, template_model, others, recipe.pad_to_multiple_of)
    vocabulary = with_tokens(vocabulary, recipe.tokens, inputs.all)
    exclusion = Exclusion.of(recipe.exclude, recipe.exclude_from, inputs)
    merge_plan = plan(inputs, recipe.output_slices, recipe.stored_dtype, vocabulary, exclusion, recipe.options)
    for tensor in merge_plan.tensors:
        if tensor.is_merged:
            check_values(find_method(recipe.method), tensor.parameters)
    return inputs, merge_plan


def copied(merge_plan: Plan, excluded: str | None = None) -> list[str]:
    """Return the sentences on tensors that are copied: no floating-point numbers, or in no part that is merged.

    excluded: a regular expression of those that the plan itself names.
    """
    whole = [tensor.name for tensor in merge_plan.tensors if not tensor.is_float]
    apart = [tensor.name for tensor in merge_plan.tensors if tensor.is_float and not tensor.is_merged]
    apart = [name for name in apart if excluded is None or not re.search(excluded, name)]
    said = []
    if whole:
        said.append(f"Copied, not merged: {', '.join(whole[:3])} ({len(whole)} tensors of whole numbers).")
    if apart:
        said.append(
            f"Copied, not merged: {', '.join(apart[:3])} ({len(apart)} tensors, into which no model is merged)."
        )
    return said
