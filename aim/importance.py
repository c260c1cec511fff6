"""The importance of a base: its activations per weight in one file, with what they were measured on.

The file is safetensors: one fp32 tensor per weight, (d_in,), or (experts, d_in) for a stack of experts, and metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aim.statistics import statistic_names
from common.errors import CheckpointError
from common.files.atomic import written
from common.files.bounded_reading import UnreadableError, parse_json
from common.files.json_types import Between, Each, Fields, ListOf, Maybe, OneOf, check_shape
from common.files.json_values import JsonObject, JsonValue
from common.files.safetensors_file import write_safetensors
from common.hardware import usable_cores
from common.terminal_text import quoted
from merging.checkpoints.headers import safetensors_header
from merging.ops.tensor_blocks import cut
from merging.output.digests import Digest, block_bytes

if TYPE_CHECKING:
    from merging.checkpoints.checkpoint import Checkpoint

FORMAT = "aim-importance-3"
DESCRIBED = (
    "axes", "tokens", "stability", "heads", "unmeasured", "calibration", "base", "versions", "numerics", "statistic",
)  # fmt: skip
"""What the file's metadata holds, as JSON, besides the activations."""


REFERENCE_STATISTIC = "sum_of_block_mean_abs_input"
"""|x| averaged by block and summed over blocks, as in the original: that of --numerics reference."""
HASHED_ELEMENTS = 1 << 24
"""Elements hashed at a time. No digest depends on it."""
_COUNT = Between(0)
_SOURCE = {
    "source": str, "blocks": _COUNT, "tokens": _COUNT, "read": _COUNT, "kept": _COUNT, "asked": _COUNT,
    "too_long": _COUNT, "empty": _COUNT,
}  # fmt: skip
CALIBRATION = Fields(
    {},
    {
        "block_size": Between(1), "blocks": _COUNT, "tokens": _COUNT, "n_samples": _COUNT, "seed": _COUNT,
        "sources": ListOf(Fields(_SOURCE, {"files_left_out": _COUNT})),
    },
)  # fmt: skip
SHAPE = Fields(
    {
        "axes": Each(Between(-16, 16)),
        "tokens": Each(OneOf((int, list))),
        "stability": dict,
        "heads": Each(str),
        "unmeasured": Each(str),
        "calibration": CALIBRATION,
        "base": Fields({"name": str, "fingerprint": str}, {"commit": Maybe(str)}),
        "versions": Each(str),
        "numerics": OneOf(("float32", "reference")),
        "statistic": str,
    }
)
"""Types of the metadata."""


def statistic_of(name: str, numerics: str) -> str:
    """Return the statistic of an importance file, as it is spelled there, by --statistic and --numerics."""
    return REFERENCE_STATISTIC if numerics == "reference" else f"{name}_input"


@dataclass(frozen=True)
class Importance:
    """Activations per tensor name, fp32, with what they were measured on.

    activations: (d_in,), or (experts, d_in) for a stack of experts along axis 0. `axes`: the axis of the weight that
    the channels run along (0 for Conv1D, whose weight is [in, out]). tokens: how many each is the mean of, a list for
    experts. stability: rank correlation between the two halves of the calibration set. heads: {input embedding: the
    entry that was measured as its tied output head}. `statistic`: as `statistic_of` spells it. `unmeasured` names
    weights that no activation was seen for, with the reason.
    """

    activations: Mapping[str, Tensor]
    axes: Mapping[str, int]
    unmeasured: Mapping[str, str]
    calibration: Mapping[str, JsonValue]
    base: Mapping[str, JsonValue]
    tokens: Mapping[str, Any] = field(default_factory=dict)
    stability: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    numerics: str = "float32"
    statistic: str = "mean_abs_input"

    @property
    def digest(self) -> str:
        """sha256 of everything in it."""
        digest = hashlib.sha256(json.dumps(self._about(), sort_keys=True).encode())
        for name in sorted(self.activations):
            digest.update(name.encode())
            digest.update(self.activations[name].contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _about(self) -> JsonObject:
        return {key: getattr(self, key) for key in DESCRIBED}

    def save(self, file: Path) -> None:
        """Write one safetensors file, appearing only when whole."""
        described = {key: json.dumps(value, sort_keys=True) for key, value in self._about().items()}
        metadata = {"format": FORMAT, "digest": self.digest, **described}
        with written(file) as stream:
            write_safetensors(stream, self.activations, metadata)

    @classmethod
    def load(cls, file: Path) -> Importance:
        """Read an importance file. Raises CheckpointError for a file that is broken or of another kind."""
        from safetensors import SafetensorError, safe_open

        safetensors_header(file)  # within limits, which the library does not have
        try:
            with safe_open(str(file), framework="pt") as opened:
                metadata = opened.metadata() or {}
                activations = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, RuntimeError) as error:  # torch has the latter for a file that it cannot map
            raise CheckpointError(f"{file} cannot be read ({error}).") from error
        except SafetensorError as error:
            raise CheckpointError(f"{file} is not a whole safetensors file ({error}).") from error
        if metadata.get("format") != FORMAT:
            stored_format = quoted(metadata.get("format"))
            raise CheckpointError(
                f"{file} is not an importance file of this program (its format is {stored_format}, expected {FORMAT}); "
                "performAIM.py --importance or scripts/importance.py makes one."
            )
        try:
            described = {key: parse_json(metadata[key], f"The metadata {key} of {file}") for key in DESCRIBED}
            check_shape(described, SHAPE, f"The metadata of {file}")
            importance = cls(activations=activations, **described)
        except KeyError as error:
            raise CheckpointError(f"{file} has no {error} in its metadata.") from error
        except UnreadableError as error:
            raise CheckpointError(str(error)) from error
        names = [statistic_of(name, importance.numerics) for name in statistic_names()]
        if importance.statistic not in names:
            raise CheckpointError(
                f"{file} holds the statistic {importance.statistic} of --numerics {importance.numerics}, expected "
                f"{' or '.join(dict.fromkeys(names))}; measure it again."
            )
        importance._check_activations(file)
        if importance.digest != metadata.get("digest"):
            raise CheckpointError(f"{file} was changed since it was written (its digest differs); measure it again.")
        return importance

    def _check_activations(self, file: Path) -> None:
        """Raise CheckpointError for an activation that no calibration gives."""
        for name, activation in self.activations.items():
            problem = None
            if activation.dtype != torch.float32 or activation.dim() not in (1, 2) or activation.numel() == 0:
                problem = f"{activation.dtype} of shape {list(activation.shape)}, float32 vectors were expected"
            elif not bool(torch.isfinite(activation).all()) or bool((activation < 0).any()):
                problem = "values that are negative or not finite"
            elif name not in self.axes:
                problem = "no axis in the metadata"
            if problem:
                raise CheckpointError(f"{file}: the activation of {name} has {problem}; measure it again.")

    def check_base(self, fingerprint: str, name: str, file: Path) -> None:
        """Raise CheckpointError where this was measured on another base than `name`."""
        if self.base["fingerprint"] != fingerprint:
            raise CheckpointError(
                f"{file} was computed from {self.base['name']}, whose weights are not those of {name}; "
                "give another --importance file or remove this one to compute it anew."
            )


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return a digest of every tensor's name, shape, dtype and values, as they are read (dequantized, adapted)."""
    digest = Digest(usable_cores())
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        digest.update(f"{name}{info.shape}{info.dtype}".encode())
        if not info.shape or 0 in info.shape:
            digest.update(block_bytes(checkpoint.read(name)))
            continue
        rows = checkpoint.rows(name)
        for block in cut(torch.Size(info.shape), HASHED_ELEMENTS):
            digest.update(block_bytes(rows[block.rows]))
    return digest.text()
