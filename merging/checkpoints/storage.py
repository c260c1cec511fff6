"""Weight files: dtypes, shapes and offsets from headers, and tensors through a memory map."""

from __future__ import annotations

import math
import mmap
import pickle
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from common.errors import CheckpointError
from common.files.bounded_reading import UnreadableError, check_regular
from common.files.file_state import FileState, check_unchanged, state_of, states_of
from common.terminal_text import escape_controls, foreign, quoted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1),
    "BOOL": ("bool", 1), "U32": ("uint32", 4), "U16": ("uint16", 2), "U64": ("uint64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1), "F8_E8M0": ("float8_e8m0fnu", 1),
}  # fmt: skip
"""safetensors' name of a dtype -> torch's name and bytes per element."""
CODES = {name: code for code, (name, _) in DTYPES.items()}
MAX_NAME = 300
"""Characters of a tensor's name; the longest of known architectures have about 120."""
FLOATS = ("float64", "float32", "float16", "bfloat16")
PACKED = re.compile(
    r"\.(qweight|qzeros|scales|weight_packed|weight_scale(_inv)?|weight_zero_point|SCB|absmax|quant_map|codebooks)$"
    r"|\.weight\.(absmax|quant_map|nested_\w+|quant_state\.\w+)$|\.experts\.\w+_(blocks|scales)$"
)
"""Names that quantizers (GPTQ, AWQ, bitsandbytes, fp8, MXFP4) give to packed numbers and their scales."""

_MAPS: OrderedDict[Path, tuple[FileState | None, mmap.mmap]] = OrderedDict()
"""Memory maps by file, the least recently used first; each holds a file descriptor."""
_MAPS_LOCK = threading.Lock()
PACKED_DTYPES = ("F8", "F6", "F4", "U32", "float8", "float4", "uint32")


@dataclass(frozen=True)
class TensorInfo:
    """Header entry of one tensor.

    Attributes:
        shape: Shape of the tensor.
        dtype: Dtype by torch's name ("bfloat16").
        file: File with the tensor's bytes.
        offset: First byte of the tensor in a local safetensors file; None for other files.
        is_calculated: The tensor is dequantized, or an adapter is added to it, so that no file stores this dtype.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int | None = None
    is_calculated: bool = False


def tensor_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Return the size in bytes of a tensor of torch dtype name `dtype`."""
    return math.prod(shape) * DTYPES[CODES[dtype]][1]


class Rows(Protocol):
    """A tensor read in blocks of rows, so that it need not be whole in memory; torch.Tensor satisfies it."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the blocks."""

    def __getitem__(self, rows: slice) -> Tensor:
        """Return rows start:stop."""


class Weights(Protocol):
    """Tensors of a checkpoint by name: stored, dequantized, or computed while they are read."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Header entries by tensor name."""

    @property
    def files(self) -> Sequence[Path]:
        """All files that the values come from."""

    def rows(self, name: str) -> Rows:
        """Return a tensor to be read in blocks. Raises CheckpointError where it cannot be read."""

    def close(self) -> None:
        """Release open files and memory; a later read opens them again."""


class StoredWeights:
    """Tensors in safetensors or PyTorch .bin files, read through a memory map."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors
        self._states = states_of({info.file for info in tensors.values()})
        self._pickled: dict[Path, dict[str, Tensor]] = {}
        self._opening = threading.Lock()

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, sorted."""
        return tuple(sorted({info.file for info in self.tensors.values()}))

    def rows(self, name: str) -> Tensor:
        """Return the tensor as stored, memory-mapped, on the CPU. Raises CheckpointError where it cannot be read."""
        info = self.tensors[name]
        file = info.file
        if not file.exists():
            reason = "was removed during the run" if file in self._states else "is missing (only headers were fetched)"
            raise CheckpointError(f"Tensor {name} cannot be read: {file} {reason}.")
        if file in self._states:
            check_unchanged({file: self._states[file]})  # a mapped file that is cut short ends the process
        try:
            if file.suffix == ".safetensors":
                return tensor_in(memory_map(file), info)
            with self._opening:
                if file not in self._pickled:
                    self._pickled[file] = load_pickled(file)
            return self._pickled[file][name]
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{file}: tensor {name} cannot be read ({error}).") from error

    def close(self) -> None:
        """Release the memory maps."""
        self._pickled.clear()
        release_maps(info.file for info in self.tensors.values())


def memory_map(file: Path) -> mmap.mmap:
    """Return a memory map of the file's present content, which is shared. Raises OSError, ValueError."""
    state = state_of(file)
    with _MAPS_LOCK:
        if file not in _MAPS or _MAPS[file][0] != state:
            _MAPS[file] = state, map_file(file)
        _MAPS.move_to_end(file)
        while len(_MAPS) > most_maps():
            _MAPS.popitem(last=False)  # unmapped once the last tensor in it is freed
        return _MAPS[file][1]


def release_maps(files: Iterable[Path]) -> None:
    """Release the memory maps of some files."""
    with _MAPS_LOCK:
        for file in files:
            _MAPS.pop(file, None)


@cache
def most_maps() -> int:
    """Return the number of files mapped at a time: a quarter of the process's descriptor limit, at most 256."""
    try:
        import resource
    except ImportError:  # Windows
        return 256
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 256 if soft == resource.RLIM_INFINITY else max(8, min(256, soft // 4))


def map_file(file: Path) -> mmap.mmap:
    """Map a file into memory read-only.

    The safetensors library maps it writable (copy-on-write), which the system refuses for files larger than memory.
    """
    with file.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def tensor_in(mapped: mmap.mmap, info: TensorInfo) -> Tensor:
    """Return a tensor of a mapped safetensors file; it shares the file's bytes and must not be written to.

    Raises:
        ValueError: The file ends before the tensor does.
    """
    import torch

    dtype, count = getattr(torch, info.dtype), math.prod(info.shape)
    if count == 0:
        return torch.empty(info.shape, dtype=dtype)
    assert info.offset is not None
    _use_up_warning()
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=info.offset).reshape(info.shape)


@cache
def _use_up_warning() -> None:
    """Trigger torch's once-only warning about read-only buffers while warnings are ignored."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)


def load_pickled(file: Path) -> dict[str, Tensor]:
    """Return the memory-mapped tensors of a PyTorch .bin file, which is unpickled with `weights_only`.

    Raises:
        CheckpointError: The file holds other objects than tensors, is broken, or is no state dict.
    """
    import torch

    try:
        check_regular(file)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6: no memory map of that format
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors and is not unpickled, because a pickle can run code; "
            "convert it to safetensors on a machine where you trust it."
        ) from error
    except UnreadableError as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # the unpickler raises errors of many types for broken files
        what = foreign((str(error).splitlines() or [""])[0] or type(error).__name__)
        raise CheckpointError(f"{file} is not a whole PyTorch file ({what}); download it again.") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise CheckpointError(f"{file} should map names to tensors (a state dict), and does not.")
    for name, tensor in state.items():
        if problem := _odd_tensor(name, tensor):
            raise CheckpointError(f"{file}: {problem}.")
    return state


def is_packed(name: str, dtype: str) -> bool:
    """Return whether a tensor holds packed numbers or their scales, by its name and its torch dtype."""
    whole_numbers = name.endswith("weight") and dtype in CODES and dtype not in FLOATS
    return bool(PACKED.search(name)) or whole_numbers or dtype.startswith(PACKED_DTYPES)


def _odd_tensor(name: object, tensor: Tensor) -> str | None:
    """Describe what keeps an unpickled tensor from being read as plain numbers on the CPU; None for a plain one."""
    import torch

    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or escape_controls(name) != name:
        return f"the tensor name {quoted(name)} is not a text of 1 to {MAX_NAME} characters without control characters"
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device.type}"
        return f"tensor {name} is {kind}, and dense numbers were expected"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"tensor {name} of shape {quoted(list(tensor.shape))} is larger than the numbers stored for it"
    return None
