"""`--model_args` and `--gen_kwargs`: parsing, known keys by backend, refusals. No heavy import."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from common.errors import UsageError, nearest

if TYPE_CHECKING:
    from common.files.json_values import JsonObject

CHAT = ("think_end_token", "enable_thinking", "chat_template_args")
TOKENIZER = ("tokenizer", "trust_remote_code", "revision", "add_bos_token")
KNOWN: Mapping[str, tuple[str, ...]] = {
    "hf": (
        *CHAT, *TOKENIZER, "subfolder", "use_fast_tokenizer", "prefix_token_id", "logits_cache", "softmax_dtype",
        "mixed_precision_dtype", "max_batch_size", "parallelize", "max_memory_per_gpu", "max_cpu_memory",
        "offload_folder", "autogptq", "gptqmodel", "attn_implementation", "experts_implementation", "device_map",
        "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant",
    ),
    "vllm": (
        *CHAT, *TOKENIZER, "tokenizer_mode", "tokenizer_revision", "prefix_token_id", "quantization", "max_batch_size",
        "max_lora_rank", "truncation_side", "gpu_memory_utilization", "enforce_eager", "max_num_seqs",
        "max_num_batched_tokens", "kv_cache_dtype", "enable_prefix_caching", "cpu_offload_gb", "block_size",
        "enable_expert_parallel", "distributed_executor_backend", "load_format", "hf_overrides",
    ),
    "openai": (
        "think_end_token", "tokenizer", "tokenizer_backend", "tokenized_requests", "trust_remote_code", "revision",
        "use_fast_tokenizer", "custom_prefix_token_id", "add_bos_token", "num_concurrent", "max_retries", "timeout",
        "verify_certificate", "ca_cert_path", "eos_string", "header",
    ),
}  # fmt: skip
"""Keys of lm-eval's models, and of what they pass on to transformers and vLLM."""
FLAGS = {
    "pretrained": "--model", "model": "--model", "device": "--device", "dtype": "--dtype", "batch_size": "--batch_size",
    "max_length": "--max_model_len", "max_model_len": "--max_model_len", "peft": "--model BASE+ADAPTER",
    "lora_local_path": "--model BASE+ADAPTER", "base_url": "--base_url", "backend": "--backend", "seed": "--seed",
    "tensor_parallel_size": "--n_gpu", "data_parallel_size": "--data_parallel", "max_gen_toks": "--max_gen_toks",
}  # fmt: skip
PERFORMANCE = (
    "max_batch_size", "parallelize", "max_memory_per_gpu", "max_cpu_memory", "offload_folder", "device_map",
    "logits_cache", "gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "cpu_offload_gb", "block_size",
    "num_concurrent", "max_retries", "timeout", "verify_certificate", "ca_cert_path", "header", "enforce_eager",
    "distributed_executor_backend",
)  # fmt: skip
"""Keys that change answers by rounding at most; the journal's keys leave them out."""
GENERATION = (
    "until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty",
    "no_repeat_ngram_size", "num_beams", "length_penalty", "early_stopping", "suppress_tokens", "presence_penalty",
    "frequency_penalty", "min_new_tokens", "min_tokens",
)  # fmt: skip
SAMPLING = ("top_k", "top_p", "min_p", "typical_p")


def parse(flag: str, text: str | None) -> JsonObject:
    """Read `key=value,...` or a JSON object, as lm-eval does.

    Raises:
        UsageError: The text is neither.
    """
    if not text:
        return {}
    if text.lstrip().startswith("{"):
        try:
            data = json.loads(text)
        except ValueError as error:
            raise UsageError(f"--{flag} is not JSON ({error}).") from error
        return dict(data)
    values: JsonObject = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not part.strip():
            continue
        if not equals or not key.strip():
            raise UsageError(f"--{flag} {part!r}: expected key=value, separated by commas, or a JSON object.")
        values[key.strip()] = _value(value.strip())
    return values


def _value(text: str) -> str | float | bool | None:
    constant = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if constant is not text:
        return constant
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def check_model_args(arguments: JsonObject, backend: str) -> None:
    """Raise UsageError for a key that the backend does not know, naming the nearest one."""
    known_keys = KNOWN[backend]
    for key in arguments:
        if key in FLAGS:
            raise UsageError(f"--model_args {key}: give it as {FLAGS[key]}.")
        if key not in known_keys:
            raise UsageError(f"--model_args {key} is not known to the {backend} backend.{nearest(key, known_keys)}")
    if arguments.get("enable_thinking") and arguments.get("think_end_token") is None:
        raise UsageError("--model_args enable_thinking=true needs think_end_token=TOKEN, which ends the reasoning.")


def check_gen_kwargs(arguments: JsonObject) -> None:
    """Raise UsageError for a generation setting that is not known or contradicts another."""
    for key in arguments:
        if key not in GENERATION:
            raise UsageError(f"--gen_kwargs {key} is not a generation setting.{nearest(key, GENERATION)}")
    temperature = arguments.get("temperature")
    if temperature is not None and (isinstance(temperature, str) or temperature < 0):
        raise UsageError(f"--gen_kwargs temperature must be 0 (greedy) or more, not {temperature}.")
    if int(arguments.get("num_beams") or 1) > 1 and (temperature or arguments.get("do_sample")):
        raise UsageError("--gen_kwargs num_beams and sampling exclude each other; give one.")


def answer_changing(arguments: JsonObject) -> JsonObject:
    """Return the arguments that answers depend on beyond rounding."""
    return {k: v for k, v in sorted(arguments.items()) if k not in PERFORMANCE}
