"""A work that makes a model or one that makes an adapter: where the two part, for the scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import FailureError
from merging.lora.describe import adapter_as_text, describe_adapter
from merging.lora.produce import check_adapter_output, check_base, prepared_tokenizer, produce_adapter
from merging.lora.run import plan_adapter_merge
from merging.lora.work import AdapterWork, described_base, described_inputs, lasting_files
from merging.output.digests import digest_of
from merging.output.records.lock import check_inputs, check_others, check_planned, describe_input, files_of
from merging.output.writer import parse_size
from merging.pipeline import check_asked, check_output, produce
from merging.plan.merge_plan import Output, Relaxing, Work
from merging.planning import merge as merge_model
from merging.planning import plan_merge
from merging.recipe import MergeRecipe

if TYPE_CHECKING:
    from torch import Tensor

Either = Work | AdapterWork


def merge(recipe: MergeRecipe, output: Output, relaxing: Relaxing | None = None) -> Path:
    """Merge as the recipe says into what `output.save_as` says and return the folder."""
    if output.save_as == "model":
        return merge_model(recipe, output, relaxing)
    check_asked(output, relaxing.kept if relaxing else [])
    with output.process_group.main_process_first():
        work = plan_adapter_merge(recipe, relaxing)
    return produce_adapter(work, output)


def planned(
    recipe: MergeRecipe, output: Output, relaxing: Relaxing | None = None, headers_only: bool = False
) -> Either:
    """Decide everything about a merge; headers_only: for a look at it alone."""
    if output.save_as == "adapter":
        return plan_adapter_merge(recipe, relaxing, headers_only)
    return plan_merge(recipe, output, relaxing, headers_only)


def make(work: Either, output: Output) -> Path:
    """Write what was planned and return its folder."""
    return produce_adapter(work, output) if isinstance(work, AdapterWork) else produce(work, output)


def shown(work: Either, output: Output, as_json: bool) -> str:
    """Return a plan in words or as JSON, after the checks that the run would make."""
    from merging.output.preparation import prepared
    from merging.plan.report import as_text, describe

    parse_size(output.max_shard_size)
    if isinstance(work, AdapterWork):
        if output.save_path != Path():
            check_adapter_output(work, output)
        with prepared_tokenizer(work):
            found = describe_adapter(work, output.save_path)
        return json.dumps(found, indent=2) if as_json else adapter_as_text(found)
    if output.save_path != Path():
        check_output(work, output)
    with prepared(work.inputs, work.plan, work.template) as small:
        found = describe(work, output.save_path, small.notes)
    return json.dumps(found, indent=2) if as_json else as_text(found)


def check_plan_of(work: Either, lock: Mapping[str, Any]) -> None:
    """Refuse a plan that cannot repeat a lock, before anything is computed. Raises CheckpointError naming the first."""
    files = lasting_files if isinstance(work, AdapterWork) else files_of
    inputs = [describe_input(checkpoint, {}, files(checkpoint)) for checkpoint in work.inputs.distinct]
    check_planned(lock, work.plan.tensors, inputs, work.files)


def check_inputs_of(work: Either, lock: Mapping[str, Any]) -> None:
    """Refuse inputs that are not those of a lock. Raises CheckpointError naming the first."""
    if isinstance(work, AdapterWork):
        check_inputs(lock, described_inputs(work))
        check_base(lock, described_base(work), work.base.name)
    else:
        files = {file: digest_of(file) for checkpoint in work.inputs.all for file in files_of(checkpoint)}
        check_inputs(lock, [describe_input(checkpoint, files) for checkpoint in work.inputs.distinct])
    for name, file in work.files.items():
        if not file.is_file():
            raise FailureError(f"The {name} file {file} does not exist.")
    check_others(lock, {name: digest_of(file) for name, file in work.files.items()})


def remade(work: Either, names: Sequence[str]) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """Yield tensors of the work's one result by name, each in blocks of rows."""
    from merging.engine.loop import iter_blocks

    known: dict[str, Any] = {tensor.name: tensor for tensor in work.plan.tensors}
    if isinstance(work, AdapterWork):
        maker = work.make()
        for name in names:
            yield name, (block for (block,) in maker.blocks(known[name]))
    else:
        job = work.make_job()
        for name in names:
            yield name, (block for (block,) in iter_blocks(known[name], job))
