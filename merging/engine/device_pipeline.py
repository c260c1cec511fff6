"""Pipeline of blocks through a device: read into page-locked memory, copy in, compute, copy back, all overlapped.

    reader threads    read block i+3 ...  into a ring of staging buffers
    host_to_device    copy block i+2      once its place on the device is free
    current stream    compute block i     as soon as it has arrived
    device_to_host    copy block i-1      as soon as it is computed

A CopyStream is a CUDA stream; the computation stays on the current one, and streams wait for each other's events alone.
On the CPU an operation is complete when its call returns: there the streams do nothing, and the same pipeline runs with
ordinary memory, which is how its order and its errors are tested on a machine without a GPU.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from typing import Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

from common.threads import in_order, threads
from merging.ops.tensor_blocks import BLOCK_ELEMENTS

BLOCK_ELEMENTS_GPU = 1 << 22
"""Elements of one tensor per block on a GPU: enough that launching its kernels costs less than moving it."""
MAX_READERS = 8
"""Most threads that read at a time, each with a block in page-locked memory; 16 are hardly faster."""
EXTRA_READS = 1
"""Blocks that may be read beyond one for each thread."""
DEPTH = 3
"""Blocks that have a place on the device, or a place for their results on the host."""
ALIGNMENT = 512
"""Bytes that tensors in one buffer begin at multiples of, as the CUDA allocator's do."""

Item = TypeVar("Item")
Read: TypeAlias = Callable[[Item], Sequence[Tensor]]
Compute: TypeAlias = Callable[[Item, Sequence[Tensor]], Sequence[Tensor]]
Event: TypeAlias = "torch.cuda.Event | None"
"""A point in a stream's work; None where it is already complete."""
_OnDevice: TypeAlias = tuple[int, Item, list[Tensor], Event]
_Computed: TypeAlias = tuple[list[Tensor], Sequence[Tensor], Event]


class CopyStream:
    """A queue of copies that the device works through next to its computation; it does nothing on the CPU."""

    def __init__(self, device: torch.device, current: bool = False) -> None:
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.current_stream(device) if current else torch.cuda.Stream(device)

    def context(self) -> AbstractContextManager[object]:
        """Return a context in which torch's work, and the memory that it takes, belongs to this stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Copy each source to its target, of the same shape and dtype, without waiting for it."""
        with self.context():
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)

    def record_event(self) -> Event:
        """Return the event that completes after everything submitted to the stream so far."""
        if self.stream is None:
            return None
        event = torch.cuda.Event(blocking=True)  # a waiting thread leaves its core to others
        event.record(self.stream)
        return event

    def wait_for(self, event: Event) -> None:
        """Make work submitted from now on begin after an event of another stream."""
        if event is not None and self.stream is not None:
            self.stream.wait_event(event)

    def synchronize(self) -> None:
        """Block until everything submitted to the stream is complete."""
        if self.stream is not None:
            self.stream.synchronize()


def wait(event: Event) -> None:
    """Block until the event is complete."""
    if event is not None:
        event.synchronize()


def to_device_async(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; from the CPU to a GPU through page-locked memory, without waiting for the copy.

    torch reuses the page-locked memory once it has been read.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def block_elements_for(device: torch.device) -> int:
    """Return the elements of one tensor per block on a device; no result depends on it."""
    return BLOCK_ELEMENTS_GPU if device.type == "cuda" else BLOCK_ELEMENTS


class _Arena:
    """Memory in which tensors are laid out one after the other; it grows to the largest request.

    free: the event after which it may be written to again.
    """

    def __init__(self, allocate: Callable[[int], Tensor]) -> None:
        self._allocate, self._bytes = allocate, torch.empty(0, dtype=torch.uint8)
        self.free: Event = None

    def lay_out(self, like: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
        """Return views for tensors of these shapes and dtypes, and whether they lie in new memory."""
        sizes = [-(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT for tensor in like]
        is_new = sum(sizes) > self._bytes.numel()
        if is_new:
            wait(self.free)
            self._bytes = torch.empty(0, dtype=torch.uint8)  # frees the old memory before it allocates the new
            self._bytes = self._allocate(sum(sizes))
        views, start = [], 0
        for tensor, size in zip(like, sizes, strict=True):
            part = self._bytes[start : start + tensor.numel() * tensor.element_size()]
            views.append(part.view(tensor.dtype).view(tensor.shape))
            start += size
        return views, is_new


class _Ring(Generic[Item]):
    """The stages of the pipeline, each with arenas for a few items that are used in turn."""

    def __init__(self, read: Read[Item], compute: Compute[Item], device: torch.device) -> None:
        self._read, self._compute = read, compute
        on_host = partial(torch.empty, dtype=torch.uint8, pin_memory=device.type == "cuda")
        on_device = partial(torch.empty, dtype=torch.uint8, device=device)
        readers = min(threads(), MAX_READERS)
        self.staging = [_Arena(on_host) for _ in range(readers + EXTRA_READS)]  # as many as `in_order` begins
        self.inputs, self.outputs = [_Arena(on_device) for _ in range(DEPTH)], [_Arena(on_host) for _ in range(DEPTH)]
        self.host_to_device, self.device_to_host = CopyStream(device), CopyStream(device)
        self.current = CopyStream(device, current=True)

    def fill(self, numbered: tuple[int, Item]) -> tuple[int, Item, list[Tensor]]:
        """Read an item into its staging buffer, on a reader thread."""
        number, item = numbered
        tensors, arena = self._read(item), self.staging[number % len(self.staging)]
        wait(arena.free)  # its previous contents have been copied to the device
        views, _ = arena.lay_out(tensors)
        for view, tensor in zip(views, tensors, strict=True):
            _copy_on_cpu(view, tensor)
        return number, item, views

    def send(self, number: int, item: Item, staged: list[Tensor]) -> _OnDevice[Item]:
        """Start the copy to the device."""
        arena = self.inputs[number % DEPTH]
        views, is_new = arena.lay_out(staged)
        # new memory may have been freed by a computation that is still running
        self.host_to_device.wait_for(self.current.record_event() if is_new else arena.free)
        self.host_to_device.copy(views, staged)
        copied = self.staging[number % len(self.staging)].free = self.host_to_device.record_event()
        return number, item, views, copied

    def compute(self, number: int, item: Item, on_device: list[Tensor], copied: Event) -> _Computed:
        """Start the computation and the copy of its results to the host.

        Returns the results' places on the host, the results themselves, which must live until they are copied, and the
        event of that copy.
        """
        self.current.wait_for(copied)
        results = self._compute(item, on_device)
        distinct = {id(result): result for result in results}
        views, _ = self.outputs[number % DEPTH].lay_out(list(distinct.values()))
        self.device_to_host.wait_for(self.current.record_event())
        self.device_to_host.copy(views, list(distinct.values()))
        # only after this copy, not after the computation: a result may be an input's own memory
        copied_back = self.inputs[number % DEPTH].free = self.device_to_host.record_event()
        by_id = dict(zip(distinct, views, strict=True))
        return [by_id[id(result)] for result in results], results, copied_back

    def synchronize(self) -> None:
        """Block until nothing is running on the device."""
        for stream in (self.host_to_device, self.current, self.device_to_host):
            stream.synchronize()


def pipeline(
    items: Iterable[Item], read: Read[Item], compute: Compute[Item], device: torch.device
) -> Generator[Sequence[Tensor], None, None]:
    """Yield the results of `compute(item, tensors)` for each item, in order, on the CPU.

    An error of `read` or `compute` is raised after the results of the items before it. Then, and when the caller stops
    early, everything that has begun is waited for and all memory is freed.

    Args:
        items: what is read and computed, in order.
        read: returns an item's tensors on the CPU; runs in threads, ahead of the computation.
        compute: gets an item and its tensors on the device, in their own dtypes, in memory that is reused later, and
            returns its results there. It runs on the calling thread and the current stream.
        device: of the computation.

    Yields:
        The results on the CPU, which are overwritten after the next ones are requested.
    """
    ring = _Ring(read, compute, device)
    copied_in: deque[_OnDevice[Item] | Exception] = deque()
    computed: deque[_Computed | Exception] = deque()

    def fill(numbered: tuple[int, Item]) -> tuple[int, Item, list[Tensor]] | Exception:
        try:
            return ring.fill(numbered)
        except Exception as error:
            return error  # raised in its turn

    def compute_one(one: _OnDevice[Item] | Exception) -> _Computed | Exception:
        try:
            return one if isinstance(one, Exception) else ring.compute(*one)
        except Exception as error:
            return error

    def next_results() -> list[Tensor]:
        one = computed.popleft()
        if isinstance(one, Exception):
            raise one
        results, _, copied_back = one
        wait(copied_back)
        return results

    try:
        with closing(in_order(fill, enumerate(items), EXTRA_READS, MAX_READERS)) as filled:
            for one in filled:
                copied_in.append(one if isinstance(one, Exception) else ring.send(*one))
                if len(copied_in) > 1:  # the next copy has started before this computation may wait for something
                    computed.append(compute_one(copied_in.popleft()))
                if len(computed) > 1:
                    yield next_results()
        while copied_in:
            computed.append(compute_one(copied_in.popleft()))
            if len(computed) > 1:
                yield next_results()
        while computed:
            yield next_results()
    finally:
        ring.synchronize()


def _copy_on_cpu(target: Tensor, source: Tensor) -> None:
    """Copy on the calling thread alone, without holding the interpreter lock."""
    if source.is_contiguous():
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.numel() * source.element_size())
    else:
        target.copy_(source)
