"""The importance of a base: loaded where its file stands, else measured on calibration text and kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aim.calibration import Calibration
from console.cli import say
from console.errors import CalibrationError, CheckpointError, UsageError
from merging.checkpoint import FLOATS, Checkpoint

if TYPE_CHECKING:
    import torch

    from aim.importance import Importance


@dataclass(frozen=True)
class Settings:
    """How importance is measured: text, precision, batch; and where it is kept."""

    calibration: Calibration
    importance_file: Path | None = None
    calibration_dtype: str = "auto"
    batch_size: int | None = None
    reference: bool = False
    relax_tied: bool = False


def importance_of(base: Checkpoint, settings: Settings, device: torch.device, quiet: bool) -> Importance:
    """Load the importance of a base where its file stands, else compute it and save it.

    Raises CheckpointError for a file of another base, CalibrationError for text that cannot be used.
    """
    from aim.calibration import cut, load_texts, summary
    from aim.importance import Importance, collect, fingerprint, stored_names

    file = settings.importance_file
    if file is not None and file.exists():
        found = load_importance(file, base, settings.reference)
        check_same_calibration(file, found.calibration, settings.calibration)
        say(f"Importance from {file}. {summary(dict(found.calibration))}", quiet)
        return found
    if not base.loads_from_folder:
        raise CalibrationError(
            f"{base.name} is no folder of weights that can be run (it has an adapter, or is a .gguf file); "
            "give --importance FILE, measured on the model saved as a folder."
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_length(base, settings.calibration.block_size)
    texts = load_texts(settings.calibration)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base.folder)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{base.name} has no tokenizer that loads; calibration needs one ({error}).") from error
    sample = cut(texts, tokenizer, settings.calibration)
    say(summary(sample.account), quiet)
    dtype = base_dtype(base) if settings.calibration_dtype == "auto" else settings.calibration_dtype
    if settings.reference:
        dtype = "bfloat16"
    model: Any = AutoModelForCausalLM.from_pretrained(base.folder, dtype=dtype)
    model = model.to(device).eval()
    batch_size = 1 if settings.reference else settings.batch_size or (8 if device.type == "cuda" else 1)
    activations, axes, unmeasured = collect(
        model, sample.blocks, batch_size=batch_size, reference=settings.reference, quiet=quiet
    )
    stored = stored_names([*activations, *unmeasured], base.tensors, getattr(model, "base_model_prefix", ""))
    measured = Importance(
        activations={stored[name]: a for name, a in activations.items()},
        axes={stored[name]: axis for name, axis in axes.items()},
        unmeasured={stored[name]: reason for name, reason in unmeasured.items()},
        calibration={**sample.account, "dtype": dtype, "device": device.type, "batch_size": batch_size},
        base={"name": base.name, "commit": base.commit, "fingerprint": fingerprint(base)},
        numerics="reference" if settings.reference else "float32",
    )
    if file is not None:
        measured.save(file)
        say(f"Importance saved to {file}.", quiet)
    return measured


def load_importance(file: Path, base: Checkpoint, reference: bool) -> Importance:
    """Load an importance file for a base. Raises CheckpointError for one of another base or of other numerics."""
    from aim.importance import Importance, fingerprint

    if not file.is_file():
        raise UsageError(f"--importance {file} is a folder; give a file.")
    found = Importance.load(file)
    found.check_base(fingerprint(base), base.name, file)
    wanted = "reference" if reference else "float32"
    if found.numerics != wanted:
        raise CheckpointError(
            f"{file} was measured with --numerics {found.numerics}, and {wanted} is asked for; give another file."
        )
    return found


def check_same_calibration(file: Path, recorded: Mapping[str, Any], asked: Calibration) -> None:
    """Refuse calibration flags that an existing importance file contradicts. Raises UsageError naming the first.

    Flags left at their defaults ask for nothing.
    """
    for entry in fields(asked):
        value = getattr(asked, entry.name)
        if entry.name == "source":
            value = Path(value).name
        if value != entry.default and value != recorded.get(entry.name):
            flag = "calibration" if entry.name == "source" else entry.name
            raise UsageError(
                f"--importance {file} was measured with --{flag} {recorded.get(entry.name)}, and {value} is asked for: "
                "leave the flag out, or give another file to measure anew."
            )


def check_length(base: Checkpoint, block_size: int) -> None:
    """Refuse blocks that are longer than the base can read. Raises UsageError."""
    longest = base.text_config.get("max_position_embeddings")
    if isinstance(longest, int) and block_size > longest:
        raise UsageError(f"--block_size {block_size} is more than the {longest} positions that {base.name} has.")


def base_dtype(base: Checkpoint) -> str:
    """Return the floating-point dtype that most of the base's tensors are stored in."""
    counts = Counter(info.dtype for info in base.tensors.values() if info.dtype in FLOATS)
    return counts.most_common(1)[0][0]
