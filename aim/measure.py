"""The importance of a base: loaded where its file stands, else measured on calibration text and kept."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from aim.calibration.config import Calibration, contradiction
from aim.statistics import DEFAULT, check_statistic, find_statistic
from common.distributed import SINGLE_PROCESS, ProcessGroup
from common.errors import CalibrationError, CheckpointError, UsageError
from common.files.json_types import Between, OneOf
from common.hardware import product_dtype
from common.logging import logger
from common.quiet_transformers import quiet_transformers
from common.terminal_text import foreign
from common.typed_config import check_fields
from common.versions import MERGING, package_versions
from merging.checkpoints.checkpoint import FLOATS, Checkpoint
from merging.ops.kernels.bus_errors import report_bus_errors
from merging.output.records.card import public_name
from merging.recipe import DTYPES

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from aim.capture.state import Progress
    from aim.capture.statistics import Activations
    from aim.importance import Importance

CALIBRATION_MODES = ("auto", "whole", "layerwise")
PLACES = ("auto", "host", "disk")
ROOM = 1.3
"""Memory that a whole model takes, with what passes through it, in multiples of its weights."""


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement of importance: text, precision, batch, memory, and the file it is saved to.

    statistic: of `aim.statistics`; calibration_mode: "whole", "layerwise", or "auto", which takes the whole model where
    it fits; hidden_states: where a layerwise run keeps them; resume: whether an interrupted calibration goes on.
    """

    calibration: Calibration
    importance_file: Path | None = None
    calibration_dtype: Annotated[str, OneOf(("auto", *DTYPES))] = "auto"
    batch_size: Annotated[int, Between(1)] | None = None
    reference: bool = False
    calibration_mode: Annotated[str, OneOf(CALIBRATION_MODES)] = "auto"
    hidden_states: Annotated[str, OneOf(PLACES)] = "auto"
    resume: bool = False
    statistic: str = DEFAULT

    def check(self) -> None:
        """Raise UsageError for words that mean nothing here."""
        self.calibration.check()
        check_fields(self)
        check_statistic(self.statistic)
        if self.reference and self.statistic != DEFAULT:
            raise UsageError(
                f"--numerics reference measures the original's {DEFAULT}; leave out --statistic {self.statistic}."
            )
        if self.reference and self.calibration_mode == "layerwise":
            raise UsageError("--numerics reference runs the whole base; leave out --calibration_mode layerwise.")

    def key(self, base_key: str, dtype: str, digest: str, process_group: ProcessGroup) -> str:
        """Return what an interrupted calibration must have in common with the one that goes on with it."""
        same = [
            base_key,
            dtype,
            digest,
            self.statistic,
            process_group.rank,
            process_group.world_size,
            package_versions(MERGING),
        ]
        return hashlib.sha256(json.dumps(same).encode()).hexdigest()


def importance_of(
    base: Checkpoint,
    settings: Settings,
    device: torch.device,
    state: Path,
    process_group: ProcessGroup | None = None,
    keep: Callable[[Progress], None] | None = None,
) -> Importance:
    """Load the importance of a base where its file stands, else compute it and save it.

    state: where an interrupted calibration leaves what it has, until the importance file is in its place; keep: gets
    that of a calibration for which there is no such file, which is otherwise removed. Raises CheckpointError for a file
    of another base, CalibrationError for text that cannot be used or a base that cannot be run.
    """
    process_group = process_group or SINGLE_PROCESS
    file = settings.importance_file
    if file is not None and file.exists():
        from aim.calibration.packing import summary
        from aim.capture.state import remove_state

        remove_state(_state_of_rank(state, process_group))
        result = load_importance(file, base, settings.reference, settings.statistic)
        check_same_calibration(file, result.calibration, settings.calibration)
        logger.info(f"Importance from {file}. {summary(dict(result.calibration))}")
        return result
    report_bus_errors("The saved state of the calibration is kept; the same command with --resume continues from it.")
    measured, progress = measure(base, settings, device, state, process_group)
    try:
        if file is not None and process_group.is_main:
            measured.save(file)
            logger.info(f"Importance saved to {file}.")
        if file is not None:
            process_group.barrier()
    except BaseException as error:
        if progress is not None:
            progress.stop(error)
        raise
    if progress is not None:
        if file is None and keep is not None:
            keep(progress)
        else:
            progress.clear()
    return measured


def measure(
    base: Checkpoint, settings: Settings, device: torch.device, state: Path, process_group: ProcessGroup
) -> tuple[Importance, Progress | None]:
    """Run the base over its calibration text; returns its importance and the state that can still be resumed.

    Raises CalibrationError.
    """
    from transformers import AutoTokenizer

    from aim.calibration.packing import cut, summary
    from aim.calibration.text_sources import load_texts
    from aim.capture.attribution import by_stored_tensor
    from aim.importance import fingerprint, statistic_of

    if not base.loads_from_folder:
        raise CalibrationError(
            f"{base.name} is no folder of weights that can be run (it is quantized, has an adapter, or is a .gguf "
            "file); give --importance FILE, measured on the model saved as a folder (merge.py --method passthrough "
            "saves it)."
        )
    check_length(base, settings.calibration.block_size)
    dtype = calibration_dtype(base, settings, device)
    check_dtype(dtype, device)
    texts = load_texts(settings.calibration)
    try:
        # longer texts are dropped here, so that the tokenizer need not warn of them
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                base.folder, model_max_length=sys.maxsize, trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # transformers raises whatever a broken file makes it stumble over
        raise CalibrationError(
            f"{base.name} has no tokenizer that loads; calibration needs one ({foreign(str(error), 200)})."
        ) from error
    sample = cut(texts, tokenizer, settings.calibration)
    logger.info(summary(sample.account))
    base_key = fingerprint(base)
    progress = _progress(
        settings,
        settings.key(base_key, dtype, sample.account["digest"], process_group),
        state,
        process_group,
    )
    try:
        mode, activations, model = _run(base, settings, sample.blocks, device, dtype, progress, process_group)
        result = by_stored_tensor(activations, model, base)
    except BaseException as error:
        if progress is not None:
            progress.stop(error)
        raise
    numerics = "reference" if settings.reference else "float32"
    how = {"dtype": dtype, "device": device.type, "calibration_mode": mode}
    measured = replace(
        result,
        calibration={**sample.account, **how},
        base={"name": public_name(base.name), "commit": base.commit, "fingerprint": base_key},
        numerics=numerics,
        statistic=statistic_of(settings.statistic, numerics),
    )
    return measured, progress


def _state_of_rank(state: Path, process_group: ProcessGroup) -> Path:
    return state if process_group.world_size == 1 else state.with_name(f"{state.name}-{process_group.rank}")


def _progress(settings: Settings, key: str, state: Path, process_group: ProcessGroup) -> Progress | None:
    """Return the place of this process's calibration state; the reference's is not saved."""
    if settings.reference:
        return None
    from aim.capture.state import Progress

    return Progress(_state_of_rank(state, process_group), key, settings.resume, process_group.is_main)


def _run(
    base: Checkpoint, settings: Settings, blocks: Tensor, device: torch.device, dtype: str, progress: Progress | None,
    process_group: ProcessGroup,
) -> tuple[str, Activations, nn.Module]:  # fmt: skip
    """Run the base; returns the calibration mode, the statistics, and the model (or its skeleton)."""
    from aim.capture import base_model, layerwise, reference_statistic, whole_model

    mode, spread = choose_calibration_mode(base, settings, device, dtype, process_group)
    if mode == "layerwise":
        skeleton = base_model.Skeleton(base, dtype, device)
        logger.info("Calibrating one layer at a time.")
        result = layerwise.calibrate_layerwise(
            skeleton,
            blocks,
            batch_size=settings.batch_size,
            process_group=process_group,
            progress=progress,
            statistic=find_statistic(settings.statistic),
            place=settings.hidden_states,
            folder=settings.importance_file.parent if settings.importance_file else None,
        )
        return mode, result, skeleton.model
    model = base_model.load_whole(base, dtype, device, spread)
    if settings.reference:
        return mode, reference_statistic.collect(model, blocks), model
    result = whole_model.calibrate(
        model,
        blocks,
        batch_size=settings.batch_size,
        process_group=process_group,
        progress=progress,
        statistic=find_statistic(settings.statistic),
    )
    return mode, result, model


def choose_calibration_mode(
    base: Checkpoint, settings: Settings, device: torch.device, dtype: str, process_group: ProcessGroup
) -> tuple[str, bool]:
    """Return "whole" or "layerwise", and whether a whole model is spread over all GPUs.

    Left to us, the whole model where it fits: on the device, else on the GPUs together (one process), else by layers.
    """
    import torch

    from aim.capture.base_model import weight_bytes
    from common.hardware import available

    needed_bytes = ROOM * weight_bytes(base, dtype)
    fits = needed_bytes < available(device)
    gpus = torch.cuda.device_count() if device.type == "cuda" and process_group.world_size == 1 else 0
    together = gpus > 1 and needed_bytes < sum(available(torch.device("cuda", i)) for i in range(gpus))
    if settings.reference or settings.calibration_mode == "whole":
        return "whole", together and not fits
    if settings.calibration_mode == "auto" and (fits or together):
        return "whole", not fits
    return "layerwise", False


def load_importance(file: Path, base: Checkpoint, reference: bool, statistic: str = DEFAULT) -> Importance:
    """Load an importance file for a base.

    Raises CheckpointError for one of another base, of other numerics or of another statistic.
    """
    from aim.importance import Importance, fingerprint

    if not file.is_file():
        raise UsageError(f"--importance {file} is a folder or a device; give a regular file, or a new name.")
    result = Importance.load(file)
    result.check_base(fingerprint(base), base.name, file)
    wanted = "reference" if reference else "float32"
    if result.numerics != wanted:
        raise CheckpointError(
            f"{file} was measured with --numerics {result.numerics}, and {wanted} is asked for; give another file."
        )
    check_measured(file, result.statistic, statistic, wanted)
    return result


def check_measured(file: Path, measured: str, statistic: str, numerics: str) -> None:
    """Raise CheckpointError where an importance file holds another statistic than --statistic names."""
    from aim.importance import statistic_of

    if measured != statistic_of(statistic, numerics):
        raise CheckpointError(
            f"{file} holds the statistic {measured}, and --statistic {statistic} needs "
            f"{statistic_of(statistic, numerics)}; give another --importance file to measure it."
        )


def check_same_calibration(file: Path, recorded: Mapping[str, object], calibration: Calibration) -> None:
    """Refuse calibration flags that an existing importance file contradicts. Raises UsageError naming the first.

    Flags left at their defaults ask for nothing.
    """
    if difference := contradiction(calibration, recorded):
        flag, recorded_value, wanted = difference
        raise UsageError(
            f"--importance {file} was measured with --{flag} {recorded_value}, and {wanted} is asked for: "
            "leave the flag out, or give another file to measure anew."
        )


def check_length(base: Checkpoint, block_size: int) -> None:
    """Refuse blocks that are longer than the base can read. Raises UsageError."""
    longest = base.text_config.get("max_position_embeddings")
    if isinstance(longest, int) and block_size > longest:
        raise UsageError(f"--block_size {block_size} is more than the {longest} positions that {base.name} has.")


def calibration_dtype(base: Checkpoint, settings: Settings, device: torch.device) -> str:
    """Return the dtype that the base is run in: as asked, else the one that most of its tensors are stored in.

    bfloat16 becomes float32 on a processor that only emulates it: exact for the weights, and several times faster.
    """
    if settings.reference:
        return "bfloat16"
    if settings.calibration_dtype != "auto":
        return settings.calibration_dtype
    counts = Counter(info.dtype for info in base.tensors.values() if info.dtype in FLOATS)
    stored = counts.most_common(1)[0][0]
    return product_dtype(device.type) if stored == "bfloat16" else stored


def check_dtype(dtype: str, device: torch.device) -> None:
    """Refuse a dtype that a GPU does not compute in. Raises UsageError."""
    import torch

    if dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UsageError(
            f"{torch.cuda.get_device_name(device)} does not compute in bfloat16; give --calibration_dtype float16 "
            "or float32, or --device cpu."
        )
