"""The hidden states of all calibration blocks between two layers: on the GPU, in the host's memory, or in a file."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.errors import CalibrationError
from common.hardware import available
from merging.engine.device_pipeline import to_device_async

CPU = torch.device("cpu")

SHARE_OF_MEMORY = 4
"""Hidden states go to the host where they would take more than this part (one in n) of the GPU's free memory, and to
the disk where they would take more than that of the host's."""


PIECE = 1 << 24
"""Bytes of zeros written at a time where a file's room cannot be asked for."""


class HiddenStates:
    """One tensor (n_blocks, tokens, ...) of what the last layer made, made when the first part comes.

    place: "host", "disk", or "auto", which takes the GPU that computes them (`device`), the host's memory where that is
    short, and the disk where that is too; free: bytes of the host's. A file lies in `folder` and has no name while it
    is used, so that nothing is left of it.
    """

    def __init__(
        self, n_blocks: int, place: str, free: int, folder: Path | None = None, device: torch.device = CPU
    ) -> None:
        self.n_blocks, self.place, self._free, self._folder = n_blocks, place, free, folder
        self._device, self._free_there = device, available(device) if device.type == "cuda" else 0
        self._states: Tensor | None = None
        self._map: mmap.mmap | None = None

    def put(self, blocks: Sequence[int], states: Tensor) -> None:
        """Keep states (len(blocks), ...)."""
        if self._states is None:
            self._states = self._room((self.n_blocks, *states.shape[1:]), states)
        if self._states.device.type == "cpu":
            self._states[list(blocks)] = states.to("cpu")
        else:
            self._states.index_copy_(0, self._index(blocks), states)

    def get(self, blocks: Sequence[int], device: torch.device) -> Tensor:
        """Return the states of some blocks (len(blocks), ...) on a device."""
        assert self._states is not None
        if self._states.device.type == "cpu":
            return to_device_async(self._states[list(blocks)], device)
        return self._states.index_select(0, self._index(blocks)).to(device)

    def _index(self, blocks: Sequence[int]) -> Tensor:
        return to_device_async(torch.tensor(list(blocks)), self._device)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return everything on the CPU, for saving an interrupted run."""
        return {} if self._states is None else {"states": self._states.cpu()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `tensors` returned."""
        if "states" in tensors:
            self._states = self._room(tuple(tensors["states"].shape), tensors["states"])
            self._states.copy_(tensors["states"])

    def _room(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        size = torch.Size(shape).numel()
        if self.place == "auto" and size * like.element_size() <= self._free_there // SHARE_OF_MEMORY:
            self.place = "device"
        if self.place == "device":
            return torch.empty(shape, dtype=like.dtype, device=self._device)
        if self.place == "auto":
            self.place = "disk" if size * like.element_size() > self._free // SHARE_OF_MEMORY else "host"
        if self.place == "host":
            return torch.empty(shape, dtype=like.dtype)
        return self._on_disk(size * like.element_size(), like.dtype).view(shape)

    def _on_disk(self, size: int, dtype: torch.dtype) -> Tensor:
        """Map a file without a name, whose room on the disk is there before the first byte is written.

        Raises CalibrationError where it is not.
        """
        folder = self._folder or Path(tempfile.gettempdir())
        try:
            with tempfile.TemporaryFile(dir=folder) as file:  # the map keeps it
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    for start in range(0, size, PIECE):
                        file.write(bytes(min(PIECE, size - start)))
                    file.flush()
                self._map = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise CalibrationError(
                f"The hidden states need {size / 1e9:.2f} GB in {folder} ({error.strerror}); free space there, set "
                "TMPDIR, or give --hidden_states host."
            ) from error
        return torch.frombuffer(self._map, dtype=dtype)

    def close(self) -> None:
        """Give the states' memory or file back."""
        self._states = self._map = None
