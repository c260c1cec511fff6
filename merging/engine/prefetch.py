"""Tensor after tensor: what a method must know of the next is found out while one is merged; and through a device in
one ring, which does not run empty between two of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from merging.engine.device_pipeline import pipeline
from merging.ops.block_arguments import BlockArguments
from merging.ops.tensor_blocks import Block, TensorGroup

Make: TypeAlias = Callable[[Block, TensorGroup, Mapping[str, Any]], Sequence[Tensor]]
"""Makes the results of a block from a group that is that block alone, and from what the method is given for it."""


@dataclass(frozen=True)
class TensorTask:
    """A tensor that is to be merged into `dtype`.

    parameters: of the method for this tensor. observed: whether the values are looked at, as the method's
    torch expressions make them.

    per_block: as `Prepare` returns it, or None. What it can say on the CPU (it has `ahead` and `given` then, as DARE's
    masks have) is found by the threads that read, and travels with the rows.
    """

    group: TensorGroup
    block_arguments: BlockArguments
    make: Make
    dtype: torch.dtype
    parameters: Mapping[str, object]
    observed: bool

    def read(self, block: Block) -> list[Tensor]:
        """Return a block's rows as they are stored, the base's first, and what is said of it on the CPU."""
        sources = [*([] if self.group.base is None else [self.group.base]), *self.group.finetuned]
        return [*(source[block.rows] for source in sources), *self.block_arguments.on_host(block)]

    def work(self, block: Block, there: Sequence[Tensor]) -> Sequence[Tensor]:
        """Make the block from what `read` returned, which is on the device now."""
        count = len(self.group.finetuned) + (self.group.base is not None)
        rows, from_host = there[:count], there[count:]
        arguments = self.block_arguments
        found = arguments.from_host(from_host) if from_host else arguments.for_block(block)
        return self.make(block, self.group.at(block, rows), found)


def prefetch(tasks: Iterable[Callable[[], TensorTask]], ahead: int) -> Generator[Callable[[], TensorTask], None, None]:
    """Yield functions that return, or raise, what those given do; so many of these are called ahead, in order, on one
    thread, and with none ahead each is the one given."""
    if not ahead:
        yield from tasks
        return
    waiting: deque[Future[TensorTask]] = deque()
    thread = ThreadPoolExecutor(1, thread_name_prefix="prepare")
    try:
        for task in tasks:
            waiting.append(thread.submit(task))
            if len(waiting) > ahead:
                yield waiting.popleft().result
        while waiting:
            yield waiting.popleft().result
    finally:
        thread.shutdown(cancel_futures=True)


def stream_through_device(
    tasks: Sequence[Callable[[], TensorTask]], device: torch.device, ahead: int
) -> Generator[Iterator[Sequence[Tensor]], None, None]:
    """Yield, for each task, its results block by block; each iterator must be read to its end.

    tasks, ahead: as `prefetch` takes them. An error of a task, of the reading, or of the making comes through where the
    result that it prevents is due.
    """
    blocks: deque[int] = deque()  # of each task whose blocks have begun

    def items() -> Generator[tuple[TensorTask | None, Any], None, None]:
        with closing(prefetch(tasks, ahead)) as ready:
            for known in ready:
                try:
                    task = known()
                except Exception as error:
                    blocks.append(1)
                    yield None, error
                else:
                    found = list(task.group.blocks())
                    blocks.append(len(found))
                    yield from ((task, block) for block in found)

    def read(item: tuple[TensorTask | None, Any]) -> Sequence[Tensor]:
        task, block = item
        if task is None:
            raise block
        return task.read(block)

    def work(item: tuple[TensorTask | None, Any], there: Sequence[Tensor]) -> Sequence[Tensor]:
        task, block = item
        assert task is not None
        return task.work(block, there)

    def results(made: Iterator[Sequence[Tensor]]) -> Iterator[Sequence[Tensor]]:
        yield next(made)
        for _ in range(blocks.popleft() - 1):
            yield next(made)

    with closing(items()) as source, closing(pipeline(source, read, work, device)) as made:
        for _ in tasks:
            yield results(made)
