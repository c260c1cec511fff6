"""The model of an evaluation: its device, configuration, tokenizer, identity, and lm-eval's model of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from common.distributed import ProcessGroup
from common.errors import BadInputError, EvaluationError, ProjectError, UsageError, first_line
from common.hardware import product_dtype
from eval.benchmarks import Benchmark
from eval.harness import identity, references
from eval.harness.checks import check_length, config_length, usable_length
from eval.harness.corrections import VERSION
from eval.harness.corrections.chat_template import render
from eval.harness.corrections.encoding import adds_special_tokens
from eval.harness.server import Server
from eval.model_args import answer_changing
from eval.request_types import Backend, digest
from eval.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from common.files.json_values import JsonObject

PACKAGES = {
    "load_in_4bit": "bitsandbytes", "load_in_8bit": "bitsandbytes", "autogptq": "auto_gptq", "gptqmodel": "gptqmodel",
}  # fmt: skip
"""Arguments of --model_args that need a package."""
API_PACKAGES = ("aiohttp", "requests", "tenacity")
HANDLED = ("tokenizer", "revision", "add_bos_token", "enable_thinking", "chat_template_args", "trust_remote_code",
           "think_end_token")  # fmt: skip
"""Arguments of --model_args that are used before lm-eval's model is made."""


@dataclass(frozen=True)
class EvaluatedModel:
    """A model before its weights are loaded: what prompts and lengths depend on.

    `model` is a model reference, a server's name, or a loaded transformers model; `folder` and `adapter` are where its
    files are.
    """

    model: str | PreTrainedModel
    label: str
    tokenizer: PreTrainedTokenizerBase | None
    config: JsonObject
    length: int
    folder: Path | None = None
    adapter: Path | None = None
    template_args: JsonObject = field(default_factory=dict)

    def template(self, apply: bool, report: Callable[[str], None] = lambda _: None) -> Callable[..., str] | None:
        """Return what renders a chat as a prompt; None for plain prompts. A server renders chats itself."""
        if not apply:
            return None
        tokenizer = self.tokenizer
        if tokenizer is None:
            from eval.harness.backends.openai import messages_as_json

            return messages_as_json

        def rendered(chat: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return render(tokenizer, chat, add_generation_prompt, self.template_args, report)

        return rendered


def describe(
    model: str | PreTrainedModel,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str | None = None,
) -> EvaluatedModel:
    """Read configuration and tokenizer; check template, length, reasoning token and adapter. Loads no weights.

    Raises:
        UsageError, BadInputError: The model cannot be evaluated with these settings.
    """
    if settings.backend == "openai":
        assert isinstance(model, str)  # resolve_device refuses loaded models
        card = Server(str(settings.base_url)).check(model)
        length_on_card = card.get("max_model_len")
        served_length = length_on_card if type(length_on_card) is int and length_on_card > 0 else None
        check_length(served_length, settings.max_model_len, model)
        length = usable_length(served_length, settings.max_model_len, settings.preset)
        return EvaluatedModel(model, name or model, None, {}, length)
    arguments = settings.model_args
    folder = adapter = None
    if isinstance(model, str):
        reference = references.ModelReference.parse(model)
        label = name or reference.label
        folder = references.small_files(reference.base, arguments.get("revision"))
        adapter = references.adapter_folder(reference.adapter) if reference.adapter else None
        tokenizer = load_tokenizer(folder, label, settings)
    elif tokenizer is None:
        raise UsageError("A loaded model needs its tokenizer: evaluate(model, settings, tokenizer=...).")
    else:
        label = name or getattr(model, "name_or_path", "") or type(model).__name__
    if settings.apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise UsageError(f"The tokenizer of {label} has no chat template; leave out --apply_chat_template.")
    _check_think_token(arguments.get("think_end_token"), tokenizer, label)
    if isinstance(model, str):
        assert folder is not None
        loaded_config = load_config(folder, label, settings)
    else:
        loaded_config = model.config
    config = loaded_config.to_dict()
    model_length = config_length(config)
    check_length(model_length, settings.max_model_len, label)
    if adapter is not None:
        from eval.harness.backends.adapter import check_adapter

        check_adapter(loaded_config, adapter, label, trusts_remote_code=settings.trusts_remote_code)
    template_args = dict(arguments.get("chat_template_args") or {})
    if arguments.get("enable_thinking") is not None:
        template_args["enable_thinking"] = arguments["enable_thinking"]
    length = usable_length(model_length, settings.max_model_len, settings.preset)
    return EvaluatedModel(model, label, tokenizer, config, length, folder, adapter, template_args)


def _check_think_token(token: str | int | None, tokenizer: PreTrainedTokenizerBase, label: str) -> None:
    """Raise UsageError for a reasoning token that the vocabulary lacks."""
    if token is None:
        return
    is_id = isinstance(token, int) or str(token).isdigit()
    if (int(token) >= len(tokenizer)) if is_id else (token not in tokenizer.get_vocab()):
        raise UsageError(f"--model_args think_end_token={token} is not in the vocabulary of {label}.")


def resolve_device(settings: Settings, model: str | PreTrainedModel, process_group: ProcessGroup) -> Settings:
    """Return the settings with backend, device, GPUs and dtype decided.

    Raises:
        UsageError: A device or package is missing, or flags contradict each other.
    """
    if settings.backend == "openai":
        if not isinstance(model, str) or process_group.world_size > 1:
            raise UsageError("--backend openai asks a server for a model by its name, from one process.")
        _check_packages(API_PACKAGES, "--backend openai")
        return replace(settings, device="server", n_gpu=0, dtype=settings.dtype or "auto")
    for argument, package in PACKAGES.items():
        if settings.model_args.get(argument):
            _check_packages((package,), f"--model_args {argument}")
    if isinstance(model, str) and references.ModelReference.parse(model).adapter:
        _check_packages(("peft",), f"--model {model}")
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
        raise UsageError(f"--device {settings.device} is not available: {visible} GPUs are visible.")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps is not available: torch finds no Metal device.")
    gpu = kind not in ("cpu", "mps") and visible > 0 and settings.n_gpu != 0
    if kind == "cuda" and not gpu:
        raise UsageError(f"--device {settings.device} and --n_gpu 0 contradict each other.")
    several = process_group.world_size > 1
    used = "cuda" if gpu else "mps" if kind == "mps" else "cpu"
    settings = replace(settings, dtype=settings.dtype or product_dtype(used))
    backend = "hf" if settings.backend == "auto" else settings.backend
    if backend == "vllm" and (not gpu or not find_spec("vllm")):
        raise UsageError(
            "--backend vllm needs a GPU and the package vllm (`pip install -r requirements-vllm.txt`); --backend hf "
            "needs neither."
        )
    if several and backend == "vllm":
        raise UsageError("Start --backend vllm once, not by a launcher: it uses the GPUs that --n_gpu says.")
    if several and gpu:
        if index or process_group.local_rank >= visible:
            raise UsageError(
                f"{process_group.world_size} ranks need a GPU each: leave out the number in --device, start as many as "
                f"there are GPUs ({visible} visible), or give --device cpu."
            )
        return replace(settings, backend=backend, device=f"cuda:{process_group.local_rank}", n_gpu=1)
    count = 0 if not gpu else 1 if index else settings.n_gpu or visible
    if settings.data_parallel > 1 and (backend != "vllm" or count % settings.data_parallel):
        raise UsageError(
            f"--data_parallel {settings.data_parallel} shares out vllm's GPUs ({count} used); for --backend hf start "
            "the script with `accelerate launch`."
        )
    device = settings.device if index else used
    return replace(settings, backend=backend, device=device, n_gpu=count)


def _check_packages(packages: tuple[str, ...], flag: str) -> None:
    missing = [p for p in packages if not find_spec(p)]
    if missing:
        raise UsageError(f"{flag} needs the package {missing[0]}, which is not installed (`pip install {missing[0]}`).")


def with_weights(subject: EvaluatedModel, settings: Settings) -> EvaluatedModel:
    """Return the model with its weights on disk, for models of the hub."""
    if subject.folder is None:
        return subject
    assert isinstance(subject.model, str)  # loaded models have no folder
    base = references.ModelReference.parse(subject.model).base
    return replace(subject, folder=references.with_weights(base, settings.model_args.get("revision")))


def load_tokenizer(folder: Path, label: str, settings: Settings) -> PreTrainedTokenizerBase:
    """Load a folder's tokenizer, or that of --model_args. Raises BadInputError where there is none to load."""
    from transformers import AutoTokenizer

    arguments = settings.model_args
    options: JsonObject = {}
    if arguments.get("use_fast_tokenizer") is not None:
        options["use_fast"] = arguments["use_fast_tokenizer"]
    if arguments.get("add_bos_token") is not None:
        options["add_bos_token"] = arguments["add_bos_token"]
    try:
        name = arguments.get("tokenizer") or folder
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, trust_remote_code=settings.trusts_remote_code, **options
        )
        return tokenizer
    except Exception as error:  # OSError, ValueError, or whatever a broken file raises in the Rust reader
        raise _not_loaded("tokenizer", label, error) from error


def load_config(folder: Path, label: str, settings: Settings) -> PreTrainedConfig:
    """Load a folder's configuration. Raises BadInputError where there is none to load."""
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=settings.trusts_remote_code)
        return config
    except Exception as error:  # as above
        raise _not_loaded("configuration", label, error) from error


def _not_loaded(part: str, label: str, error: Exception) -> BadInputError:
    if "trust_remote_code" in str(error):
        return BadInputError(
            f"The {part} of {label} needs code of its own; review it, and allow it with --model_args "
            "trust_remote_code=true."
        )
    return BadInputError(f"The {part} of {label} could not be loaded: {first_line(error)}")


def identify(subject: EvaluatedModel, settings: Settings) -> tuple[str, str | None]:
    """Return the digest of the model, and its commit where the hub knows it.

    A server's model goes by name, address and what the server tells of it.
    """
    if subject.folder is None:
        if isinstance(subject.model, str):
            return Server(str(settings.base_url)).identity(subject.model), None
        return identity.loaded_digest(subject.model), None
    weights_digest = identity.model_digest(subject.folder)
    if subject.adapter is not None:
        weights_digest = f"sha256:{digest(weights_digest, identity.adapter_digest(subject.adapter))}"
    return weights_digest, identity.hub_commit(subject.folder)


def scope_of(model_digest: str, settings: Settings, subject: EvaluatedModel) -> str:
    """Return the digest of what a journal's answers hold for besides prompt and generation settings.

    It covers the model, backend, dtype, length, lm-eval's version, that of the corrections, arguments of the model,
    system instruction and chat template.
    """
    template = getattr(subject.tokenizer, "chat_template", None) if settings.apply_chat_template else None
    return digest(
        model_digest, settings.backend, settings.dtype, subject.length, version("lm-eval"), VERSION,
        answer_changing(settings.model_args), settings.system_instruction, settings.apply_chat_template, str(template),
    )  # fmt: skip


def special_tokens_of(subject: EvaluatedModel, settings: Settings) -> Callable[[Benchmark], bool | None]:
    """Return a function of a benchmark: whether prompts get a begin token; None leaves that to the tokenizer."""
    forced = settings.model_args.get("add_bos_token")
    if forced is not None:
        return lambda _: bool(forced)
    if subject.config.get("is_encoder_decoder"):
        return lambda _: None
    model_type = str(subject.config.get("model_type", ""))
    return lambda benchmark: adds_special_tokens(settings.preset, benchmark.name, model_type)


def make_backend(subject: EvaluatedModel, settings: Settings) -> Backend:
    """Load lm-eval's model for the backend.

    Raises:
        EvaluationError: It cannot be loaded, or its weights are not complete.
    """
    make = {"openai": _openai, "vllm": _vllm, "hf": _hf}[settings.backend]
    try:
        return make(subject, settings)
    except ProjectError:
        raise
    except Exception as error:  # loading runs third-party code for every architecture
        raise EvaluationError(f"The model {subject.label} could not be loaded: {first_line(error)}") from error


def _passed_on(settings: Settings) -> JsonObject:
    return {k: v for k, v in settings.model_args.items() if k not in HANDLED}


def _openai(subject: EvaluatedModel, settings: Settings) -> Backend:
    from eval.harness.backends.openai import make

    assert isinstance(subject.model, str)
    return make(subject.model, subject.length, settings)


def _vllm(subject: EvaluatedModel, settings: Settings) -> Backend:
    """vLLM on the GPUs that --n_gpu gives: --data_parallel copies, each tensor-parallel over its share."""
    from eval.harness.backends.answering import LMBackend
    from eval.harness.backends.vllm import VLLMModel

    show_only(settings)
    lm = VLLMModel(
        rows=settings.rows,
        pretrained=str(subject.folder),
        tokenizer=settings.model_args.get("tokenizer"),
        dtype=settings.dtype,
        tensor_parallel_size=(settings.n_gpu or 1) // settings.data_parallel,
        data_parallel_size=settings.data_parallel,
        max_model_len=subject.length,
        seed=settings.seed,
        lora_local_path=str(subject.adapter) if subject.adapter else None,
        trust_remote_code=settings.trusts_remote_code,
        think_end_token=settings.model_args.get("think_end_token"),
        **_passed_on(settings),
    )
    used = {"dtype_used": str(settings.dtype), "batch_size_used": {"requests at a time": lm.batch_size}}
    return LMBackend(lm, lambda: used)


def _hf(subject: EvaluatedModel, settings: Settings) -> Backend:
    """transformers on the CPU, on one GPU, on Metal, or with its layers over several GPUs."""
    from eval.harness.backends.answering import LMBackend
    from eval.harness.backends.hf import HFModel

    arguments: dict[str, object] = {
        "tokenizer": subject.tokenizer, "max_length": subject.length, "softmax_dtype": "float32",
        "think_end_token": settings.model_args.get("think_end_token"), **_passed_on(settings),
    }  # fmt: skip
    if subject.folder is None:
        pretrained: str | PreTrainedModel = subject.model
    else:
        show_only(settings)
        pretrained = str(subject.folder)
        arguments |= {
            "device": settings.device,
            "dtype": settings.dtype,
            "trust_remote_code": settings.trusts_remote_code,
        }
        if settings.device == "cuda" and (settings.n_gpu or 0) > 1:
            arguments["parallelize"] = True
    is_auto = settings.rows is None and settings.device.startswith("cuda")
    lm = HFModel(
        pretrained,
        rows=settings.rows,
        uses_detection=is_auto,
        adapter=str(subject.adapter) if subject.adapter else None,
        label=subject.label,
        batch_size=settings.batch_size if is_auto else "auto",
        **arguments,
    )
    return LMBackend(lm, lm.used, lm.remarks)


def show_only(settings: Settings) -> None:
    """Hide the GPUs beyond --n_gpu from the libraries; works because CUDA has not been started yet."""
    import torch

    if settings.n_gpu and settings.n_gpu < torch.cuda.device_count() and settings.device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[: settings.n_gpu])
