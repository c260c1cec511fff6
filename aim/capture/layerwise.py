"""Calibrating one layer at a time: the base's weights are read once, layer by layer, and never held together.

The model itself stays on the meta device. For each layer in turn its weights are loaded, and the model's own forward
pass is run over every batch: layers before it hand on what they get, and it is given the hidden states that the layer
before it left, in place of what arrives. So each layer is called as the model calls it, whatever its arguments are, and
no architecture is known here. What goes on between layers must be nothing but handing on; where it is more, that is
noticed and refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from tqdm import tqdm

from aim.capture.base_model import Skeleton, filling_outside
from aim.capture.hidden_states import HiddenStates
from aim.capture.hooks import LayerInput, capture_inputs
from aim.capture.state import Progress
from aim.capture.statistics import Activations, Batch, Sums
from aim.capture.whole_model import BatchSize, first_batch_size, forward_arguments, reduce_over_ranks, takes, turns
from aim.statistics import Statistic
from common.distributed import SINGLE_PROCESS, ProcessGroup
from common.errors import CalibrationError
from common.hardware import available, ran_out
from common.logging import hides_progress
from merging.engine.device_pipeline import to_device_async

TABLE_BYTES = 1 << 30
"""Embedding tables up to this size are put on the GPU; larger ones are looked up in the host's memory."""


def stack_of(model: nn.Module) -> tuple[str, Sequence[nn.Module]]:
    """Return the path of the decoder's layers and the layers: the largest list of modules that lies in no other list.

    Raises CalibrationError where there is none, or where there are an encoder's and a decoder's.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise _refused("it has an encoder and a decoder")
    decoder = set(map(id, getattr(model, "get_decoder", lambda: model)().modules()))
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [(path, m) for path, m in lists if not any(path.startswith(f"{other}.") for other, _ in lists)]
    if not outer:
        raise _refused("it has no list of layers")
    path, layers = max(
        outer, key=lambda candidate: (id(candidate[1]) in decoder, sum(p.numel() for p in candidate[1].parameters()))
    )
    return path, list(layers)


def _refused(reason: str) -> CalibrationError:
    return CalibrationError(f"The base cannot be calibrated layer by layer: {reason}; use --calibration_mode whole.")


LayerOutput: TypeAlias = Tensor | tuple[Tensor, *tuple[Tensor | None, ...]]
"""Hidden states, alone or followed by what else a layer returns (attention weights, say)."""


class _Layered(Exception):
    """Ends a forward pass with what the layer in turn made."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class _Turn:
    """One forward pass with only layer `turn` real (none of them where it is their number).

    The layers' forward methods are `call(i, ...)`, in place of `real[i]`. extras: what stands, in a layer's output, for
    what it has besides hidden states (attention weights, say): empty tensors, which no later layer may get.
    """

    def __init__(self, real: Sequence[Callable[..., LayerOutput]]) -> None:
        self.real = real
        self.extras: dict[int, list[Tensor | None]] = {}
        self.turn = 0
        self.begin(None)

    def begin(self, states: Tensor | None) -> None:
        """Start a pass; states: what the layer before the turn's left."""
        self.states, self._next = states, 0
        self._handed: Tensor | None = None
        self.inside = self.past = False

    def call(self, i: int, *args: object, **kwargs: object) -> LayerOutput:
        """Stand for layer i. Raises _Layered at the turn's, CalibrationError for what is more than handing on."""
        arrived = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(arrived, Tensor):
            raise _refused("its layers do not take hidden states first")
        if i != self._next:
            raise _refused("its layers are not called once each, in order")
        if self._handed is not None and arrived is not self._handed:
            raise _refused(f"something is computed between layers {i - 1} and {i}")
        marks = {id(mark) for extras in self.extras.values() for mark in extras if mark is not None}
        if any(id(value) in marks for value in (*args, *kwargs.values())):
            raise _refused(f"layer {i} takes more than hidden states from the one before it")
        self._next += 1
        if i < self.turn:
            last = i == len(self.real) - 1
            self._handed = self.states if last and self.states is not None else arrived
            self.past = last
            return (self._handed, *self.extras[i]) if i in self.extras else self._handed
        states = arrived if self.states is None else self.states
        args, kwargs = ((states, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": states})
        before = _containers(args, kwargs)
        self.inside = True
        output = self.real[i](*args, **kwargs)
        self.inside = False
        if _containers(args, kwargs) != before:
            raise _refused(f"layer {i} leaves something for later layers besides hidden states")
        if isinstance(output, (tuple, list)):
            self.extras[i] = [torch.empty(0) if isinstance(more, Tensor) else None for more in output[1:]]
            output = output[0]
        raise _Layered(output)


def _containers(args: Sequence[object], kwargs: Mapping[str, object]) -> list[tuple[int, int]]:
    """Return the containers in which a layer could leave state, with their sizes."""
    inputs = (*args, *kwargs.values())
    return [(id(value), len(value)) for value in inputs if isinstance(value, (dict, list, set))]


@contextmanager
def _standing_in(layers: Sequence[nn.Module]) -> Iterator[_Turn]:
    """Put a `_Turn` in the place of the layers' forward methods."""
    turn = _Turn([layer.forward for layer in layers])
    for i, layer in enumerate(layers):
        layer.forward = lambda *args, _i=i, **kwargs: turn.call(_i, *args, **kwargs)  # type: ignore[method-assign]
    try:
        yield turn
    finally:
        for layer in layers:
            del layer.forward


def calibrate_layerwise(
    skeleton: Skeleton,
    blocks: Tensor,
    *,
    batch_size: int | None = None,
    process_group: ProcessGroup | None = None,
    progress: Progress | None = None,
    statistic: Statistic | None = None,
    place: str = "auto",
    folder: Path | None = None,
) -> Activations:
    """Return the statistics of all weights, as `aim.capture.whole_model.calibrate` does, one layer in memory at a time.

    place, folder: where hidden states are kept ("host", "disk" or "auto"). On a GPU the next layer's weights come while
    one computes. Raises CalibrationError for layers that do more than hand on hidden states, and for a block too large.
    """
    process_group = process_group or SINGLE_PROCESS
    path, layers = stack_of(skeleton.model)
    run = _Run(skeleton, blocks, path, layers, batch_size, process_group, statistic)
    most = {"layers": len(layers) + 1, "blocks": sum(map(len, run.halves))}
    sums, position, saved = progress.start(most, skeleton.model.state_dict().keys()) if progress else (Sums(), {}, {})
    hidden = HiddenStates(len(blocks), place, available(torch.device("cpu")), folder, skeleton.device)
    first, done = position.get("layers", 0), position.get("blocks", 0)
    if progress:
        progress.check_hidden(saved, len(blocks), needed=0 < first <= len(layers) or done > 0)
    hidden.restore(saved)
    bar = tqdm(total=len(layers) + 1, initial=first, desc="calibrating", unit="layer", disable=hides_progress())
    where = {"layers": first, "blocks": done}
    try:
        with (
            torch.no_grad(),
            filling_outside(skeleton, path, TABLE_BYTES),
            _standing_in(layers) as turn,
        ):
            for k in range(first, len(layers) + 1):
                for through in run.layer(turn, k, sums, hidden, done if k == first else 0):
                    where = {"layers": k, "blocks": through}
                    if progress:
                        progress.save(sums, where, hidden.tensors)
                where = {"layers": k + 1, "blocks": 0}
                bar.update()
            hidden.close()
            if progress:
                progress.save(sums, where, now=True)
            return reduce_over_ranks(sums, process_group).means(statistic)
    except BaseException as error:
        if progress:
            progress.interrupted(error, sums, where, hidden.tensors)
        raise
    finally:
        hidden.close()
        bar.close()


class _Run:
    """The passes over all batches for one layer after the other."""

    def __init__(
        self, skeleton: Skeleton, blocks: Tensor, path: str, layers: Sequence[nn.Module], batch_size: int | None,
        process_group: ProcessGroup, statistic: Statistic | None,
    ) -> None:  # fmt: skip
        self.skeleton, self.blocks, self.path, self.layers = skeleton, blocks, path, layers
        self.process_group, self.halves, self.statistic = process_group, turns(len(blocks), process_group), statistic
        self.size = BatchSize(batch_size or first_batch_size(skeleton.device, blocks.shape[1]))

    def layer(self, turn: _Turn, k: int, sums: Sums, hidden: HiddenStates, done: int) -> Iterator[int]:
        """Run layer k (after the last: what follows the layers) over the batches that are not done, counting blocks."""
        turn.turn = k
        inside = f"{self.path}.{k}."
        if k < len(self.layers):
            self.skeleton.fill(self.skeleton.names_in(f"{self.path}.{k}"))
            if k + 1 < len(self.layers):
                self.skeleton.fill_soon(self.skeleton.names_in(f"{self.path}.{k + 1}"))

        def attempt(take: list[int]) -> tuple[Batch, Tensor | None]:
            batch, fills = Batch(self.statistic), self.skeleton.fills

            def sink(use: LayerInput) -> None:
                if turn.inside and not use.name.startswith(inside):
                    raise _refused(f"layer {k} uses {use.name}, which lies outside of it")
                if turn.inside or turn.past or k == 0:
                    batch(use)

            turn.begin(hidden.get(take, self.skeleton.device) if k else None)
            states = self._forward(take, sink, turn)
            # weights that came in only now were not looked for in this pass
            return (batch, states) if fills == self.skeleton.fills else attempt(take)

        total = sum(map(len, self.halves))
        while done < total:
            self.process_group.check_ranks()
            half, take = takes(self.halves, done, self.size.size)
            (batch, states), indices = self.size.run(take, attempt)
            if states is not None:
                if states.shape[0] != len(indices):
                    raise _refused("its hidden states do not have the sequences along their first axis")
                hidden.put(indices, states)
            sums.add(batch, half)
            done += len(indices)
            yield done
        if k < len(self.layers):
            self.skeleton.empty(self.layers[k])

    def _forward(self, take: list[int], sink: Callable[[LayerInput], None], turn: _Turn) -> Tensor | None:
        """One forward pass; returns what the layer in turn made, or None where it ran to its end."""
        ids = to_device_async(self.blocks[take], self.skeleton.device)
        try:
            with capture_inputs(self.skeleton.model, sink):
                self.skeleton.model(**forward_arguments(self.skeleton.model, ids))
        except _Layered as reached:
            return reached.states
        except (RuntimeError, TypeError) as error:  # an operation on the meta device, or on a mark
            if ran_out(error) or "CUDA error" in str(error):  # a fault of the device says nothing of the model
                raise
            raise _refused(f"its forward pass fails ({' '.join(str(error).split())[:200]})") from error
        if not turn.past:
            raise _refused(f"its layers ({self.path}) are not called")
        return None
