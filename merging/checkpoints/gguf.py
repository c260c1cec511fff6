"""GGUF files (llama.cpp's format), dequantized to fp32 by transformers' loader."""

from __future__ import annotations

import importlib.util
import io
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from common.errors import CheckpointError, FailureError
from common.files.json_values import JsonObject
from common.files.paths import read_json
from common.files.temporary import new_folder
from common.quiet_transformers import quiet_transformers
from merging.checkpoints.storage import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

KINDS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")
TOKEN_IDS = ("bos", "eos", "pad")


class _AutoClass(Protocol):
    """One of transformers' Auto classes."""

    @property
    def from_config(self) -> Callable[..., PreTrainedModel]:
        """Function of a config that returns a model with random weights."""

    @property
    def from_pretrained(self) -> Callable[..., tuple[PreTrainedModel, Mapping[str, Collection[str]]]]:
        """Function of a folder that returns a model and, asked for `output_loading_info`, the keys that differ."""


class GgufWeights:
    """Dequantized tensors of a .gguf file in fp32, by the names under which transformers saves them.

    fp32 represents every quantization type exactly, so that merging rounds once. Names and shapes come from a model on
    the meta device. The first read dequantizes the whole file, since transformers' loader reads no single tensors: 4
    bytes per parameter stay in memory until `close`.
    """

    def __init__(self, label: str, file: Path, config: PretrainedConfig) -> None:
        import torch

        self.label, self.file, self._config = label, file, config
        self._loaded: dict[str, Tensor] | None = None
        self._loading = threading.Lock()
        self._kind = _auto_class(config)
        with torch.device("meta"), _silence_libraries():
            empty = self._kind.from_config(config, trust_remote_code=False)
        self.architecture = type(empty).__name__
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(tensor.shape), "float32", file) for name, tensor in _saved(empty).items()
        }

    @property
    def files(self) -> tuple[Path, ...]:
        """The file itself."""
        return (self.file,)

    def rows(self, name: str) -> Tensor:
        """Return a tensor in fp32; the first call dequantizes the whole file.

        Raises:
            CheckpointError: A tensor that the metadata describes is missing or has another shape.
        """
        with self._loading:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded[name]

    def close(self) -> None:
        """Release the dequantized tensors."""
        self._loaded = None

    def _load(self) -> dict[str, Tensor]:
        import torch
        from transformers import GgufConfig

        try:
            with _silence_libraries():
                model, loading_info = self._kind.from_pretrained(
                    str(self.file.parent),
                    gguf_file=self.file.name,
                    config=self._config,
                    dtype=torch.float32,
                    quantization_config=GgufConfig(dequantize=True),
                    output_loading_info=True,
                    trust_remote_code=False,
                )
        except Exception as error:
            raise CheckpointError(
                f"{self.label} cannot be dequantized by transformers ({_first_line(error)})."
            ) from error
        missing = sorted({*loading_info["missing_keys"], *(entry[0] for entry in loading_info["mismatched_keys"])})
        if missing:  # transformers fills them with random numbers
            raise CheckpointError(
                f"{self.label} does not hold {missing[0]} as its metadata says ({len(missing)} such tensors); "
                "download it again, or give the safetensors checkpoint that it was made from."
            )
        return {name: tensor.detach() for name, tensor in _saved(model).items()}


def open_gguf(label: str, file: Path) -> tuple[GgufWeights, JsonObject, Path]:
    """Return the weights, the config, and a temporary folder with config and tokenizer of a .gguf file.

    Only metadata is read.

    Args:
        label: Name of the model in messages.
        file: The .gguf file.

    Raises:
        FailureError: The gguf package is missing.
        CheckpointError: The file is broken, one of several parts, or of an architecture that transformers cannot load.
    """
    if importlib.util.find_spec("gguf") is None:
        raise FailureError(f"{label} is a GGUF file, and the gguf package is missing: `pip install gguf`.")
    from transformers import AutoConfig, GenerationConfig

    try:
        _check_whole(label, file)
        with _silence_libraries():
            config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
            folder = new_folder("inputs")
            _add_tokenizer(config, file, folder)
            weights = GgufWeights(label, file, config)
            config.architectures = [weights.architecture]
            config.dtype = "float32"
            config.save_pretrained(folder)
            GenerationConfig.from_model_config(config).save_pretrained(folder)
    except CheckpointError:
        raise
    except Exception as error:  # the readers raise errors of many types for broken files
        raise CheckpointError(f"{label} cannot be read as GGUF by transformers ({_first_line(error)}).") from error
    return weights, read_json(folder / "config.json", ""), folder


def _check_whole(label: str, file: Path) -> None:
    from gguf import GGUFReader

    parts = GGUFReader(file).fields.get("split.count")
    if parts is not None and parts.contents() > 1:
        raise CheckpointError(
            f"{label} is one of {parts.contents()} parts; join them with `llama-gguf-split --merge` first."
        )


def _add_tokenizer(config: PretrainedConfig, file: Path, folder: Path) -> None:
    """Save the file's tokenizer, if it has one, and copy the ids of its special tokens into the config."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    if "tokenizer.ggml.tokens" not in GGUFReader(file).fields:
        return
    tokenizer: Any = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
    tokenizer.save_pretrained(folder)
    for token in TOKEN_IDS:
        setattr(config, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))


def _auto_class(config: PretrainedConfig) -> _AutoClass:
    """Return the first Auto class of KINDS that has a model for the config."""
    import transformers

    classes = [getattr(transformers, name) for name in KINDS]
    auto_class: _AutoClass | None = next((kind for kind in classes if type(config) in kind._model_mapping), None)
    if auto_class is None:
        raise ValueError(f"no model class for {type(config).__name__}")
    return auto_class


def _saved(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the model's tensors under the names and shapes of save_pretrained, without tied copies."""
    from transformers.core_model_loading import revert_weight_conversion

    tied = set(model.all_tied_weights_keys)
    result: dict[str, Tensor] = revert_weight_conversion(
        model, {n: t for n, t in model.state_dict().items() if n not in tied}
    )
    return result


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _silence_libraries() -> Iterator[None]:
    """Silence the libraries' warnings, and their progress bars unless stderr is a terminal."""
    with quiet_transformers(), nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
        yield
