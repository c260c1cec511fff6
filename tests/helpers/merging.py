"""Merging of a tensor that is of no plan, by the executor that a configuration selects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial

import torch

from merging.engine.execution import ExecutionConfig, make_task
from merging.engine.executors import Blocks, make_executor
from merging.ops.tensor_blocks import TensorGroup


def merged_blocks(
    group: TensorGroup, config: ExecutionConfig, parameters: Mapping[str, object], dtype: torch.dtype
) -> Iterator[Blocks]:
    """Yield the results of a tensor block by block; a block may be overwritten once the next is read."""
    tasks = {group.name: partial(make_task, group, config, parameters, dtype)}
    with closing(make_executor(config, tasks)) as executor:
        yield from executor.run(group.name)


def merge_group(
    group: TensorGroup, config: ExecutionConfig, parameters: Mapping[str, object], dtype: torch.dtype
) -> torch.Tensor:
    """Return the one result of a tensor as a whole."""
    return torch.cat([block.clone() for (block,) in merged_blocks(group, config, parameters, dtype)])
