"""The hidden states of all calibration blocks between two layers: in the host's memory, or in a file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

SHARE_OF_MEMORY = 4
"""Hidden states go to the disk where they would take more than this part (one in n) of the free memory."""


class HiddenStates:
    """One tensor (n_blocks, tokens, ...) of what the last layer made, made when the first part comes.

    place: "host", "disk", or "auto", which takes the disk where memory is short; a file lies in `folder` and has no
    name while it is used, so that nothing is left of it.
    """

    def __init__(self, n_blocks: int, place: str, free: int, folder: Path | None = None) -> None:
        self.n_blocks, self.place, self._free, self._folder = n_blocks, place, free, folder
        self._states: Tensor | None = None

    def put(self, blocks: Sequence[int], states: Tensor) -> None:
        """Keep states (len(blocks), ...)."""
        if self._states is None:
            self._states = self._room((self.n_blocks, *states.shape[1:]), states)
        self._states[list(blocks)] = states.to("cpu")

    def get(self, blocks: Sequence[int], device: torch.device) -> Tensor:
        """Return the states of some blocks (len(blocks), ...) on a device."""
        assert self._states is not None
        return self._states[list(blocks)].to(device)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return everything, for saving an interrupted run."""
        return {} if self._states is None else {"states": self._states}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `tensors` returned."""
        if "states" in tensors:
            self._states = self._room(tuple(tensors["states"].shape), tensors["states"])
            self._states.copy_(tensors["states"])

    def _room(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        size = torch.Size(shape).numel()
        if self.place == "auto":
            self.place = "disk" if size * like.element_size() > self._free // SHARE_OF_MEMORY else "host"
        if self.place == "host":
            return torch.empty(shape, dtype=like.dtype)
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".hidden-") as file:  # its name goes, the map stays
            return torch.from_file(file.name, shared=True, size=size, dtype=like.dtype).view(shape)
