"""What must hold on a CUDA device; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from aim.importance import Importance
from aim.relaxer import KEPT_BASE, RELAXED, Relaxer
from merging.engine.device_pipeline import pipeline
from merging.engine.execution import ExecutionConfig
from merging.methods.contract import load_method
from merging.ops.tensor_blocks import TensorGroup
from merging.recipe.method_registry import all_methods, find_method
from tests.helpers.merging import merge_group, merged_blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]

BY_ENTRY = [
    "arcee_fusion", "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties",
    "della", "della_linear", "nearswap", "passthrough", "ram", "ramplus_tl", "widen",
]  # fmt: skip
"""Methods whose blocks are products, sums and comparisons entry by entry; sums over tensors are taken on the CPU."""


def stored_as(dtype: torch.dtype, shape: tuple[int, ...] = (300, 200)) -> list[torch.Tensor]:
    """A base and three models."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    return [base.to(dtype), *((base + 0.02 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(3))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", sorted(all_methods()))
def test_device_does_not_change_the_result(method: str, dtype: torch.dtype) -> None:
    """Law 15 and house law 2: CPU and GPU give the same bits, in every result dtype and whatever the blocks; methods
    with sums or transcendental functions of their own on the device 1e-6 of the largest entry."""
    stored = stored_as(dtype)
    spec = find_method(method)
    used = tuple(stored[1 : 1 + int(min(3, spec.max_models))])
    defaults = {name: 0.3 if p.default is None else p.default for name, p in spec.parameters.items()}
    parameters = {name: p.for_models(defaults[name], len(used)) for name, p in spec.parameters.items()}
    settings = [{}, {"density": [0.5] * len(used), "weights": [0.7, 0.2, 0.4][: len(used)], "normalize": True}]
    for given in settings:
        known = {name: given.get(name, value) for name, value in parameters.items()}
        for block in (7000, 60_000):
            results = []
            for name in ("cpu", "cuda"):
                device = torch.device(name)
                group = TensorGroup("w.weight", stored[0], used, device, block_elements=block)
                out = dtype if method in BY_ENTRY else torch.float32
                results.append(merge_group(group, ExecutionConfig(load_method(spec.name), device), known, out))
            cpu, gpu = results
            assert gpu.device.type == "cpu"
            if method in BY_ENTRY:
                assert torch.equal(cpu, gpu), (given, block)
            else:
                assert float((cpu - gpu).abs().max()) <= 1e-6 * float(cpu.abs().max()), (given, block)


@pytest.mark.parametrize("verdict", [RELAXED, KEPT_BASE])
def test_relaxation_on_the_device(verdict: str) -> None:
    """Relaxed with several omegas on the GPU, a tensor has the CPU's bits, and so has one of --keep_base."""
    stored = stored_as(torch.float32)
    importance = Importance({"w": torch.rand(200)}, {"w": 1}, {}, {}, {"name": "b", "fingerprint": "f"})
    results = []
    for name in ("cpu", "cuda"):
        relaxer = Relaxer(importance, (0.0, 0.4, 1.0), account={"w": verdict})
        relaxer._sources, relaxer._shapes = {"w": "w"}, {"w": (300, 200)}
        group = TensorGroup("w", stored[0], (stored[1],), torch.device(name), block_elements=3000)
        job = ExecutionConfig(load_method("task_arithmetic"), torch.device(name), relaxation=relaxer)
        given = {"weights": [1.0], "scaling": 1.0, "normalize": False}
        made = [[t.clone() for t in one] for one in merged_blocks(group, job, given, torch.float32)]
        results.append([torch.cat(parts) for parts in zip(*made, strict=True)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_ring_holds_on_the_device() -> None:
    """Two hundred blocks of changing size come back in order and whole, while later ones are under way, where the
    computation takes long, and where the result is the very memory that arrived; device memory stays that of a few."""
    device = torch.device("cuda")
    sizes = [1 << 20, 1 << 18, (1 << 20) + 77, 3]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    def read(i: int) -> list[torch.Tensor]:
        return [torch.full((sizes[i % 4],), float(i)), torch.full((sizes[i % 4],), i, dtype=torch.int32)]

    def slow(i: int, there: list[torch.Tensor]) -> list[torch.Tensor]:
        if i % 5 == 0:
            torch.cuda._sleep(2_000_000)
        return [there[0] * 2 + 1, there[1]]

    for i, (doubled, same) in enumerate(pipeline(range(200), read, slow, device)):
        assert bool((doubled == 2.0 * i + 1).all()), i
        assert bool((same == i).all()), i
        assert doubled.is_pinned()
    assert torch.cuda.max_memory_allocated() - before <= 16 * 8 * (1 << 20)


def test_errors_leave_the_device_usable() -> None:
    """An error of the block function comes through as it is, and the next run is as right as any."""
    device = torch.device("cuda")

    def broken(i: int, there: list[torch.Tensor]) -> list[torch.Tensor]:
        if i == 5:
            raise ValueError("five cannot be made")
        return [there[0] + 1]

    with pytest.raises(ValueError, match=r"^five"):
        list(pipeline(range(20), lambda i: [torch.full((100_000,), float(i))], broken, device))
    results = pipeline(range(20), lambda i: [torch.full((100_000,), float(i))], lambda i, t: [t[0] + 1], device)
    assert all(bool((one[0] == i + 1).all()) for i, one in enumerate(results))


def test_calibration_on_the_device(family) -> None:
    """Activations measured on the GPU agree with the CPU's in fp32 to 1e-4 relative (matrix products differ), whole and
    by layers, whose weights come ahead and whose hidden states stay on the device."""
    from aim.capture.base_model import Skeleton, load_whole
    from aim.capture.layerwise import calibrate_layerwise
    from aim.capture.whole_model import calibrate
    from merging.checkpoints.checkpoint import open_checkpoint

    base = open_checkpoint(str(family["base"]))
    blocks = torch.randint(3, 320, (6, 32), generator=torch.Generator().manual_seed(1))
    cpu = calibrate(load_whole(base, "float32", torch.device("cpu")), blocks)
    there = torch.device("cuda")
    whole = calibrate(load_whole(base, "float32", there), blocks, batch_size=3)
    skeleton = Skeleton(base, "float32", there)
    assert skeleton.ahead is not None
    layered = calibrate_layerwise(skeleton, blocks, batch_size=3)
    for found in (whole, layered):
        assert found.tokens == cpu.tokens
        assert all(torch.allclose(mean, found.means[name], rtol=1e-4) for name, mean in cpu.means.items())


def test_a_batch_is_not_waited_for(family) -> None:
    """Seeing what flows into the weights makes the host wait for the GPU no more often than the model's pass alone."""
    from transformers import AutoModelForCausalLM

    from aim.capture.hooks import capture_inputs
    from aim.capture.statistics import Batch
    from aim.capture.whole_model import forward_arguments

    model = AutoModelForCausalLM.from_pretrained(family["base"], dtype=torch.bfloat16).eval().cuda()
    given = forward_arguments(model, torch.randint(3, 320, (4, 32)).cuda())

    def waits(sink: Batch | None) -> int:
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as seen, torch.no_grad():
            if sink is None:
                model(**given)
            else:
                with capture_inputs(model, sink):
                    model(**given)
        found = ("aten::_local_scalar_dense", "cudaStreamSynchronize", "cudaDeviceSynchronize")
        return sum(entry.count for entry in seen.key_averages() if entry.key in found)

    waits(None)
    assert waits(Batch()) <= waits(None)
