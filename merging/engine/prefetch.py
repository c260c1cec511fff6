"""Work across the border of two tensors: statistics of the next during the merge of one, and one device pipeline."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeAlias

import torch
from torch import Tensor

from merging.engine.device_pipeline import pipeline
from merging.engine.execution import TensorTask
from merging.ops.tensor_blocks import Block

PendingTask: TypeAlias = Callable[[], TensorTask]
"""Returns a task, after it has computed the statistics over the tensor."""
_Item: TypeAlias = tuple[TensorTask, Block] | Exception


def prefetch(tasks: Iterable[PendingTask], lookahead: int) -> Generator[PendingTask, None, None]:
    """Yield functions that return or raise the results of the tasks, which run ahead on one thread, in order.

    Args:
        tasks: functions, in order.
        lookahead: number of tasks that run ahead; with 0 the functions themselves are yielded.
    """
    if not lookahead:
        yield from tasks
        return
    futures: deque[Future[TensorTask]] = deque()
    thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        for task in tasks:
            futures.append(thread.submit(task))
            if len(futures) > lookahead:
                yield futures.popleft().result
        while futures:
            yield futures.popleft().result
    finally:
        thread.shutdown(cancel_futures=True)


def stream_through_device(
    tasks: Sequence[PendingTask], device: torch.device, lookahead: int
) -> Generator[Iterator[Sequence[Tensor]], None, None]:
    """Yield, for each task, its results block by block; each iterator must be read to its end.

    All blocks go through one device pipeline, which does not run empty between two tensors. An error of a task, of the
    reading, or of the computation is raised in place of the result that it prevents.

    Args:
        tasks: functions, in order.
        device: of the computation.
        lookahead: as of `prefetch`.
    """
    block_counts: deque[int] = deque()  # of each task whose blocks have begun

    def items() -> Generator[_Item, None, None]:
        with closing(prefetch(tasks, lookahead)) as ready:
            for pending in ready:
                try:
                    task = pending()
                except Exception as error:
                    block_counts.append(1)
                    yield error
                else:
                    blocks = list(task.group.blocks())
                    block_counts.append(len(blocks))
                    yield from ((task, block) for block in blocks)

    def read(item: _Item) -> Sequence[Tensor]:
        if isinstance(item, Exception):
            raise item
        task, block = item
        return task.read(block)

    def compute(item: _Item, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        assert not isinstance(item, Exception)
        task, block = item
        return task.compute_from(block, tensors)

    def results_of_next_task(results: Iterator[Sequence[Tensor]]) -> Iterator[Sequence[Tensor]]:
        yield next(results)
        for _ in range(block_counts.popleft() - 1):
            yield next(results)

    with closing(items()) as source, closing(pipeline(source, read, compute, device)) as results:
        for _ in tasks:
            yield results_of_next_task(results)
