"""Comparison of a plan and its inputs with a lock, and recomputation of single tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from common.errors import FailureError
from common.files.json_values import JsonValue
from merging.output.digests import digest_of
from merging.output.records.lock import check_inputs, check_others, check_planned, describe_input
from merging.pipeline import execution_config, format_of
from merging.plan.merge_plan import MergePlan, OutputConfig

if TYPE_CHECKING:
    from torch import Tensor


def check_lock_plan(plan: MergePlan, lock: Mapping[str, JsonValue]) -> None:
    """Refuse a plan that cannot repeat a lock, before anything is computed.

    Args:
        plan: made from the lock.
        lock: as `read_lock` returns it.

    Raises:
        CheckpointError: naming the first input or tensor that differs.
    """
    result = format_of(plan)
    inputs = [describe_input(one, {}, result.input_files(one)) for one in plan.inputs.distinct]
    check_planned(lock, plan.layout.tensors, inputs, plan.files)


def check_lock_inputs(plan: MergePlan, lock: Mapping[str, JsonValue]) -> None:
    """Refuse inputs whose bytes are not those of a lock.

    Args:
        plan: made from the lock.
        lock: as `read_lock` returns it.

    Raises:
        CheckpointError: naming the first file that differs.
        FailureError: for an importance file that does not exist.
    """
    result = format_of(plan)
    digests = {file: digest_of(file) for one in plan.inputs.all for file in result.input_files(one)}
    check_inputs(lock, [describe_input(one, digests, result.input_files(one)) for one in plan.inputs.distinct])
    result.check_lock(lock)
    for name, file in plan.files.items():
        if not file.is_file():
            raise FailureError(f"The {name} file {file} does not exist; give it at the place that the lock names.")
    check_others(lock, {name: digest_of(file) for name, file in plan.files.items()})


def recompute(plan: MergePlan, output: OutputConfig, names: Sequence[str]) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """Compute tensors of a plan with one result again, without writing them.

    Args:
        plan: of one result.
        output: its device is used.
        names: of tensors of the result.

    Yields:
        Each name with the tensor's blocks of rows, on the CPU in the dtype of the result.
    """
    from merging.engine.loop import iter_blocks  # loads torch

    execution = execution_config(plan, output)
    tensors: dict[str, Any] = {tensor.name: tensor for tensor in plan.layout.tensors}
    blocks_of = format_of(plan).blocks(execution) or partial(iter_blocks, config=execution)
    for name in names:
        yield name, (block for (block,) in blocks_of(tensors[name]))
