"""The contract of a method: its functions are checked against its YAML, and executors get what they ask for by name."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import merging.methods
from common.errors import FailureError
from merging.methods.contract import Method, check_method, load_method, select_arguments
from merging.ops.block_arguments import ArgumentsByBlock, ConstantArguments
from merging.ops.tensor_blocks import Block
from merging.recipe import method_registry
from merging.recipe.method_registry import all_methods, find_method

YAML = """
name: half
title: Half
paper: https://example.org
summary: half of the first model
base: optional
reference: false
parameters:
  amount: {type: float, default: 0.5, help: factor, source: none}
"""
CODE = """
from merging.methods.contract import Method

def half(base, finetuned, *, {argument}):
    return finetuned[0] * {argument}

METHOD = {method}
"""


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None], None]]:
    """Return a function that adds a method `half` with this code (None: no file) to a copy of the real ones."""
    configs, code = tmp_path / "configs", tmp_path / "code"
    shutil.copytree(method_registry.METHODS_FOLDER, configs)
    (configs / "half.yaml").write_text(YAML)
    code.mkdir()
    monkeypatch.setattr(method_registry, "METHODS_FOLDER", configs)
    monkeypatch.setattr(merging.methods, "__path__", [*merging.methods.__path__, str(code)])
    all_methods.cache_clear()

    def add(text: str | None) -> None:
        if text is not None:
            (code / "half.py").write_text(text)

    yield add
    monkeypatch.undo()
    all_methods.cache_clear()
    load_method.cache_clear()
    sys.modules.pop("merging.methods.half", None)


def test_two_files_are_a_method(folders: Callable[[str | None], None]) -> None:
    """One Python file and one YAML are found, checked and merge."""
    folders(CODE.format(argument="amount", method="Method(merge_block=half)"))
    assert "half" in all_methods()
    merged = load_method("half").merge_block(None, torch.full((1, 2, 2), 3.0), amount=0.5)
    assert merged.tolist() == [[1.5, 1.5], [1.5, 1.5]]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, r"half\.yaml declares a method without code: write merging/methods/half\.py"),
        (CODE.format(argument="amount", method="half"), r"half\.py must define METHOD"),
        (
            CODE.format(argument="amuont", method="Method(merge_block=half)"),
            r"half\.py: merge_block takes amuont",
        ),
        (
            CODE.format(argument="amount", method="Method(merge_block=lambda base, finetuned: base)"),
            r"half\.yaml declares amount, which no function of .*half\.py takes",
        ),
        (
            CODE.format(argument="amount", method="Method(merge_block=half, reference=half)"),
            r"half\.yaml says `reference: false`, and .*half\.py has a reference function",
        ),
    ],
)
def test_what_does_not_fit_is_named(folders: Callable[[str | None], None], text: str | None, sentence: str) -> None:
    """A missing file, a missing METHOD, and parameters on one side alone are named with both files."""
    folders(text)
    with pytest.raises(FailureError, match=sentence):
        load_method("half")


def test_computed_arguments_need_a_statistic() -> None:
    """An argument that the YAML does not declare is one that statistics compute, or an error."""

    def merge_block(base: Tensor, finetuned: Tensor, *, scale: float, limit: float) -> Tensor:
        return (finetuned[0] * scale).clamp(max=limit)

    schema = find_method("passthrough")
    check_method(schema, Method(merge_block=merge_block, tensor_statistics=lambda group: ConstantArguments(limit=1.0)))
    with pytest.raises(FailureError, match="merge_block takes limit"):
        check_method(schema, Method(merge_block=merge_block))


def test_arguments_by_name() -> None:
    """A function gets the arguments that it names; positional ones are not among them."""

    def function(base: object, *, density: float, block: object = None) -> None:
        """Do nothing."""

    assert select_arguments(function, {"base": 1, "density": 2, "other": 3}) == {"density": 2}


def test_block_arguments() -> None:
    """Constant arguments are those of every block, for torch and kernel alike; others follow the block."""
    constant, first, second = ConstantArguments(a=1), Block(0, 2, 3), Block(2, 3, 3)
    assert constant.for_block(first) == constant.for_kernel(second) == {"a": 1}
    by_block = ArgumentsByBlock(lambda block: {"start": block.start})
    assert by_block.for_kernel(second) == by_block.for_block(second) == {"start": 2}
    assert list(by_block.on_host(first)) == []
