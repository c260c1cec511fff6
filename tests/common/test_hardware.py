"""The dtype that models run in where nobody says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aim.calibration.config import Calibration
from aim.measure import Settings as AimSettings
from aim.measure import calibration_dtype
from common.distributed import SINGLE_PROCESS
from common.hardware import BFLOAT16, multiplies_bfloat16, product_dtype
from eval.harness.models import resolve_device
from eval.settings import Settings
from merging.checkpoints.checkpoint import open_checkpoint
from tests.helpers.tiny import make_llama

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def processor(monkeypatch: pytest.MonkeyPatch, *able: str) -> None:
    """Have torch report a processor with these instructions."""
    listed = {"avx2": True, **dict.fromkeys(BFLOAT16, False), **dict.fromkeys(able, True)}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: listed, raising=False)


@pytest.mark.parametrize("able", BFLOAT16)
def test_products_are_made_in_what_the_processor_has(monkeypatch: pytest.MonkeyPatch, able: str) -> None:
    """bfloat16 where there are instructions for it, float32 where torch would emulate them; a GPU computes in it."""
    processor(monkeypatch, able)
    assert product_dtype("cpu") == product_dtype("cuda") == "bfloat16"
    processor(monkeypatch)
    assert (product_dtype("cpu"), product_dtype("cuda")) == ("float32", "bfloat16")


def test_an_older_torch_is_asked_in_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has no list of instructions its single questions decide; one that it does not know means no."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda able=able: able)
        assert multiplies_bfloat16() == able


def test_calibration_runs_bfloat16_where_it_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base stored in bfloat16 is run in float32 on a processor that emulates it; what is asked for, the reference's
    numerics, other stored dtypes and GPUs are left alone."""
    half = open_checkpoint(str(make_llama(tmp_path / "half")))
    single = open_checkpoint(str(make_llama(tmp_path / "single", dtype=torch.float32)))
    settings = AimSettings(Calibration("x.txt"))
    processor(monkeypatch)
    assert calibration_dtype(half, settings, CPU) == calibration_dtype(single, settings, CPU) == "float32"
    assert calibration_dtype(half, settings, GPU) == "bfloat16"
    assert calibration_dtype(half, replace(settings, calibration_dtype="bfloat16"), CPU) == "bfloat16"
    assert calibration_dtype(half, replace(settings, reference=True), CPU) == "bfloat16"
    processor(monkeypatch, "avx512_bf16")
    assert calibration_dtype(half, settings, CPU) == "bfloat16"


def test_evaluation_runs_in_the_papers_dtype_where_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 is the paper's; a CPU that emulates it evaluates in float32 unless told otherwise."""
    settings = Settings(device="cpu")
    processor(monkeypatch)
    assert resolve_device(settings, "model", SINGLE_PROCESS).dtype == "float32"
    assert resolve_device(replace(settings, dtype="bfloat16"), "model", SINGLE_PROCESS).dtype == "bfloat16"
    processor(monkeypatch, "amx_bf16")
    assert resolve_device(settings, "model", SINGLE_PROCESS).dtype == "bfloat16"
