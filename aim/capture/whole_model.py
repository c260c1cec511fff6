"""Forward passes of the whole base over calibration blocks: batches that fit, resumed runs, any number of ranks."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from aim.capture.hooks import capture_inputs
from aim.capture.state import Progress
from aim.capture.statistics import HALVES, Activations, Batch, Sums, Total
from aim.statistics import Statistic
from common.distributed import SINGLE_PROCESS, ProcessGroup
from common.errors import CalibrationError
from common.hardware import ran_out
from common.logging import hides_progress, logger
from merging.engine.device_pipeline import to_device_async

T = TypeVar("T")
TOKENS_PER_BATCH = {"cuda": 16384, "cpu": 2048}
"""Tokens of a batch where its size is left to us: enough to fill a GPU, few enough for a CPU's caches."""


def first_batch_size(device: torch.device, block_size: int) -> int:
    """Return how many blocks to take at a time where nobody says."""
    return max(1, TOKENS_PER_BATCH[device.type] // block_size)


def turns(n_blocks: int, process_group: ProcessGroup) -> list[list[int]]:
    """Return the numbers of one process's blocks, in two halves that no batch straddles: even blocks and odd ones."""
    return [
        list(range(half, n_blocks, HALVES))[process_group.rank :: process_group.world_size] for half in range(HALVES)
    ]


def takes(halves: list[list[int]], done: int, size: int) -> tuple[int, list[int]]:
    """Return (half, block numbers) of the next batch of at most `size` blocks, `done` of them being through."""
    for half, mine in enumerate(halves):
        if done < len(mine):
            return half, mine[done : done + size]
        done -= len(mine)
    return 0, []


class BatchSize:
    """Blocks at a time, halved each time that they do not fit."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, take: list[int], attempt: Callable[[list[int]], T]) -> tuple[T, list[int]]:
        """Return what `attempt(blocks)` gives for `take` or the first part of it that fits, and that part.

        Raises CalibrationError where one block does not fit.
        """
        while True:
            try:
                return attempt(take), take
            except Exception as error:
                if not ran_out(error):
                    raise
                if len(take) == 1:
                    raise CalibrationError(
                        "Out of memory on one calibration block; give a smaller --block_size, "
                        "--calibration_mode layerwise, or --device cpu."
                    ) from error
            self.size = len(take) // 2
            take = take[: self.size]
            _free()
            logger.info(f"Out of memory: continuing with {self.size} blocks at a time.")


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forward_arguments(model: nn.Module, ids: Tensor) -> dict[str, Tensor | bool]:
    """Return the arguments of a forward pass over ids (batch, tokens), which an encoder-decoder gets on both sides."""
    takes = inspect.signature(model.forward).parameters
    arguments: dict[str, Tensor | bool] = {"input_ids": ids}
    if "use_cache" in takes:
        arguments["use_cache"] = False
    if "decoder_input_ids" in takes:
        arguments["decoder_input_ids"] = ids
    return arguments


def reduce_over_ranks(sums: Sums, process_group: ProcessGroup) -> Sums:
    """Return the sums over all ranks; a weight that a rank never used counts there with zeros."""
    if process_group.world_size == 1:
        return sums
    entries = [(i, name, list(total.sum.shape)) for i, half in enumerate(sums.halves) for name, total in half.items()]
    ranks = process_group.all_gather((entries, sums.axes))
    everywhere = sorted({(half, name, tuple(shape)) for entries, _ in ranks for half, name, shape in entries})
    totals = [
        sums.halves[half].get(name)
        or Total(torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[:-1], dtype=torch.int64))
        for half, name, shape in everywhere
    ]
    reduced = Sums(axes={name: axis for _, axes in ranks for name, axis in axes.items()})
    sums_of_all = _reduce_together([total.sum for total in totals], process_group)
    tokens_of_all = _reduce_together([total.tokens for total in totals], process_group)
    for (half, name, _), channel_sum, tokens in zip(everywhere, sums_of_all, tokens_of_all, strict=True):
        reduced.halves[half][name] = Total(channel_sum, tokens)
    return reduced


def _reduce_together(tensors: list[Tensor], process_group: ProcessGroup) -> list[Tensor]:
    """Return each tensor's sum over all ranks, from one exchange of them all."""
    if not tensors:
        return []
    flat = process_group.all_reduce_sum(torch.cat([tensor.cpu().flatten() for tensor in tensors]))
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def calibrate(
    model: nn.Module,
    blocks: Tensor,
    *,
    batch_size: int | None = None,
    process_group: ProcessGroup | None = None,
    progress: Progress | None = None,
    statistic: Statistic | None = None,
) -> Activations:
    """Run a model over blocks (n_blocks, block_size) of ids and return the statistics of all its weights.

    batch_size: None starts with what fills the device; too large a one is halved until it fits. Raises CalibrationError
    where one block does not fit, or activations are not finite.
    """
    process_group = process_group or SINGLE_PROCESS
    device = next(model.parameters()).device
    halves = turns(len(blocks), process_group)
    total = sum(map(len, halves))
    names = model.state_dict().keys()
    sums, position, _ = progress.start({"blocks": total}, names) if progress else (Sums(), {}, {})
    done = position.get("blocks", 0)
    size = BatchSize(batch_size or first_batch_size(device, blocks.shape[1]))

    def attempt(take: list[int]) -> Batch:
        batch = Batch(statistic)
        with capture_inputs(model, batch):
            model(**forward_arguments(model, to_device_async(blocks[take], device)))
        return batch

    bar = tqdm(total=total, initial=done, desc="calibrating", unit="block", disable=hides_progress())
    try:
        with torch.no_grad():
            while done < total:
                process_group.check_ranks()
                half, take = takes(halves, done, size.size)
                batch, block_numbers = size.run(take, attempt)
                sums.add(batch, half)
                done += len(block_numbers)
                bar.update(len(block_numbers))
                if progress:
                    progress.save(sums, {"blocks": done})
            if progress:
                progress.save(sums, {"blocks": done}, now=True)
            return reduce_over_ranks(sums, process_group).means(statistic)
    except BaseException as error:
        if progress:
            progress.interrupted(error, sums, {"blocks": done})
        raise
    finally:
        bar.close()
