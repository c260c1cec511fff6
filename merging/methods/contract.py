"""The contract of a merge method: the functions of merging/methods/NAME.py and the parameters of its YAML file.

A method is one Python file here, whose `METHOD` is a `Method`, and one YAML file, configs/methods/NAME.yaml, which
declares name, paper and parameters (type, bounds, default, help, source, mergekit's name; `merging.recipe.
method_registry.MergeMethod`). Nothing else lists the methods.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from common.errors import FailureError
from merging.ops.block_arguments import BlockArguments
from merging.ops.kernel_spec import KernelSpec
from merging.recipe.method_registry import MergeMethod, find_method


@dataclass(frozen=True, kw_only=True)
class Method:
    """The functions of a merge method; only `merge_block` is required.

    Every function takes the parameters that it needs by keyword, with the names of the YAML file. A parameter that is
    `per_model` is a list with one value for each model. All tensors are fp32 on the computing device, except those of
    `reference`. The engine reads, casts, rounds once at the end, and cuts tensors into blocks of rows: no result may
    depend on the blocks.

    Attributes:
        merge_block: the equation. `(base, finetuned, *, PARAMETERS, ARGUMENTS) -> merged`: base (rows, ...), or None
            where the method has none; finetuned (n, rows, ...), the models stacked; merged (rows, ...). ARGUMENTS are
            those of `tensor_statistics`.
        tensor_statistics: what the equation needs to know of the whole tensor, such as a threshold or an angle.
            `(group, *, PARAMETERS) -> BlockArguments`: it reads `group` (`merging.ops.tensor_blocks.TensorGroup`) block
            by block and returns the further arguments of each block (`merging.ops.block_arguments`).
        model_statistics: what it needs to know of all tensors together. `(groups, *, PARAMETERS) -> object | None`:
            each call of `groups()` yields all tensors that are merged. `tensor_statistics` gets the result, unless it
            is None, as `model_statistics`.
        kernel_spec: description of `merge_block` for the compiled kernel, which computes the same bits in one pass.
            `(*, PARAMETERS, ARGUMENTS) -> KernelSpec | None`: None where the kernel cannot compute the block.
            ARGUMENTS are those of `BlockArguments.for_kernel`.
        reference: the original program's arithmetic, for `--numerics reference`.
            `(base, finetuned, *, PARAMETERS) -> merged` on whole tensors in bf16, finetuned a list of n tensors. It may
            take `is_in_out`, True for a matrix that is stored [in, out].
        elementwise: an entry of the result depends on the same entry of the inputs alone (and on statistics), so that
            rows and columns mean nothing, and a stack of matrices may be read as one long matrix.
    """

    merge_block: Callable[..., Tensor]
    tensor_statistics: Callable[..., BlockArguments] | None = None
    model_statistics: Callable[..., object] | None = None
    kernel_spec: Callable[..., KernelSpec | None] | None = None
    reference: Callable[..., Tensor] | None = None
    elementwise: bool = False

    @property
    def functions(self) -> Mapping[str, Callable[..., object]]:
        """The functions that the method has, by the name of their role."""
        roles = ("merge_block", "tensor_statistics", "model_statistics", "kernel_spec", "reference")
        return {role: function for role in roles if (function := getattr(self, role)) is not None}


STATISTICS = "model_statistics"
"""Keyword argument of `tensor_statistics` that is the result of the method's `model_statistics`."""
LAYOUT = "is_in_out"
"""Keyword argument of `reference`: True for a matrix that is stored [in, out]."""


@cache
def load_method(name: str) -> Method:
    """Import a method by its name in configs/methods/ (this is where torch is loaded) and check it against its YAML.

    Raises:
        FailureError: if the file is missing or its functions do not take the parameters that the YAML declares.
    """
    module_name = f"merging.methods.{name}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name:
            raise
        raise FailureError(
            f"configs/methods/{name}.yaml declares a method without code: write merging/methods/{name}.py."
        ) from None
    method = getattr(module, "METHOD", None)
    if not isinstance(method, Method):
        raise FailureError(f"merging/methods/{name}.py must define METHOD, a merging.methods.contract.Method.")
    check_method(find_method(name), method)
    return method


def check_method(schema: MergeMethod, method: Method) -> None:
    """Compare a method's functions with its YAML.

    Raises:
        FailureError: if a function takes a parameter that the YAML does not declare, if no function takes a declared
            one, or if the YAML is wrong about `reference`.
    """
    file, yaml = f"merging/methods/{schema.name}.py", f"configs/methods/{schema.name}.yaml"
    keywords = {role: keywords_of(function) for role, function in method.functions.items()}
    computed = {"tensor_statistics": {STATISTICS}, "reference": {LAYOUT}}
    for role, names in keywords.items():
        unknown = names - set(schema.parameters) - computed.get(role, set())
        is_computed = role in ("merge_block", "kernel_spec") and method.tensor_statistics is not None
        if unknown and not is_computed:
            raise FailureError(
                f"{file}: {role} takes {', '.join(sorted(unknown))}, which {yaml} does not declare; declare it "
                "there or return it from tensor_statistics."
            )
    unused = set(schema.parameters) - set().union(*keywords.values())
    if unused:
        raise FailureError(f"{yaml} declares {', '.join(sorted(unused))}, which no function of {file} takes.")
    if schema.has_reference != (method.reference is not None):
        has = "has no" if schema.has_reference else "has a"
        raise FailureError(
            f"{yaml} says `reference: {str(schema.has_reference).lower()}`, and {file} {has} reference function."
        )


@cache
def keywords_of(function: Callable[..., object]) -> frozenset[str]:
    """Return the names of a function's keyword-only arguments."""
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)


def select_arguments(function: Callable[..., object], available: Mapping[str, object]) -> dict[str, object]:
    """Return those of the available arguments that the function takes by keyword."""
    names = keywords_of(function)
    return {name: value for name, value in available.items() if name in names}
