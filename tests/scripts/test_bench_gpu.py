"""The benchmark of a GPU runs whole where there is none, on small things, and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from aim.statistics.mean_abs import sum_tokens
from common.errors import UsageError
from scripts.benchmarks import bench_gpu
from scripts.benchmarks.bench_gpu_parts import product_flops, random_llama


def test_all_parts_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part is measured and printed as a table, and kept as JSON; on the CPU beside itself all bits are equal."""
    kept = tmp_path / "results" / "gpu.json"
    small = ["--shape", "tiny", "--layers", "1", "--blocks", "2", "--block_size", "16", "--runs", "1"]
    assert bench_gpu.main([*small, "--device", "cpu", "--json", str(kept), "--quiet"]) == 0
    found = json.loads(kept.read_text())
    assert {"limits", "calibration", "merging", "parity"} <= set(found)
    assert found["calibration"]["ways"]["ours"]["tokens"] == 32
    assert found["limits"]["matrix_rate"] > 0
    assert all(entry["rate"] > 0 for entry in found["merging"]["work"].values())
    assert all(entry["equal"] for entry in found["parity"].values())
    printed = capsys.readouterr().out
    assert sum(line.startswith("| ---") for line in printed.splitlines()) == 4
    for head in ("bf16 product", "one block at a time", "dare_ties 0.5", "equal bits"):
        assert head in printed


def test_operations_are_those_of_the_weights() -> None:
    """Two operations for each weight that a token is multiplied with: the embedding is looked up, the head left out."""
    shape = {"hidden": 128, "intermediate": 256, "layers": 2, "vocab": 50, "kv": 64}
    model = random_llama(shape, torch.device("cpu"))
    layer = 2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128
    assert product_flops(model, head=False) == 2 * 2 * layer
    assert product_flops(model, head=True) == 2 * (2 * layer + 50 * 128)


def test_a_part_that_is_none() -> None:
    """An unknown part is a sentence that names those there are."""
    with pytest.raises(UsageError, match=r"--parts takes a, b, c, d, found \['e'\]"):
        bench_gpu.main(["--parts", "a,e", "--device", "cpu"])


def test_the_sum_that_a_gpu_takes() -> None:
    """The reduction that a GPU takes for the sum of magnitudes is that sum, to the rounding of fp32."""
    x = torch.randn(3, 500, 70, generator=torch.Generator().manual_seed(0)).bfloat16()
    for dim in (0, 1):
        found = torch.linalg.vector_norm(x, ord=1, dim=dim, dtype=torch.float32).double()
        assert torch.allclose(found, sum_tokens(x, dim), rtol=1e-5, atol=0)
