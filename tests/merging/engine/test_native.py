"""The compiled kernels give the bits of the plain expressions, decline what they cannot, and can be left out."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3

from aim.relax import relax_tensor
from common.threads import in_order, threads
from merging.engine.execution import ExecutionConfig
from merging.methods.contract import load_method
from merging.ops.kernels.kernels import Kernels, kernels
from merging.ops.order_statistics import UPPER_BINS, lower_counts, upper_counts
from merging.ops.tensor_blocks import TensorGroup
from merging.output import digests
from merging.output.digests import Digest, InputDigests
from merging.recipe.method_registry import all_methods, find_method
from tests.helpers.merging import merge_group
from tests.helpers.tiny import weights

CPU = torch.device("cpu")
FUSED = [
    name for name, method in all_methods().items() if load_method(method.name).kernel_spec is not None or name == "sce"
]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.fixture(scope="module")
def compiled() -> Kernels:
    """The kernels; a machine without a compiler has none to test."""
    found = kernels()
    if found is None:
        pytest.skip("no C compiler here: the plain expressions do the work")
    return found


def tensors(dtype: torch.dtype, shape: tuple[int, ...] = (61, 1100), odd: bool = True) -> list[torch.Tensor]:
    """A base and three models: differences that often tie, zeros of both signs, subnormals, large values."""
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(shape, generator=generator)
    found = [base]
    for _ in range(3):
        moved = (torch.randn(shape, generator=generator) * 3).round() * 2**-7
        found.append(torch.where(torch.rand(shape, generator=generator) < 0.1, base, base + moved))
    if odd:
        special = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e30, -1e30, 1.1754944e-38])
        for i, tensor in enumerate(found):
            places = torch.randint(0, tensor.numel(), (400,), generator=generator)
            tensor.view(-1)[places] = special[torch.arange(400) % (7 - i)]
    return [tensor.to(dtype) for tensor in found]


def merged(
    method: str, made: list[torch.Tensor], out: torch.dtype, with_kernels: bool, **given: object
) -> torch.Tensor:
    spec = find_method(method)
    models = made[1 : 1 + int(min(3, spec.max_models))]
    parameters = {name: p.for_models(p.default, len(models)) for name, p in spec.parameters.items()}
    parameters |= {name: value for name, value in given.items() if name in parameters}
    group = TensorGroup("w", made[0], tuple(models), CPU, block_elements=13_000)
    return merge_group(group, ExecutionConfig(load_method(spec.name), CPU, compiled=with_kernels), parameters, out)


@pytest.mark.parametrize("method", FUSED)
@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32, torch.float16])
def test_same_bits(compiled: Kernels, method: str, out: torch.dtype) -> None:
    """A method gives the same bits with kernels and without: stored as bf16, fp16 and fp32, matrices and vectors,
    with zeros of both signs, subnormals and equal magnitudes, whatever its settings."""
    settings = [{}, {"density": [0.37, 0.8, 0.05], "weights": [1.0, -0.5, 0.3]}, {"normalize": True, "scaling": 0.3},
                {"normalize": False, "zero_sum": "majority", "rescale": "l1"}]  # fmt: skip
    for dtype in BITS:
        for shape in ((61, 1100), (301,)):
            made = tensors(dtype, shape, odd=out is not torch.float16)
            for given in settings:
                one, other = (merged(method, made, out, with_kernels, **given) for with_kernels in (True, False))
                assert torch.equal(one.view(BITS[out]), other.view(BITS[out])), (dtype, shape, given)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "dare_ties", "widen"])
def test_not_finite(compiled: Kernels, method: str, value: float) -> None:
    """A block with an input that is not finite is left to the plain expression, so that its bits are the same too."""
    for where in range(1 if method == "linear" else 0, 4):
        made = tensors(torch.bfloat16)
        made[where][40, 3] = value
        one, other = (merged(method, made, torch.bfloat16, with_kernels) for with_kernels in (True, False))
        assert torch.equal(one.view(torch.int16), other.view(torch.int16))
        assert not torch.isfinite(one).all() or method == "widen"


def test_overflow_is_declined(compiled: Kernels) -> None:
    """A finite sum that rounds to infinity in bf16 is not passed off as finite."""
    large = torch.full((4, 8), torch.finfo(torch.bfloat16).max)
    made = [large.bfloat16(), *[(large * 0.5).bfloat16()] * 3]
    assert torch.isinf(merged("task_arithmetic", made, torch.bfloat16, True, weights=[-1.0, -1.0, -1.0])).all()


@pytest.mark.parametrize("by_row", [False, True])
def test_relax(compiled: Kernels, by_row: bool) -> None:
    """The kernel's relaxation is aim.relax bit for bit, at the ends and between, along columns and along rows."""
    base, model, *_ = tensors(torch.bfloat16)
    s = torch.linspace(0, 1, base.shape[0 if by_row else 1])
    for omega in (0.0, 0.4, 0.5, 1.0):
        out = torch.empty(base.shape, dtype=torch.bfloat16)
        assert compiled.relax(base, model, s * (1.0 - omega), by_row, out)
        expected = relax_tensor(base.float(), model.float(), s[:, None] if by_row else s, omega).bfloat16()
        assert torch.equal(out.view(torch.int16), expected.view(torch.int16))


def test_counting(compiled: Kernels) -> None:
    """Counts of upper halves, of lower halves in a bin, words of the random stream, and what is not finite are those of
    torch and numpy."""
    base, model, *_ = tensors(torch.bfloat16)
    values = (model.float() - base.float()).abs()
    counts = torch.zeros(UPPER_BINS, dtype=torch.int64)
    assert compiled.upper_halves(base, model, counts)
    assert torch.equal(counts, upper_counts(values))
    for upper in (int(counts.argmax()), int(counts.nonzero()[-1]), UPPER_BINS - 1):
        found, expected = compiled.lower_halves(base, model, upper), lower_counts(values, upper)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert int(found[1].sum()) == counts[upper]
    generator = np.random.Generator(np.random.Philox(key=2**100 + 12345))
    expected = generator.integers(0, 1 << 64, size=2000, dtype=np.uint64).view("<u4")
    for first, count in ((0, 4000), (3, 50), (17, 1), (511, 513)):
        drawn = compiled.words(2**100 + 12345, first, count).numpy().view(np.uint32)
        assert (drawn == expected[first : first + count]).all()
    block = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 3e38])
    assert compiled.nonfinite(block) == 3
    assert compiled.nonfinite(block.bfloat16()) == 3


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 128, 300])
def test_column_sums(compiled: Kernels, rows: int) -> None:
    """Column sums in fp64 are torch's bit for bit, in its order of addition, for any number of rows."""
    made = [tensor.double() for tensor in tensors(torch.float32, (rows, 192))]
    found = torch.zeros(7, 192, dtype=torch.float64)
    assert compiled.squares(made[0].float(), [m.float() for m in made[1:]], found)
    models = torch.stack(made[1:])
    expected = [models.square().sum(-2), made[0].square().sum(-2)[None], (models * made[0]).sum(-2)]
    assert torch.equal(found, torch.cat(expected))


def test_digests_of_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of files of any length, several to an input, taken piece by piece in turns, are those of their bytes."""
    monkeypatch.setattr(digests, "CHUNK", 1 << 12)
    monkeypatch.setattr(digests, "PIECE", 1 << 12)
    generator = np.random.default_rng(0)
    inputs = [[tmp_path / f"{i}-{j}" for j in range(4)] for i in range(3)]
    sizes = iter((0, 5, 4096, 4097, 4159, 4160, 8192, 20000, 100_003, 64 * 77, 64 * 200, 1))
    for file in (file for files in inputs for file in files):
        file.write_bytes(generator.bytes(next(sizes)))
    with InputDigests(inputs) as reading:
        found = reading.all()
    assert found == {f: f"blake3:{blake3(f.read_bytes()).hexdigest()}" for files in inputs for f in files}


def test_digests_keep_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are read at most LEAD bytes ahead of the merge, and to their end once the digests are asked for."""
    monkeypatch.setattr(digests, "CHUNK", 1 << 12)
    monkeypatch.setattr(digests, "PIECE", 1 << 12)
    monkeypatch.setattr(digests, "LEAD", 1 << 14)
    taken: list[int] = []
    real = Digest.update
    monkeypatch.setattr(Digest, "update", lambda self, data: (taken.append(len(data)), real(self, data)))
    file = tmp_path / "weights"
    file.write_bytes(bytes(1 << 18))
    part = 0.0
    with InputDigests([[file]], lambda: part) as reading:
        for part in (0.0, 0.5):
            deadline = time.monotonic() + 10
            bound = (1 << 14) + part * (1 << 18)
            while sum(taken) <= bound and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(0.05)
            assert bound < sum(taken) <= bound + (1 << 12)
        assert reading.all()[file] == f"blake3:{blake3(bytes(1 << 18)).hexdigest()}"


def test_in_order() -> None:
    """Results come in the order of the items, few begun ahead; an error comes where it is due, and nothing runs on."""
    begun: list[int] = []

    def work(i: int) -> int:
        begun.append(i)
        time.sleep(0.001 * (i % 3))
        if i == 30:
            raise ValueError("thirty")
        return i * i

    taken = []

    def take(results: Iterator[int]) -> None:
        for value in results:
            assert len(begun) <= len(taken) + threads() + 3
            taken.append(value)

    with pytest.raises(ValueError, match="thirty"):
        take(in_order(work, range(100), lookahead=2))
    assert taken == [i * i for i in range(30)]
    after = len(begun)
    time.sleep(0.02)
    assert len(begun) == after
    assert threading.active_count() < 50


def test_merging_without(family, run_script, tmp_path: Path) -> None:
    """A merge writes the same bytes with kernels, with them switched off and one thread, and without a compiler."""
    models = ",".join(str(family[name]) for name in "abc")
    flags = [
        "merge.py",
        "--method",
        "dare_ties",
        "--base_model",
        family["base"],
        "--models_to_merge",
        models,
        "--quiet",
    ]
    ways = {"with": {}, "off": {"MERGE_KERNELS": "off", "OMP_NUM_THREADS": "1"}, "none": {"PATH": "/nowhere"}}
    for name, env in ways.items():
        done = run_script(*flags, "--quiet", "--save_path", tmp_path / name, **env)
        assert done.returncode == 0, done.stderr
    expected, *found = (weights(tmp_path / name) for name in ways)
    for other in found:
        assert all(torch.equal(expected[name].view(torch.int16), other[name].view(torch.int16)) for name in expected)
