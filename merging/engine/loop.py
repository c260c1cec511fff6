"""Loop over the tensors of a plan: an executor merges each, block by block, and writers write the results."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from tqdm import tqdm

from common.distributed import SINGLE_PROCESS, ProcessGroup
from common.logging import hides_progress
from merging.engine.base_comparison import BaseComparison
from merging.engine.execution import Collector, ExecutionConfig, TensorTask, Writer, make_task
from merging.engine.executors import Blocks, make_executor
from merging.engine.finite_check import FiniteBlocks, FiniteCheck, name_nan_input, sources_of
from merging.engine.row_groups import aligned_rows, group_of
from merging.methods.contract import select_arguments
from merging.ops.tensor_blocks import BLOCK_ELEMENTS, TensorGroup, cut
from merging.plan.types import Listing, Named, Plan, TensorPlan

BlocksOf: TypeAlias = Callable[[Any], Iterator[Blocks]]
"""Returns the results of a tensor of the plan, block by block."""
Collectors: TypeAlias = Sequence[Collector | None]
"""One for each result, or nothing."""


def run(
    plan: Listing,
    config: ExecutionConfig,
    writers: Sequence[Writer],
    label: str = "merging",
    blocks_of: BlocksOf | None = None,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Compute every tensor of the plan that is not written yet and write it, block by block.

    Args:
        plan: the tensors, in the order in which they are written.
        config: the method and the manner of execution.
        writers: one for each result; all have written the same tensors.
        label: of the progress bar.
        blocks_of: computes the tensors of a plan that is not one of a `Plan`; by default, they are merged.
        process_group: the ranks of this run.

    Raises:
        StoppedError: once another rank has ended.
    """
    done = writers[0].done
    tensors = plan.tensors[done:]
    collectors: dict[str, list[Collector | None]] = {}
    if config.make_collector is not None:
        collectors = {t.name: [config.make_collector(t) for _ in writers] for t in tensors if isinstance(t, TensorPlan)}
    comparison = BaseComparison(len(writers))
    bar = tqdm(plan.tensors, unit="tensor", desc=label, disable=hides_progress(), initial=done)
    with _merging(tensors, config, collectors, blocks_of) as results_of:
        for tensor in tensors:
            inputs = partial(sources_of, tensor) if isinstance(tensor, TensorPlan) else tuple
            checks = [FiniteCheck(tensor.name, config.allow_nonfinite, inputs) for _ in writers]
            for writer in writers:
                writer.begin(tensor.name)
            comparison.begin(tensor)
            with name_nan_input(inputs):
                for blocks in results_of(tensor):
                    process_group.check_ranks()
                    comparison.add(blocks)
                    for writer, check, block in zip(writers, checks, blocks, strict=True):
                        writer.add(block if isinstance(blocks, FiniteBlocks) else check.check(block))
            by_result = collectors.pop(tensor.name, [None] * len(writers))
            for i, (writer, check, collector) in enumerate(zip(writers, checks, by_result, strict=True)):
                writer.end({**_metadata(check, collector), **comparison.end(i)})
            bar.update()
    bar.close()


def iter_blocks(tensor: TensorPlan, config: ExecutionConfig) -> Generator[Blocks, None, None]:
    """Yield one tensor of a plan in blocks of rows, in the plan's dtype, on the CPU: one block for each result.

    A block may be overwritten once the next is read.
    """
    with _merging([tensor], config, {}) as results_of:
        yield from results_of(tensor)


def with_model_statistics(plan: Plan, config: ExecutionConfig) -> ExecutionConfig:
    """Return the configuration with the method's statistics over all tensors, if it has such."""
    model_statistics = config.method.model_statistics
    merged = [tensor for tensor in plan.tensors if tensor.is_merged]
    if model_statistics is None or not merged:
        return config

    def groups() -> Iterator[TensorGroup]:
        return (group_of(tensor, config) for tensor in merged)

    parameters = select_arguments(model_statistics, merged[0].parameters)
    return replace(config, model_statistics=model_statistics(groups, **parameters))


@contextmanager
def _merging(
    tensors: Sequence[Named],
    config: ExecutionConfig,
    collectors: Mapping[str, Collectors],
    blocks_of: BlocksOf | None = None,
) -> Iterator[BlocksOf]:
    """Yield a function that returns the results of each tensor; it is called in the order of the tensors."""
    if blocks_of is not None:
        yield blocks_of
        return
    plans = [tensor for tensor in tensors if isinstance(tensor, TensorPlan)]  # all of a `Plan`
    tasks = {t.name: partial(_task, t, config, collectors.get(t.name, ())) for t in plans if _is_computed(t)}
    with closing(make_executor(config, tasks)) as executor:

        def results_of(tensor: TensorPlan) -> Iterator[Blocks]:
            if not _is_computed(tensor):
                return _copy(tensor, config.results)
            results = executor.run(tensor.name)
            return results if tensor.shape else _as_numbers(results)

        yield results_of


def _task(tensor: TensorPlan, config: ExecutionConfig, collectors: Collectors) -> TensorTask:
    return make_task(group_of(tensor, config), config, tensor.parameters, _dtype(tensor), collectors)


def _dtype(tensor: TensorPlan) -> torch.dtype:
    return getattr(torch, tensor.dtype)  # type: ignore[no-any-return]


def _is_computed(tensor: TensorPlan) -> bool:
    return tensor.is_merged and 0 not in tensor.shape


def _as_numbers(results: Iterable[Blocks]) -> Iterator[Blocks]:
    """Yield blocks without dimensions: a single number is merged as a vector of one."""
    return ([block.reshape(()) for block in blocks] for blocks in results)


def _copy(tensor: TensorPlan, results: int) -> Iterator[Blocks]:
    """Yield a tensor of the template model, the same for each result."""
    dtype, rows = _dtype(tensor), aligned_rows(tensor.source, tensor)
    if not rows.shape:
        yield [tensor.source.checkpoint.read(tensor.source.name).to(dtype)] * results
        return
    for block in cut(rows.shape, BLOCK_ELEMENTS):
        yield [rows[block.rows].to(dtype)] * results


def _metadata(check: FiniteCheck, collector: Collector | None) -> Mapping[str, object]:
    """Return what the journal stores with a finished tensor."""
    metadata: dict[str, object] = {"nonfinite": check.count} if check.count else {}
    return metadata if collector is None else {**metadata, "layer_statistics": dict(collector.summary())}
