"""Blocks through a device: read ahead into page-locked memory, copied in, computed, copied back, all at the same time.

    threads     read block i+3 ...  into a ring of staging buffers
    lane in     copy block i+2      host -> device, once its place on the device is free
    current     compute block i     as soon as it has arrived
    lane out    copy block i-1      device -> host, as soon as it is computed

A lane is a CUDA stream, the computation stays on the current one, and events are all that they wait for. The CPU has
done what it was asked for when it answers: there lanes are no-ops, and the same ring runs with ordinary memory, which
is how its order and its errors are tested where there is no GPU.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from common.threads import in_order, threads
from merging.ops.tensor_blocks import BLOCK_ELEMENTS

ON_GPU = 1 << 22
"""Elements of one tensor per block on a GPU: enough that launching its kernels costs less than moving it."""
READERS = 8
"""Most threads that read at a time, each with a block in page-locked memory; 16 are hardly faster."""
AHEAD = 1
"""Blocks that may be read beyond one for each thread."""
DEPTH = 3
"""Blocks that have a place on the device, or a place for their results on the host."""
ALIGNED = 512
"""Bytes that tensors in one buffer begin at multiples of, as the CUDA allocator's do."""

Item = TypeVar("Item")
Read: TypeAlias = Callable[[Item], Sequence[Tensor]]
Work: TypeAlias = Callable[[Item, Sequence[Tensor]], Sequence[Tensor]]
Mark: TypeAlias = "torch.cuda.Event | None"
"""A point in a lane's work; None where it is reached already."""
_Arrived: TypeAlias = tuple[int, Item, list[Tensor], Mark]
_Made: TypeAlias = tuple[list[Tensor], Any, Mark]


class Lane:
    """Work that a device does in its own order, beside that of other lanes."""

    def __init__(self, device: torch.device, current: bool = False) -> None:
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.current_stream(device) if current else torch.cuda.Stream(device)

    def entered(self) -> AbstractContextManager[Any]:
        """Return a context in which torch's work, and the memory that it takes, is this lane's."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Copy each source to its target, of the same shape and dtype, without waiting for it."""
        with self.entered():
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)

    def mark(self) -> Mark:
        """Return the point after all that the lane was given so far."""
        if self.stream is None:
            return None
        event = torch.cuda.Event(blocking=True)  # who waits for it leaves the core to others
        event.record(self.stream)
        return event

    def after(self, mark: Mark) -> None:
        """Let what the lane is given from now on begin after a point of another lane."""
        if mark is not None and self.stream is not None:
            self.stream.wait_event(mark)

    def finish(self) -> None:
        """Return when all that the lane was given is done."""
        if self.stream is not None:
            self.stream.synchronize()


def reached(mark: Mark) -> None:
    """Return when the point is reached."""
    if mark is not None:
        mark.synchronize()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; from the CPU to a GPU through page-locked memory, and nobody waits for it.

    The page-locked copy is torch's to reuse, which it does when it has been read.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def elements_for(device: torch.device) -> int:
    """Return the elements of one tensor per block on a device; no result depends on it."""
    return ON_GPU if device.type == "cuda" else BLOCK_ELEMENTS


class _Room:
    """Memory that tensors are laid out in, one after the other; it grows to the most that was asked for.

    mark: the point from which on it may be written to again.
    """

    def __init__(self, take: Callable[[int], Tensor]) -> None:
        self._take, self._bytes = take, torch.empty(0, dtype=torch.uint8)
        self.mark: Mark = None

    def lay_out(self, like: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
        """Return room for tensors of these shapes and dtypes, and whether it is new memory."""
        sizes = [-(-tensor.numel() * tensor.element_size() // ALIGNED) * ALIGNED for tensor in like]
        fresh = sum(sizes) > self._bytes.numel()
        if fresh:
            reached(self.mark)
            self._bytes = torch.empty(0, dtype=torch.uint8)  # lets go of the old before it takes the new
            self._bytes = self._take(sum(sizes))
        places, start = [], 0
        for tensor, size in zip(like, sizes, strict=True):
            own = self._bytes[start : start + tensor.numel() * tensor.element_size()]
            places.append(own.view(tensor.dtype).view(tensor.shape))
            start += size
        return places, fresh


class _Ring(Generic[Item]):
    """The stages that an item goes through, each with memory for a few items that is used in turns."""

    def __init__(self, read: Read[Item], work: Work[Item], device: torch.device) -> None:
        self.read, self.work = read, work
        on_host = partial(torch.empty, dtype=torch.uint8, pin_memory=device.type == "cuda")
        there = partial(torch.empty, dtype=torch.uint8, device=device)
        self.readers = min(threads(), READERS)
        self.staging = [_Room(on_host) for _ in range(self.readers + AHEAD)]  # as many as `in_order` has begun
        self.arrivals, self.departures = [_Room(there) for _ in range(DEPTH)], [_Room(on_host) for _ in range(DEPTH)]
        self.come, self.current, self.go = Lane(device), Lane(device, current=True), Lane(device)

    def fill(self, numbered: tuple[int, Item]) -> tuple[int, Item, list[Tensor]]:
        """Read an item into its staging buffer, on a thread of its own."""
        number, item = numbered
        tensors, room = self.read(item), self.staging[number % len(self.staging)]
        reached(room.mark)  # what lay there has been copied to the device
        places, _ = room.lay_out(tensors)
        for place, tensor in zip(places, tensors, strict=True):
            _fill(place, tensor)
        return number, item, places

    def arrive(self, number: int, item: Item, staged: list[Tensor]) -> _Arrived[Item]:
        """Let it be copied to the device."""
        room = self.arrivals[number % DEPTH]
        places, fresh = room.lay_out(staged)
        # new memory may be what a computation that is still under way has given back
        self.come.after(self.current.mark() if fresh else room.mark)
        self.come.copy(places, staged)
        mark = self.staging[number % len(self.staging)].mark = self.come.mark()
        return number, item, places, mark

    def compute(self, number: int, item: Item, arrived: list[Tensor], mark: Mark) -> _Made:
        """Let it be computed and the results be copied back; returns their places, what must live until then, when."""
        self.current.after(mark)
        made = self.work(item, arrived)
        once = {id(result): result for result in made}
        places, _ = self.departures[number % DEPTH].lay_out(list(once.values()))
        self.go.after(self.current.mark())
        self.go.copy(places, list(once.values()))
        # only now, not after the computation: a result may be what arrived
        left = self.arrivals[number % DEPTH].mark = self.go.mark()
        by_id = dict(zip(once, places, strict=True))
        return [by_id[id(result)] for result in made], made, left

    def finish(self) -> None:
        """Return when nothing is under way on the device."""
        for lane in (self.come, self.current, self.go):
            lane.finish()


def through(
    items: Iterable[Item], read: Read[Item], work: Work[Item], device: torch.device
) -> Generator[Sequence[Tensor], None, None]:
    """Yield the results of `work(item, tensors)` for each item, in order, on the CPU.

    read: gives an item's tensors on the CPU, in threads and ahead of their turn; work: gets them on the device, in
    their own dtypes, in memory that is used again later, and returns its results there. It runs on the calling thread
    and the current stream. What is yielded is overwritten after more is asked for. An error of `read` or `work` comes
    through after the results ahead of it; then, as where the caller stops early, everything that has begun is waited
    for and all memory is let go.
    """
    ring = _Ring(read, work, device)
    entering: deque[_Arrived[Item] | Exception] = deque()
    leaving: deque[_Made | Exception] = deque()

    def fill(numbered: tuple[int, Item]) -> tuple[int, Item, list[Tensor]] | Exception:
        try:
            return ring.fill(numbered)
        except Exception as error:
            return error  # takes its turn

    def computed(one: _Arrived[Item] | Exception) -> _Made | Exception:
        try:
            return one if isinstance(one, Exception) else ring.compute(*one)
        except Exception as error:
            return error

    def taken() -> list[Tensor]:
        one = leaving.popleft()
        if isinstance(one, Exception):
            raise one
        results, _, mark = one
        reached(mark)
        return results

    try:
        with closing(in_order(fill, enumerate(items), AHEAD, READERS)) as filled:
            for one in filled:
                entering.append(one if isinstance(one, Exception) else ring.arrive(*one))
                if len(entering) > 1:  # the next is on its way before this one's computation may wait for something
                    leaving.append(computed(entering.popleft()))
                if len(leaving) > 1:
                    yield taken()
        while entering:
            leaving.append(computed(entering.popleft()))
            if len(leaving) > 1:
                yield taken()
        while leaving:
            yield taken()
    finally:
        ring.finish()


def _fill(place: Tensor, tensor: Tensor) -> None:
    """Copy on the CPU, on this thread alone, without holding the interpreter back."""
    if tensor.is_contiguous():
        ctypes.memmove(place.data_ptr(), tensor.data_ptr(), tensor.numel() * tensor.element_size())
    else:
        place.copy_(tensor)
