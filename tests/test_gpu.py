"""What must hold on a CUDA device; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from merging.registry import all_methods, find_method
from merging.stream import Job, merge_group
from merging.tensors import TensorGroup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]


@pytest.mark.parametrize("method", sorted(all_methods()))
def test_device_does_not_change_the_result(method: str) -> None:
    """Law 15 and house law 2: CPU and GPU give the same bits, WIDEN (reductions) to 1e-6 relative."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(300, 200, generator=generator).bfloat16()
    models = tuple((base.float() + 0.02 * torch.randn(300, 200, generator=generator)).bfloat16() for _ in range(3))
    spec = find_method(method)
    parameters = {name: p.for_models(p.default, 3) for name, p in spec.parameters.items()}
    results = []
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        group = TensorGroup("w", base, models, device, block_elements=7000)
        results.append(merge_group(group, Job(spec.implementation(), device), parameters, torch.float32))
    if method == "widen":
        assert torch.allclose(*results, rtol=1e-6, atol=0)
    else:
        assert torch.equal(*results)


def test_calibration_on_the_device(family) -> None:
    """Activations measured on the GPU agree with the CPU's in fp32 to 1e-4 relative (matrix products differ)."""
    from transformers import AutoModelForCausalLM

    from aim.calibrate import calibrate

    model = AutoModelForCausalLM.from_pretrained(family["base"], dtype=torch.float32).eval()
    blocks = torch.randint(3, 320, (6, 32), generator=torch.Generator().manual_seed(1))
    cpu = calibrate(model, blocks, quiet=True).means
    gpu = calibrate(model.cuda(), blocks, batch_size=3, quiet=True).means
    assert all(torch.allclose(cpu[name], gpu[name], rtol=1e-4) for name in cpu)
