"""GGUF files (llama.cpp's format), through the loader of transformers that dequantises them."""

from __future__ import annotations

import importlib.util
import io
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import CheckpointError, FailureError
from common.files.paths import read_json
from common.quiet_transformers import quiet_transformers
from merging.checkpoints.storage import TensorInfo
from merging.checkpoints.tempdir import scratch_folder

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")
TOKEN_IDS = ("bos", "eos", "pad")


class GgufWeights:
    """The dequantised tensors of a .gguf file, by the names that transformers saves them under, in fp32.

    fp32 holds what every quantisation stands for exactly, so that merging rounds once. Names and shapes are those of a
    model without memory, made from the file's metadata. The first read dequantises the whole file, because the loader
    gives no other way: 4 bytes per parameter stay in memory until `close`.
    """

    def __init__(self, label: str, file: Path, config: Any) -> None:
        import torch

        self.label, self.file, self._config = label, file, config
        self._loaded: dict[str, Tensor] | None = None
        self._loading = threading.Lock()
        self._kind = _auto_class(config)
        with torch.device("meta"), _quiet():
            empty = self._kind.from_config(config)
        self.architecture = type(empty).__name__
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(tensor.shape), "float32", file) for name, tensor in _saved(empty).items()
        }

    @property
    def files(self) -> tuple[Path, ...]:
        """The file itself."""
        return (self.file,)

    def rows(self, name: str) -> Tensor:
        """Return a tensor in fp32, dequantising the file on the first call.

        Raises CheckpointError where the file does not hold what its metadata promises.
        """
        with self._loading:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded[name]

    def close(self) -> None:
        """Let go of the dequantised tensors."""
        self._loaded = None

    def _load(self) -> dict[str, Tensor]:
        import torch
        from transformers import GgufConfig

        try:
            with _quiet():
                model, told = self._kind.from_pretrained(
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
                f"{self.label} cannot be dequantised by transformers ({_first_line(error)})."
            ) from error
        lacking = sorted({*told["missing_keys"], *(entry[0] for entry in told["mismatched_keys"])})
        if lacking:  # transformers fills them with random numbers
            raise CheckpointError(
                f"{self.label} does not hold {lacking[0]} as its metadata says ({len(lacking)} such tensors); "
                "download it again, or give the safetensors checkpoint that it was made from."
            )
        return {name: tensor.detach() for name, tensor in _saved(model).items()}


def open_gguf(label: str, file: Path) -> tuple[GgufWeights, dict[str, Any], Path]:
    """Return weights, config and a folder with the config and the tokenizer that the file describes.

    Only metadata is read. Raises FailureError where the gguf package is missing, CheckpointError for a file that is
    broken, one of several parts, or of an architecture that transformers does not read.
    """
    if importlib.util.find_spec("gguf") is None:
        raise FailureError(f"{label} is a GGUF file, and the gguf package is missing: `pip install gguf`.")
    from transformers import AutoConfig, GenerationConfig

    try:
        _check_whole(label, file)
        with _quiet():
            config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
            folder = scratch_folder()
            _add_tokenizer(config, file, folder)
            weights = GgufWeights(label, file, config)
            config.architectures = [weights.architecture]
            config.dtype = "float32"
            config.save_pretrained(folder)
            GenerationConfig.from_model_config(config).save_pretrained(folder)
    except CheckpointError:
        raise
    except Exception as error:  # the readers raise whatever a broken file makes them stumble over
        raise CheckpointError(f"{label} cannot be read as GGUF by transformers ({_first_line(error)}).") from error
    return weights, read_json(folder / "config.json", ""), folder


def _check_whole(label: str, file: Path) -> None:
    from gguf import GGUFReader

    parts = GGUFReader(file).fields.get("split.count")
    if parts is not None and parts.contents() > 1:
        raise CheckpointError(
            f"{label} is one of {parts.contents()} parts; join them with `llama-gguf-split --merge` first."
        )


def _add_tokenizer(config: Any, file: Path, folder: Path) -> None:
    """Save the file's tokenizer, if it has one, and take the special tokens' ids from it."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    if "tokenizer.ggml.tokens" not in GGUFReader(file).fields:
        return
    tokenizer: Any = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
    tokenizer.save_pretrained(folder)
    for token in TOKEN_IDS:
        setattr(config, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))


def _auto_class(config: Any) -> Any:
    """The Auto class that has a model for the config, the language models first."""
    import transformers

    classes = [getattr(transformers, name) for name in KINDS]
    found = next((kind for kind in classes if type(config) in kind._model_mapping), None)
    if found is None:
        raise ValueError(f"no model class for {type(config).__name__}")
    return found


def _saved(model: Any) -> dict[str, Tensor]:
    """The model's tensors as save_pretrained would name and cut them, those that are tied to another left out."""
    from transformers.core_model_loading import revert_weight_conversion

    tied = set(model.all_tied_weights_keys)
    return revert_weight_conversion(model, {n: t for n, t in model.state_dict().items() if n not in tied})


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' remarks on what a GGUF file leaves to defaults, or bars where none can be drawn."""
    with quiet_transformers(), nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
        yield
