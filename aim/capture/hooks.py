"""Seeing what flows into a model's weights: every product with a weight matrix, and every norm.

Products are caught where they are computed, by the memory of the weight in them, whichever module calls: linear layers,
Conv1D, routers, experts in one fused tensor, and weights that are used without calling their module (Mamba's). Norms
are seen at their module's input. Embeddings are looked up and enter no product, so nothing is seen of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Callback = Callable[["LayerInput"], None]
"""Takes what was seen."""


@dataclass(frozen=True, eq=False)
class LayerInput:
    """One use of a weight: the parameter's name, the axis that its input channels run along, and the input.

    x (..., channels), seen through the tensor `owner`, which tells inputs that several weights share; experts: how many
    matrices the parameter stacks (0: it is one weight); expert: which of them it was, or None for all of them at once,
    x (experts, tokens, channels), a token that is zero there being one that was not routed to that expert.
    """

    name: str
    axis: int
    x: Tensor
    owner: Tensor
    experts: int = 0
    expert: int | None = None


@contextmanager
def capture_inputs(model: nn.Module, sink: Callback) -> Iterator[None]:
    """Report every use of the model's weights to `sink` while the block runs, leaving out the output head's product.

    The head's input is reported and its output is not computed: nothing of AIM depends on logits.
    """
    head = output_head(model)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if head is not None and module is head:
                stack.enter_context(_stubbed_head(name, module, sink))
            elif _is_norm(module):
                handle = module.register_forward_pre_hook(_norm_hook(f"{name}.weight", sink), with_kwargs=True)
                stack.callback(handle.remove)
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        stack.enter_context(_Products(_matrices(model, tables), sink))
        yield


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the module that makes logits, None where a model has none."""
    try:
        result: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
        return result
    except (AttributeError, NotImplementedError):
        return None


def _is_norm(module: nn.Module) -> bool:
    """A module with a vector as weight multiplies its input by it, entry by entry."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1 and weight.is_floating_point()


def _norm_hook(name: str, sink: Callback) -> Callable[..., None]:
    def observe(module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        x = _input(args, kwargs, len(module.weight))  # type: ignore[arg-type]
        if x is not None:
            sink(LayerInput(name, 0, x, x))

    return observe


def _input(args: Sequence[object], kwargs: Mapping[str, object], channels: int) -> Tensor | None:
    """The first floating-point tensor of a call whose last axis has as many entries as the weight."""
    tensors = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point())
    return next((x for x in tensors if x.dim() and x.shape[-1] == channels), None)


@contextmanager
def _stubbed_head(name: str, head: nn.Module, sink: Callback) -> Iterator[None]:
    """Report the head's input; its forward returns one zero per token in place of logits."""

    def forward(x: Tensor, *_: object, **__: object) -> Tensor:
        sink(LayerInput(f"{name}.weight", 1, x, x))
        return x.new_zeros((*x.shape[:-1], 1))

    before = head.__dict__.get("forward")
    head.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before  # type: ignore[method-assign]


def _matrices(model: nn.Module, tables: set[int]) -> dict[int, list[tuple[str, Tensor]]]:
    """Return {address of the memory: [(name, parameter)]} of the weights that products are looked for with."""
    matrices_by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and parameter.is_floating_point() and id(parameter) not in tables:
            matrices_by_storage.setdefault(parameter.untyped_storage().data_ptr(), []).append((name, parameter))
    matrices_by_storage.pop(0, None)  # on the meta device
    return matrices_by_storage


class _Products(TorchFunctionMode):
    """Looks at the arguments of every product that torch is asked for."""

    def __init__(self, matrices: Mapping[int, Sequence[tuple[str, Tensor]]], sink: Callback) -> None:
        super().__init__()
        self._matrices, self._sink = matrices, sink

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        observe = _PRODUCTS.get(func)
        if observe is not None:
            with torch._C.DisableTorchFunction():
                observe(self, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def linear(self, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """Record the input of `input @ weight.T`."""
        x = args[0] if args else kwargs["input"]
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        self._report(weight, -1, x)

    def matmul(self, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """Record the input of `left @ right`, either of which may be the weight."""
        left, right = _two(args, kwargs)
        if not (isinstance(left, Tensor) and isinstance(right, Tensor)) or left.dim() < 2 or right.dim() < 2:
            return
        if not self._report(right, -2, left):
            self._report(left, -1, right.transpose(-1, -2), owner=right)

    def swapped(self, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """Record the input of `right @ left`, as Python's reflected operator gives them."""
        self.matmul(args[1::-1], kwargs)

    def added(self, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """Record the input of `sum + left @ right`."""
        self.matmul(args[1:], kwargs)

    def convolved(self, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """A convolution over time: each channel by itself, or all of them mixed."""
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        x, weight, groups = arguments["input"], arguments["weight"], arguments.get("groups", 1)
        if not isinstance(x, Tensor) or not isinstance(weight, Tensor):
            return
        if groups == 1:
            self._report(weight, 1, x.transpose(-1, -2), owner=x, stacked=False)
        elif groups == weight.shape[0] == x.shape[-2]:
            self._report(weight, 0, x.transpose(-1, -2), owner=x, stacked=False)

    def _report(self, weight: object, dim: int, x: object, owner: Tensor | None = None, stacked: bool = True) -> bool:
        """Report the use of `weight`, whose input channels run along its `dim`, if it is one of the model's.

        stacked: whether a parameter of three dimensions is a stack of matrices.
        """
        if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or not weight.is_floating_point():
            return False
        if weight.device.type == "meta":
            return False
        for name, parameter in self._matrices.get(weight.untyped_storage().data_ptr(), ()):
            place = _place(weight, dim, parameter)
            if place is not None and x.shape[-1] == weight.shape[dim]:
                axis, expert = place
                experts = parameter.shape[0] if stacked and parameter.dim() == 3 else 0
                self._sink(LayerInput(name, axis, x, x if owner is None else owner, experts, expert))
                return True
        return False


def _two(args: Sequence[object], kwargs: Mapping[str, object]) -> tuple[object, object]:
    """The factors of a product, by position or by any of the names that torch gives the second one."""
    rest = [kwargs[key] for key in ("input", "mat1", "batch1", "other", "mat2", "batch2", "tensor2") if key in kwargs]
    both = [*args[:2], *rest]
    return (both[0], both[1]) if len(both) > 1 else (None, None)


def _place(view: Tensor, dim: int, parameter: Tensor) -> tuple[int, int | None] | None:
    """Return (axis of the parameter along `view`'s dim, which matrix of a stack), or None where it is no such view.

    A whole parameter, transposed or with axes of length 1 put in or taken out; or one matrix of a parameter of three
    dimensions.
    """
    size, stride = view.shape[dim], view.stride(dim)
    axes = [i for i in range(parameter.dim()) if (parameter.shape[i], parameter.stride(i)) == (size, stride)]
    offset = view.storage_offset() - parameter.storage_offset()
    if len(axes) != 1 or not 0 <= offset < parameter.numel():
        return None
    if view.numel() == parameter.numel():
        return (axes[0], None) if offset == 0 else None
    if parameter.dim() == 3 and axes[0] > 0 and view.numel() * parameter.shape[0] == parameter.numel():
        expert, rest = divmod(int(offset), parameter.stride(0))
        return (axes[0], expert) if rest == 0 else None
    return None


_PRODUCTS: dict[object, Callable[..., None]] = {
    nn.functional.linear: _Products.linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _Products.matmul),
    **dict.fromkeys((torch.bmm, Tensor.bmm), _Products.matmul),
    Tensor.__rmatmul__: _Products.swapped,
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm), _Products.added),
    nn.functional.conv1d: _Products.convolved,
}
