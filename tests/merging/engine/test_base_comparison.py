"""Comparison of results with the base: the first tensor that differs is marked, once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merging.checkpoints.checkpoint import open_checkpoint
from merging.engine.base_comparison import CHANGED, BaseComparison
from merging.plan.types import Source, TensorPlan
from tests.helpers.tiny import make_llama


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_a_stack_that_comes_as_one_long_matrix(tmp_path: Path, change: float) -> None:
    """Blocks (rows, columns) of a stack (experts, rows, columns) are compared with the same rows of the base."""
    folder = make_llama(tmp_path / "base")
    stack = torch.arange(24.0).reshape(2, 3, 4)
    (file,) = folder.glob("*.safetensors")
    save_file({"experts": stack}, file, metadata={"format": "pt"})
    source = Source(open_checkpoint(str(folder)), "experts")
    tensor = TensorPlan("experts", (2, 3, 4), "float32", source, (source,), source, {}, True, False)
    comparison = BaseComparison(1)
    comparison.begin(tensor)
    for block in stack.flatten(0, 1).split(2):
        comparison.add([block + change * (block == 23)])
    assert comparison.end(0) == ({CHANGED: True} if change else {})
