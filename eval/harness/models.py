"""The model behind an evaluation: where it runs, its configuration, tokenizer and identity. Imports no lm-eval."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from console.errors import BadInputError, EvaluationError, UsageError
from console.processor import product_dtype
from eval.engine.remote import AT_ONCE, RemoteEngine, messages_as_json
from eval.harness import identity
from eval.harness.checks import check_length, own_length, usable_length
from eval.harness.ranks import Ranks
from eval.harness.request_types import Engine, digest
from eval.harness.server import Server
from eval.harness.settings import Settings

HUB_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py")
HUB_WEIGHTS = ("*.safetensors",)


@dataclass(frozen=True)
class Subject:
    """The model to be evaluated: as asked for, what it is called, and what prompts and lengths depend on.

    `model` is a folder, a hub id, or a loaded transformers model; `folder` where its files are, once that is known.
    """

    model: Any
    label: str
    tokenizer: Any
    config: Mapping[str, Any]
    length: int
    folder: Path | None = None

    def template(self, apply: bool) -> Callable[..., str] | None:
        """How chats become prompts; None where prompts are plain text. A server renders them itself."""
        if not apply:
            return None
        return self._rendered if self.tokenizer is not None else messages_as_json

    def _rendered(self, chat: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        import jinja2

        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return str(self.tokenizer.apply_chat_template(chat, **options))
        except jinja2.exceptions.TemplateError:  # templates that refuse a system message
            return str(self.tokenizer.apply_chat_template([m for m in chat if m["role"] != "system"], **options))


def subject_of(model: Any, settings: Settings, tokenizer: Any = None, name: str | None = None) -> Subject:
    """Read configuration and tokenizer; check template and length. No weights. Raises UsageError, BadInputError."""
    if settings.backend == "openai":
        said = Server(str(settings.base_url)).check(model)
        own = said.get("max_model_len")
        check_length(own, settings.max_model_len, model)
        return Subject(model, name or model, None, {}, usable_length(own, settings.max_model_len, settings.preset))
    label = name or (model if isinstance(model, str) else getattr(model, "name_or_path", "") or type(model).__name__)
    folder = small_files(model) if isinstance(model, str) else None
    if folder is not None:
        tokenizer = load_tokenizer(folder, label)
    elif tokenizer is None:
        raise UsageError("A loaded model needs its tokenizer: evaluate(model, settings, tokenizer=...).")
    if settings.apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise UsageError(f"The tokenizer of {label} has no chat template; leave out --apply_chat_template.")
    config = (load_config(folder, label) if folder is not None else model.config).to_dict()
    own = own_length(config)
    check_length(own, settings.max_model_len, label)
    return Subject(model, label, tokenizer, config, usable_length(own, settings.max_model_len, settings.preset), folder)


def place(settings: Settings, model: Any, ranks: Ranks) -> Settings:
    """Return the settings with backend, device, GPUs and dtype decided. Raises UsageError for a GPU not there."""
    if settings.backend == "openai":
        if not isinstance(model, str) or ranks.count > 1:
            raise UsageError("--backend openai asks a server for a model by its name, from one process.")
        return replace(settings, device="server", n_gpu=0, dtype=settings.dtype or "auto")
    import torch

    if not isinstance(model, str):
        if settings.backend == "vllm":
            raise UsageError("The vllm backend loads the model itself: give a folder or a hub id.")
        dtype = str(model.dtype).removeprefix("torch.")
        return replace(settings, backend="hf", device=str(next(model.parameters()).device), n_gpu=1, dtype=dtype)
    visible = torch.cuda.device_count()
    kind, _, index = settings.device.partition(":")
    if settings.n_gpu is not None and settings.n_gpu > visible:
        raise UsageError(f"--n_gpu {settings.n_gpu} is more than the {visible} GPUs visible here.")
    if kind == "cuda" and (not visible or int(index or 0) >= visible):
        raise UsageError(f"--device {settings.device} is not here: {visible} GPUs are visible.")
    gpu = kind != "cpu" and visible > 0 and settings.n_gpu != 0
    if kind == "cuda" and not gpu:
        raise UsageError(f"--device {settings.device} and --n_gpu 0 contradict each other.")
    several = ranks.count > 1
    settings = replace(settings, dtype=settings.dtype or product_dtype("cuda" if gpu else "cpu"))
    backend = settings.backend
    if backend == "auto":
        backend = "vllm" if gpu and find_spec("vllm") and not index and not several else "hf"
    if backend == "vllm" and (not gpu or not find_spec("vllm")):
        raise UsageError(
            "--backend vllm needs a GPU and the package vllm (`pip install vllm`); --backend hf needs neither."
        )
    if several and backend == "vllm":
        raise UsageError("Start --backend vllm once, not by a launcher: it uses the GPUs that --n_gpu says.")
    if several and gpu:
        if index or ranks.local >= visible:
            raise UsageError(
                f"{ranks.count} processes need a GPU each: leave out the number in --device, start as many as there "
                f"are GPUs ({visible} visible), or give --device cpu."
            )
        return replace(settings, backend=backend, device=f"cuda:{ranks.local}", n_gpu=1)
    count = 0 if not gpu else 1 if index else settings.n_gpu or visible
    if settings.data_parallel > 1 and (backend != "vllm" or count % settings.data_parallel):
        raise UsageError(
            f"--data_parallel {settings.data_parallel} shares out vllm's GPUs ({count} used); for --backend hf start "
            "the script with `accelerate launch`."
        )
    device = (settings.device if index else "cuda") if gpu else "cpu"
    return replace(settings, backend=backend, device=device, n_gpu=count)


def small_files(model: str) -> Path:
    """The folder with a model's configuration and tokenizer; fetched from the hub or found in its cache by an id."""
    return Path(model) if Path(model).is_dir() else _snapshot(model, HUB_FILES)


def with_weights(subject: Subject) -> Subject:
    """The subject with its weights on disk, for models of the hub."""
    if subject.folder is None or Path(subject.model).is_dir():
        return subject
    return replace(subject, folder=_snapshot(subject.model, (*HUB_FILES, *HUB_WEIGHTS)))


def _snapshot(model: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    name, revision = split(model)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client has a dozen exceptions, and its transport its own
        raise BadInputError(
            f"--model {model} is neither a folder here nor to be had from the hub or its cache: {first_line(error)}"
        ) from error


def load_tokenizer(folder: Path, label: str) -> Any:
    """Load a folder's tokenizer. Raises BadInputError where there is none to load."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # OSError, ValueError, or whatever a broken file raises in the Rust reader
        raise BadInputError(f"The tokenizer of {label} could not be loaded: {first_line(error)}") from error


def load_config(folder: Path, label: str) -> Any:
    """Load a folder's configuration. Raises BadInputError where there is none to load."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # as above
        raise BadInputError(f"The configuration of {label} could not be loaded: {first_line(error)}") from error


def identify(subject: Subject, settings: Settings) -> tuple[str, str | None]:
    """The digest of the model, and its commit where the hub knows it. A server's model goes by name and address."""
    if isinstance(subject.model, str) and subject.folder is None:
        return f"server:{subject.model}@{settings.base_url}", None
    if subject.folder is None:
        return identity.loaded_digest(subject.model), None
    return identity.model_digest(subject.folder), identity.hub_commit(subject.folder)


def scope_of(model_digest: str, settings: Settings, subject: Subject) -> str:
    """What a journal's answers hold for: model, backend, dtype and length."""
    return digest(model_digest, settings.backend, settings.dtype, subject.length)


def make_engine(subject: Subject, settings: Settings) -> Engine:
    """Load the model for the backend. Raises EvaluationError where it cannot be loaded."""
    batch = None if settings.batch_size == "auto" else int(settings.batch_size)
    if settings.backend == "openai":
        at_once = batch or AT_ONCE
        return RemoteEngine(Server(str(settings.base_url)), subject.model, at_once, settings.apply_chat_template)
    try:
        if settings.backend == "vllm" or subject.config.get("is_encoder_decoder"):
            from eval.engine.adapter import adapted

            return adapted(subject, settings)
        from eval.engine.hf import HFEngine

        model = subject.model if subject.folder is None else _load(subject.folder, settings)
        return HFEngine(model, subject.tokenizer, subject.length, batch)
    except Exception as error:  # loading runs third-party code for every architecture
        raise EvaluationError(f"The model {subject.label} could not be loaded: {first_line(error)}") from error


def _load(folder: Path, settings: Settings) -> Any:
    """transformers on the CPU, on one GPU, or with its layers over several."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if settings.device.startswith("cuda"):
        show_only(settings)
        options["device_map"] = "auto" if (settings.n_gpu or 0) > 1 else settings.device
    return AutoModelForCausalLM.from_pretrained(folder, dtype=settings.dtype, **options)


def show_only(settings: Settings) -> None:
    """Hide the GPUs beyond --n_gpu from the libraries; works because CUDA has not been started yet."""
    import torch

    if settings.n_gpu and settings.n_gpu < torch.cuda.device_count() and settings.device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[: settings.n_gpu])


def split(model: str) -> tuple[str, str]:
    """Split `organisation/name@revision`; a folder has no revision."""
    if Path(model).is_dir():
        return model, "main"
    name, _, revision = model.partition("@")
    return name, revision or "main"


def first_line(error: Exception) -> str:
    """The error's kind and the first line of its message."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no details'}"
