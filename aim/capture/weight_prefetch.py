"""Stored tensors on their way to a GPU while it computes with others: read by a thread, copied in by a lane of its own.

They are a layer's weights, read while the layer before it runs, so that two layers' weights are on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from common.hardware import ran_out
from merging.engine.device_pipeline import CopyStream, Event, to_device_async


class WeightPrefetch:
    """Prefetch of stored tensors. read: returns a stored tensor on the CPU, called from one other thread."""

    def __init__(self, read: Callable[[str], Tensor], device: torch.device) -> None:
        self._read, self._device = read, device
        self._stream = CopyStream(device)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._asked: tuple[list[str], Future[tuple[dict[str, Tensor], Event]]] | None = None

    def ask(self, names: Sequence[str]) -> None:
        """Let tensors be read and copied; they take the place of what was asked for before."""
        self.settle()
        self._asked = (list(names), self._reader.submit(self._fetch, list(names)))

    def take(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return those of the tensors that are on the device, in their stored dtypes, to be used on the current stream.

        None of them where others were asked for last, or where the device has no room for them beside what it does.
        Raises what reading them raised.
        """
        if self._asked is None or self._asked[0] != list(names):
            return {}
        coming, self._asked = self._asked[1], None
        copies, event = coming.result()
        current = CopyStream(self._device, current=True)
        current.wait_for(event)
        if current.stream is not None:
            for tensor in copies.values():  # their memory is the other lane's, which must not take it back too early
                tensor.record_stream(current.stream)
        return copies

    def settle(self) -> None:
        """Return when nothing is being read, so that files can be closed."""
        if self._asked is not None:
            wait([self._asked[1]])

    def _fetch(self, names: Sequence[str]) -> tuple[dict[str, Tensor], Event]:
        try:
            with self._stream.context():
                copies = {name: to_device_async(self._read(name), self._device) for name in names}
        except RuntimeError as error:
            if not ran_out(error):
                raise
            return {}, None
        return copies, self._stream.record_event()
