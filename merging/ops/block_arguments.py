"""Arguments of a method's functions for the blocks of one tensor: what statistics over the whole tensor yield."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from merging.ops.tensor_blocks import Block


class BlockArguments(ABC):
    """Keyword arguments of a method's functions for each block of one tensor, beyond the parameters.

    Most methods return `ConstantArguments` or `ArgumentsByBlock`. A subclass serves two further needs: arguments that
    the reading threads compute on the CPU and send to the device together with the rows (`on_host`, `from_host`), and
    other arguments for the compiled kernel (`for_kernel`).
    """

    @abstractmethod
    def for_block(self, block: Block) -> Mapping[str, object]:
        """Return the arguments of the block function, by name, with tensors on the computing device."""

    def for_kernel(self, block: Block) -> Mapping[str, object] | None:
        """Return the arguments of the kernel description, by name; None where the kernel cannot compute the block."""
        return self.for_block(block)

    def on_host(self, block: Block) -> Sequence[Tensor]:
        """Return tensors on the CPU from which `from_host` makes the arguments; called in threads, ahead of time.

        Empty where the arguments are computed on the device, by `for_block`.
        """
        return ()

    def from_host(self, block: Block, tensors: Sequence[Tensor]) -> Mapping[str, object]:
        """Return the arguments of the block function from what `on_host` returned, on the computing device by now."""
        return self.for_block(block)


class ConstantArguments(BlockArguments):
    """The same arguments for every block: `ConstantArguments(coefficients=[0.5, 0.5])`."""

    def __init__(self, **arguments: object) -> None:
        self._arguments = arguments

    def for_block(self, block: Block) -> Mapping[str, object]:
        """Return the arguments."""
        return self._arguments


class ArgumentsByBlock(BlockArguments):
    """Arguments that a function of the block returns: `ArgumentsByBlock(lambda block: {"mask": mask[block.rows]})`."""

    def __init__(self, function: Callable[[Block], Mapping[str, object]]) -> None:
        self._function = function

    def for_block(self, block: Block) -> Mapping[str, object]:
        """Return the arguments for the block."""
        return self._function(block)
