"""The base's activation importance: hooks, accumulators, and the file that holds the result.

For every linear layer and norm, a (d_in,) is the mean over all calibration tokens of the absolute input per channel
(AWQ's statistic, Lin et al. 2023, arXiv:2306.00978, as AIM uses it).
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from console.errors import CalibrationError, CheckpointError

if TYPE_CHECKING:
    from merging.checkpoint import Checkpoint

FORMAT = "aim-importance-1"


@dataclass(frozen=True)
class Importance:
    """Activations per tensor name, (d_in,) fp32, with what they were measured on.

    `axes` gives the axis of the weight that the channels run along: -1, or 0 for Conv1D, whose weight is [in, out].
    `unmeasured` names weights that no activation was seen for, with the reason.
    """

    activations: Mapping[str, Tensor]
    axes: Mapping[str, int]
    unmeasured: Mapping[str, str]
    calibration: Mapping[str, Any]
    base: Mapping[str, Any]
    numerics: str = "float32"

    def save(self, file: Path) -> None:
        """Write one safetensors file, appearing only when whole."""
        from safetensors.torch import save_file

        about = {
            "axes": self.axes,
            "unmeasured": self.unmeasured,
            "calibration": self.calibration,
            "base": self.base,
            "numerics": self.numerics,
        }
        metadata = {"format": FORMAT, **{key: json.dumps(value) for key, value in about.items()}}
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
        try:
            save_file({name: a.contiguous() for name, a in self.activations.items()}, partial, metadata)
            _order_metadata(partial)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, file: Path) -> Importance:
        """Read an importance file. Raises CheckpointError for a file that is broken or of another kind."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(file), framework="pt") as opened:
                metadata = opened.metadata() or {}
                activations = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is not a whole safetensors file ({error}).") from error
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{file} is not an importance file ({FORMAT}) of performAIM.py.")
        about = {key: json.loads(metadata[key]) for key in ("axes", "unmeasured", "calibration", "base", "numerics")}
        return cls(activations=activations, **about)

    def check_base(self, fingerprint: str, name: str, file: Path) -> None:
        """Raise CheckpointError where this was measured on another base than `name`."""
        if self.base["fingerprint"] != fingerprint:
            raise CheckpointError(
                f"{file} was computed from {self.base['name']}, whose weights are not those of {name}; "
                "give another --importance file or remove this one to compute it anew."
            )


def _order_metadata(file: Path) -> None:
    """Put the metadata of a safetensors file in order, which its library writes in another one every time."""
    with file.open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) <= length:
            stream.seek(8)
            stream.write(ordered.ljust(length))


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return a digest of every tensor's name, shape, dtype and of evenly spaced values of it.

    It tells checkpoints apart without reading them whole.
    """
    digest = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        digest.update(f"{name}{info.shape}{info.dtype}".encode())
        flat = checkpoint.read(name).flatten()
        sampled = flat[:: max(1, len(flat) // 256)].contiguous()
        digest.update(sampled.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def stored_names(names: Iterable[str], stored: Collection[str], prefix: str) -> dict[str, str]:
    """Map parameter names to those in the checkpoint, which may lack (or have) the inner model's prefix."""
    found = {}
    for name in names:
        bare = name.removeprefix(f"{prefix}.")
        found[name] = next((n for n in (name, bare, f"{prefix}.{name}") if n in stored), name)
    return found


def measured_axis(module: nn.Module) -> int | None:
    """Return the axis of `module.weight` that its input channels run along, or None for what is not measured.

    Linear layers and norms are measured. Embeddings are looked up by id and have no activation; convolutions mix
    positions and are left as merged.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(module, nn.Embedding):
        return None
    if type(module).__name__ == "Conv1D":
        return 0
    return -1 if weight.dim() in (1, 2) else None


class Accumulator:
    """Collects sum |x| per channel of one weight: fp32 over the tokens of a batch, fp64 over batches.

    In reference numerics each block's mean is taken and added in the model's dtype, as the original does.
    """

    def __init__(self, channels: int, reference: bool) -> None:
        self.channels = channels
        self.reference = reference
        self.total: Tensor | None = None
        self.tokens = 0

    def add(self, x: Tensor, total: Tensor) -> None:
        """Add one batch; `total` is `batch_total(x)`, shared by modules with the same input."""
        self.total = total if self.total is None else self.total + total
        self.tokens += x.numel() // self.channels

    def mean(self) -> Tensor:
        """Return a (channels,) fp32 on the CPU; in reference numerics the sum over blocks (its ratio is the same)."""
        assert self.total is not None
        total = self.total.float() if self.reference else (self.total / self.tokens).float()
        return total.cpu()


def batch_total(x: Tensor, reference: bool) -> Tensor:
    """Return the batch's contribution (channels,): sum |x| over tokens in fp64, or the bf16 mean for the reference."""
    magnitude = x.detach().reshape(-1, x.shape[-1]).abs()
    return magnitude.mean(0) if reference else magnitude.sum(0, dtype=torch.float32).double()


def collect(
    model: nn.Module, blocks: Tensor, *, batch_size: int = 1, reference: bool = False, quiet: bool = False
) -> tuple[dict[str, Tensor], dict[str, int], dict[str, str]]:
    """Run the base over calibration blocks (n_blocks, block_size); return activations, axes and what went unmeasured.

    Names are `MODULE.weight`. Raises CalibrationError for activations that are not finite.
    """
    accumulators: dict[str, Accumulator] = {}
    axes: dict[str, int] = {}
    last: list[Tensor] = []  # the previous input and its total: q, k and v read the same tensor

    def hook(name: str):  # type: ignore[no-untyped-def]
        def observe(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            accumulator = accumulators[name]
            if x is None or not x.is_floating_point() or x.shape[-1] != accumulator.channels:
                return
            if not last or last[0] is not x:
                last[:] = [x, batch_total(x, reference)]
            accumulator.add(x, last[1])

        return observe

    handles = []
    for name, module in model.named_modules():
        axis = measured_axis(module)
        if axis is not None and not (reference and "embed" in name):  # the original goes by the name
            weight = module.weight
            assert isinstance(weight, Tensor)
            accumulators[f"{name}.weight"] = Accumulator(weight.shape[axis], reference)
            axes[f"{name}.weight"] = axis
            handles.append(module.register_forward_pre_hook(hook(f"{name}.weight"), with_kwargs=True))
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            for batch in tqdm(blocks.split(batch_size), desc="calibrating", disable=True if quiet else None):
                model(batch.to(device), use_cache=False)
                last.clear()
    finally:
        for handle in handles:
            handle.remove()
    activations = {name: a.mean() for name, a in accumulators.items() if a.tokens}
    for name, a in activations.items():
        if not torch.isfinite(a).all():
            raise CalibrationError(
                f"The base's activations into {name} are not finite; try --calibration_dtype float32."
            )
    unmeasured = {name: "never called with activations" for name, a in accumulators.items() if not a.tokens}
    return activations, {name: axes[name] for name in activations}, unmeasured
