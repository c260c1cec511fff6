"""Laws of blocks on their way through a device: the ring in order, with ordinary memory and lanes that are no-ops."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path

import pytest
import torch

from aim.capture.hidden_states import HiddenStates
from aim.capture.weight_prefetch import WeightPrefetch
from aim.importance import Importance
from aim.relaxer import KEPT_BASE, RELAXED, Relaxer
from common.errors import CheckpointError, NotANumberError
from merging.engine import device_pipeline
from merging.engine.base_comparison import CHANGED
from merging.engine.collector import StatisticsCollector
from merging.engine.device_pipeline import CopyStream, pipeline, to_device_async, wait
from merging.engine.execution import ExecutionConfig, TensorTask, make_task
from merging.engine.loop import run
from merging.engine.prefetch import stream_through_device
from merging.methods.contract import load_method
from merging.ops.tensor_blocks import Block, TensorGroup
from merging.pipeline import execution_config
from merging.plan.merge_plan import OutputConfig
from merging.planning import plan_merge
from merging.recipe import make_recipe
from merging.recipe.method_registry import all_methods, find_method
from tests.helpers.merging import merged_blocks

CPU = torch.device("cpu")


def models(dtype: torch.dtype = torch.bfloat16, shape: tuple[int, ...] = (61, 110)) -> list[torch.Tensor]:
    """A base and three models near it."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(shape, generator=generator)
    return [base.to(dtype), *((base + 0.02 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(3))]


def merged(method: str, stored: list[torch.Tensor], block: int, density: float = 0.5, **how: object) -> torch.Tensor:
    """Merge in bf16, by blocks of so many elements; half of DARE's entries are drawn."""
    spec = find_method(method)
    used = stored[1 : 1 + int(min(3, spec.max_models))]
    defaults = {name: 0.3 if p.default is None else p.default for name, p in spec.parameters.items()}
    parameters = {name: p.for_models(defaults[name], len(used)) for name, p in spec.parameters.items()}
    if "density" in parameters:
        parameters["density"] = [density] * len(used)
    group = TensorGroup("w.weight", stored[0], tuple(used), CPU, block_elements=block)
    job = ExecutionConfig(load_method(spec.name), CPU, **how)  # type: ignore[arg-type]
    return torch.cat([one.clone() for (one,) in merged_blocks(group, job, parameters, torch.bfloat16)])


@pytest.mark.parametrize("method", sorted(all_methods()))
def test_every_method_has_the_same_bytes(method: str) -> None:
    """Moved through the ring a tensor has the bytes that it has without, whatever the blocks and the stored types: one
    block, many, a last one that is smaller."""
    for dtype, block in ((torch.bfloat16, 700), (torch.float32, 110), (torch.bfloat16, 1 << 20)):
        stored = models(dtype)
        plain = merged(method, stored, block, compiled=False, device_pipeline=False)
        assert torch.equal(merged(method, stored, block, device_pipeline=True), plain), (dtype, block)


def test_masks_that_keep_everything() -> None:
    """DARE at density 1 draws no masks ahead; the ring gives the bytes of the plain loop."""
    stored = models()
    plain, ring = (merged("dare_linear", stored, 700, density=1.0, device_pipeline=p, compiled=False) for p in (0, 1))
    assert torch.equal(plain, ring)


@pytest.mark.parametrize("verdict", [RELAXED, KEPT_BASE])
def test_relaxed_results_have_the_same_bytes(verdict: str) -> None:
    """Several omegas come from one pass through the ring, each with the bytes of the plain loop; a kept tensor of
    fp32, whose result is the very memory that arrived, too."""
    stored = models(torch.float32)
    importance = Importance({"w": torch.rand(110)}, {"w": 1}, {}, {}, {"name": "b", "fingerprint": "f"})
    results = []
    for moves in (True, False):
        relaxer = Relaxer(importance, (0.0, 0.4, 1.0), account={"w": verdict})
        relaxer._sources, relaxer._shapes = {"w": "w"}, {"w": (61, 110)}
        group = TensorGroup("w", stored[0], (stored[1],), CPU, block_elements=500)
        job = ExecutionConfig(
            load_method("task_arithmetic"),
            CPU,
            relaxation=relaxer,
            compiled=False,
            device_pipeline=moves,
        )
        given = {"weights": [1.0], "scaling": 1.0, "normalize": False}
        made = [[t.clone() for t in one] for one in merged_blocks(group, job, given, torch.float32)]
        results.append([torch.cat(parts) for parts in zip(*made, strict=True)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert len(results[0]) == 3


def test_order_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results come in order and whole, from a few buffers that are used again, and nothing is read further ahead than
    the ring has room for, however slow the caller is."""
    made: list[int] = []
    real = torch.empty

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        if args and args[0] and kwargs.get("dtype") is torch.uint8:
            made.append(int(args[0]))  # type: ignore[call-overload]
        return real(*args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(device_pipeline.torch, "empty", counted)
    begun: list[int] = []

    def read(i: int) -> list[torch.Tensor]:
        begun.append(i)
        return [torch.full((300,), float(i)), torch.arange(i, i + 40)]

    taken = 0
    for i, (one, other, again) in enumerate(pipeline(range(50), read, lambda i, t: [t[0] * 2, t[1] + 1, t[1]], CPU)):
        assert torch.equal(one, torch.full((300,), 2.0 * i))
        assert torch.equal(other, torch.arange(i + 1, i + 41))
        assert torch.equal(again, torch.arange(i, i + 40))
        time.sleep(0.001)
        taken = i + 1
        assert len(begun) <= taken + device_pipeline.threads() + device_pipeline.EXTRA_READS + 2
    assert taken == 50
    assert len(made) <= device_pipeline.threads() + device_pipeline.EXTRA_READS + 2 * device_pipeline.DEPTH


@pytest.mark.parametrize("where", ["read", "work", "caller"])
def test_errors_drain(where: str) -> None:
    """An error of the reading or of the block function comes through as it is, after the results ahead of it, and like
    a caller who stops early it leaves nobody reading: what has begun is waited for."""
    busy, lock = 0, threading.Lock()

    def read(i: int) -> list[torch.Tensor]:
        nonlocal busy
        with lock:
            busy += 1
        time.sleep(0.005)
        with lock:
            busy -= 1
        if where == "read" and i == 7:
            raise CheckpointError("seven cannot be read")
        return [torch.full((8,), i)]

    def work(i: int, there: list[torch.Tensor]) -> list[torch.Tensor]:
        if where == "work" and i == 7:
            raise ValueError("seven cannot be made")
        return there

    results = pipeline(range(30), read, work, CPU)
    seen: list[int] = []
    if where == "caller":
        for _ in range(4):
            next(results)
        results.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(CheckpointError if where == "read" else ValueError, match=r"^seven"):
            seen.extend(int(one[0][0]) for one in results)
        assert seen == list(range(7))
    assert busy == 0
    with pytest.raises(StopIteration):
        next(results)


def test_nothing_to_do() -> None:
    """No item is no result."""
    assert list(pipeline([], lambda i: [], lambda i, t: t, CPU)) == []


SHAPES = [(61, 110), (1, 7), (300, 40), (5,), (33, 64)]


def tasks_of(method: str, log: list[str] | None = None) -> list[Callable[[], TensorTask]]:
    """The same method on tensors of several shapes, each prepared when it is asked for; log: when that was."""
    spec = find_method(method)
    job = ExecutionConfig(load_method(spec.name), CPU, device_pipeline=True)

    def task(i: int) -> TensorTask:
        if log is not None:
            log.append(f"prepare {i}")
        stored = models(shape=SHAPES[i])
        used = stored[1 : 1 + int(min(3, spec.max_models))]
        defaults = {name: 0.3 if p.default is None else p.default for name, p in spec.parameters.items()}
        parameters = {name: p.for_models(defaults[name], len(used)) for name, p in spec.parameters.items()}
        group = TensorGroup(f"w{i}", stored[0], tuple(used), CPU, block_elements=900)
        return make_task(group, job, parameters, torch.bfloat16)

    return [partial(task, i) for i in range(len(SHAPES))]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "widen", "arcee_fusion", "slerp"])
def test_tensor_after_tensor(method: str) -> None:
    """In one ring, of tensors with one block and with many, each has the bytes that it has in a ring of its own."""
    alone = []
    for task in tasks_of(method):
        (made,) = ([one.clone() for (one,) in blocks] for blocks in stream_through_device([task], CPU, 1))
        alone.append(torch.cat(made))
    together = [
        torch.cat([one.clone() for (one,) in blocks]) for blocks in stream_through_device(tasks_of(method), CPU, 1)
    ]
    assert [tuple(tensor.shape) for tensor in together] == SHAPES
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_prepared_one_tensor_ahead() -> None:
    """A tensor is prepared when the one before it begins, in order, and no further ahead; one that is not asked for
    any more is not prepared."""
    log: list[str] = []
    made = stream_through_device(tasks_of("ties", log), CPU, 1)
    for i, blocks in enumerate(made):
        log.append(f"merge {i}")
        for _ in blocks:
            assert sum(line.startswith("prepare") for line in log) <= i + 4  # reading ahead crosses small tensors
        if i == 1:
            break
    made.close()
    assert [line for line in log if line.startswith("prepare")] == [f"prepare {i}" for i in range(len(log) - 2)]
    assert len(log) - 2 <= len(SHAPES)


@pytest.mark.parametrize("where", ["prepare", "make"])
def test_an_error_waits_for_its_turn(where: str) -> None:
    """What goes wrong with the third tensor, in what it needs to know or in its second block, is an error of the third:
    all results ahead of it come first."""
    tasks = tasks_of("ties")

    def broken(*_: object) -> list[torch.Tensor]:
        raise NotANumberError("not a number")

    def third() -> TensorTask:
        task = real()
        if where == "prepare":
            broken()
        merge_block, blocks = task.config.method.merge_block, itertools.count()

        @wraps(merge_block)
        def second_fails(*tensors: object, **arguments: object) -> object:
            return broken() if next(blocks) else merge_block(*tensors, **arguments)

        method = replace(task.config.method, merge_block=second_fails)
        return replace(task, config=replace(task.config, method=method))

    real, tasks[2] = tasks[2], third
    counts: list[int] = []

    def count() -> None:
        for blocks in stream_through_device(tasks, CPU, 1):
            counts.append(0)
            for _ in blocks:
                counts[-1] += 1

    with pytest.raises(NotANumberError, match=r"^not a number$"):
        count()
    whole = [sum(1 for _ in TensorGroup("", None, (torch.empty(s),), CPU, block_elements=900).blocks()) for s in SHAPES]
    assert counts == [*whole[:2], 0 if where == "prepare" else 1]


@pytest.mark.parametrize("method", ["ties", "linear"])
def test_a_whole_run_in_one_ring(family, tmp_path: Path, method: str) -> None:
    """A checkpoint merged through the ring is the plain one, with its layer statistics and with tensors between the
    others that are copied; it can begin where an earlier run stopped."""
    models = f"{family['a']},{family['b']}"
    recipe = make_recipe({"method": method, "base_model": str(family["base"]), "models_to_merge": models}, {})
    output = OutputConfig(tmp_path, device="cpu", load_check=False)
    merge_plan = plan_merge(recipe, output)
    copied = [replace(t, is_float=i % 4 != 2) for i, t in enumerate(merge_plan.model.tensors)]
    plan = replace(merge_plan.model, tensors=tuple(copied))
    assert 3 < sum(not tensor.is_merged for tensor in copied) < len(copied) - 3

    class Kept:
        def __init__(self, done: int = 0) -> None:
            self.done, self.made, self.remarks = done, {}, []

        def begin(self, name: str) -> None:
            self.name, self.made[name] = name, []

        def add(self, block: torch.Tensor) -> None:
            self.made[self.name].append(block.clone())

        def end(self, remark: object) -> None:
            self.remarks.append(remark)

    runs = []
    for moves, done in ((False, 0), (True, 0), (True, 5)):
        job = replace(
            execution_config(merge_plan, output),
            device_pipeline=moves,
            make_collector=StatisticsCollector,
            block_elements=5000,
        )
        kept = Kept(done)
        run(plan, job, [kept])
        runs.append(kept)
    plain, ring, later = runs
    assert list(plain.made) == list(ring.made) == [tensor.name for tensor in plan.tensors]
    later.remarks[0] = {key: value for key, value in later.remarks[0].items() if key != CHANGED}  # first of this run
    assert plain.remarks == ring.remarks == plain.remarks[:5] + later.remarks
    for name, blocks in plain.made.items():
        assert torch.equal(torch.cat(blocks), torch.cat(ring.made[name]))


def test_rows_of_another_block_are_refused() -> None:
    """A group that is one block answers for no other."""
    stored = models()
    block = Block(2, 4, 110)
    there = TensorGroup("w", stored[0], tuple(stored[1:]), CPU).at(block, [t[2:4] for t in stored])
    assert torch.equal(there.base_block(block), stored[0][2:4].float())
    assert torch.equal(there.model_blocks(block)[1], stored[2][2:4].float())
    with pytest.raises(AssertionError):
        there.base_block(Block(0, 2, 110))


def test_streams_of_the_cpu_do_nothing() -> None:
    """On the CPU a copy is done when it was asked for, and there is nothing to wait for."""
    stream, place = CopyStream(CPU), torch.zeros(3)
    stream.wait_for(None)
    stream.copy([place], [torch.ones(3)])
    assert stream.record_event() is None
    wait(stream.record_event())
    stream.synchronize()
    tensor = torch.ones(2)
    assert place.tolist() == [1, 1, 1]
    assert to_device_async(tensor, CPU) is tensor


def test_tensors_fetched_ahead() -> None:
    """What was asked for is taken once, as it is stored, and only by who asks for the same; an error of the reading
    comes through there; what finds no room is not there, so that it is read plainly."""
    stored = {"a": torch.ones(3), "b": torch.arange(4)}

    def read(name: str) -> torch.Tensor:
        if name == "large":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if name not in stored:
            raise CheckpointError(f"{name} is not there")
        return stored[name]

    ahead = WeightPrefetch(read, CPU)
    assert ahead.take(["a"]) == {}
    ahead.ask(["a", "b"])
    assert ahead.take(["a"]) == {}
    ahead.settle()
    assert ahead.take(["a", "b"]) == stored
    assert ahead.take(["a", "b"]) == {}
    ahead.ask(["a", "large"])
    assert ahead.take(["a", "large"]) == {}
    ahead.ask(["c"])
    with pytest.raises(CheckpointError, match="c is not there"):
        ahead.take(["c"])


def test_layers_that_come_ahead_change_nothing(family) -> None:
    """Calibrated by layers, a base whose weights are read one layer ahead has the statistics that it has without, bit
    for bit, and its hidden states the place on the device have the same values."""
    from aim.capture.base_model import Skeleton
    from aim.capture.layerwise import calibrate_layerwise
    from merging.checkpoints.checkpoint import open_checkpoint

    blocks = torch.randint(3, 300, (6, 16), generator=torch.Generator().manual_seed(1))
    found = []
    for early in (False, True):
        checkpoint = open_checkpoint(str(family["base"]))
        skeleton = Skeleton(checkpoint, "float32", CPU)
        assert skeleton.ahead is None
        if early:
            skeleton.ahead = WeightPrefetch(checkpoint.read, CPU)
        found.append(calibrate_layerwise(skeleton, blocks, batch_size=2).means)
    assert all(torch.equal(mean, found[1][name]) for name, mean in found[0].items())


def test_hidden_states_on_a_device() -> None:
    """Hidden states that stay where they are computed are those that were put there, by block, and what is saved of
    them lies on the CPU and restores them."""
    states = HiddenStates(5, "device", 0, device=CPU)
    states.put([3, 1], torch.arange(8.0).view(2, 4))
    states.put([0, 2, 4], -torch.arange(12.0).view(3, 4))
    assert states.get([1, 0], CPU).tolist() == [[4, 5, 6, 7], [0, -1, -2, -3]]
    other = HiddenStates(5, "device", 0, device=CPU)
    other.restore(states.tensors())
    assert torch.equal(other.get([4, 3], CPU), states.get([4, 3], CPU))
