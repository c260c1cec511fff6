"""Tiny real checkpoints of many architectures, made on the spot with transformers, in each form that people have.

Sizes are traps on purpose: 64 is the number of tokens, of positions and of some inner channels, so that nothing can be
told from a tensor's number of rows alone.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.helpers.tiny import weights

VOCAB = 64
IMAGE_TOKEN = VOCAB - 1
TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {**TOWER, "vocab_size": VOCAB}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER = {**SIZES, **ENDS, "intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": VOCAB}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
MROPE = {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]}
QWEN_VISION = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
VISION = {**TOWER, "intermediate_size": 24, "image_size": 16, "patch_size": 8}


@dataclass(frozen=True)
class Architecture:
    """How to make a model: transformers' names of its class and of its config's class, and the config's values.

    sees: whether it takes an image (4 tokens' worth) besides text.
    """

    model: str
    config: str
    values: Mapping[str, Any]
    sees: bool = False

    def build(self, seed: int = 0) -> PreTrainedModel:
        """Return the model with random float32 weights, none of them left at zero or one."""
        torch.manual_seed(seed)
        config = getattr(transformers, self.config)(**copy.deepcopy(dict(self.values)))
        model = getattr(transformers, self.model)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model.eval()


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig", DECODER),
    "mistral": Architecture("MistralForCausalLM", "MistralConfig", DECODER),
    "qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Config", {**DECODER, "tie_word_embeddings": True}),
    "qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 8}),
    "gemma2": Architecture("Gemma2ForCausalLM", "Gemma2Config", {**DECODER, "head_dim": 8}),
    "gemma3": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", {**DECODER, "head_dim": 8}),
    "gemma3_vision": Architecture(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {**DECODER, "head_dim": 8},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE_TOKEN,
        },
        sees=True,
    ),
    "phi3": Architecture("Phi3ForCausalLM", "Phi3Config", DECODER),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {**ENDS, "vocab_size": VOCAB, "n_positions": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2},
    ),
    "gpt_neox": Architecture(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**SIZES, **ENDS, "intermediate_size": VOCAB, "max_position_embeddings": VOCAB, "tie_word_embeddings": False},
    ),
    "mamba": Architecture(
        "MambaForCausalLM",
        "MambaConfig",
        {**ENDS, "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    ),
    "mixtral": Architecture("MixtralForCausalLM", "MixtralConfig", {**DECODER, **EXPERTS, "num_local_experts": 3}),
    "qwen2_moe": Architecture(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**DECODER, **EXPERTS, "num_experts": 3, "shared_expert_intermediate_size": VOCAB},
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**DECODER, **EXPERTS, "num_experts": 3, "head_dim": 8}
    ),
    "bert": Architecture(
        "BertForMaskedLM", "BertConfig", {**SIZES, "intermediate_size": VOCAB, "max_position_embeddings": VOCAB}
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCAB,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": VOCAB,
            "num_layers": 2,
            "num_heads": 2,
            "relative_attention_num_buckets": 8,
            "decoder_start_token_id": 0,
        },
    ),
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **DECODER},
            "vision_config": {"model_type": "clip_vision_model", **VISION, "projection_dim": 16},
            "image_token_index": IMAGE_TOKEN,
            "tie_word_embeddings": False,
        },
        sees=True,
    ),
    "qwen2_vl": Architecture(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": {**DECODER, "rope_scaling": MROPE},
            "vision_config": QWEN_VISION,
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": VOCAB - 2,
            "vision_start_token_id": VOCAB - 3,
            "vision_end_token_id": VOCAB - 4,
            "tie_word_embeddings": False,
        },
    ),
    "falcon": Architecture(
        "FalconForCausalLM", "FalconConfig", {**SIZES, **ENDS, "multi_query": True, "max_position_embeddings": VOCAB}
    ),
    "bloom": Architecture(
        "BloomForCausalLM", "BloomConfig", {**ENDS, "vocab_size": VOCAB, "hidden_size": 16, "n_layer": 2, "n_head": 2}
    ),
    "opt": Architecture(
        "OPTForCausalLM",
        "OPTConfig",
        {**SIZES, **ENDS, "ffn_dim": VOCAB, "max_position_embeddings": VOCAB - 2, "word_embed_proj_dim": 16},
    ),
}


RENAMED = ("gemma3_vision", "llava", "qwen2_vl", "mixtral", "qwen2_moe", "qwen3_moe")
"""Those whose modules transformers 5 names otherwise than the checkpoints on the hub."""
TIED = ("qwen2", "gemma2", "gemma3", "gemma3_vision", "gpt2", "mamba", "bert", "t5", "falcon", "bloom", "opt")
"""Those whose output head is their input embedding."""


def inputs_of(architecture: Architecture) -> dict[str, Tensor]:
    """Return what a forward pass of the model takes: two sequences of tokens, images where it sees, T5's targets."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(3, VOCAB - 8, (2, 10), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if architecture.model.startswith("T5"):
        inputs["decoder_input_ids"] = torch.randint(3, VOCAB, (2, 6), generator=generator)
    if architecture.sees:
        ids[:, 2:6] = IMAGE_TOKEN
        inputs["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
    return inputs


@torch.no_grad()
def logits(model: PreTrainedModel, architecture: Architecture) -> Tensor:
    """Return the model's float32 logits on `inputs_of`."""
    return model.float().eval()(**inputs_of(architecture)).logits


def fine_tuned(model: PreTrainedModel, seed: int, std: float = 0.01) -> PreTrainedModel:
    """Return the model plus a random task vector in every parameter; what is tied stays tied."""
    tuned = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_((std * torch.randn(parameter.shape)).to(parameter.dtype))
    return tuned


def forms_of(name: str) -> list[str]:
    """Return the forms in which checkpoints of the architecture exist.

    `hub`: the names that checkpoints on the hub have, every expert a tensor of its own. `own`: those of transformers
    5's modules, experts fused in one tensor (transformers 4 has no such). `old`: as .bin files were saved, each tied
    tensor under all its names, beside the buffers that transformers computes today.
    """
    own = name in RENAMED and "save_original_format" in inspect.signature(PreTrainedModel.save_pretrained).parameters
    old = name in (*TIED, "llama", "gpt_neox") and name not in RENAMED
    return ["hub", *(["own"] if own else []), *(["old"] if old else [])]


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Return {name of a tied tensor that is not saved: the name that it is saved by}."""
    first: dict[int, str] = {}
    tied = {}
    keys = sorted(model.state_dict(keep_vars=True).items(), key=lambda item: item[0] in _tied_keys(model))
    for name, tensor in keys:
        if first.setdefault(id(tensor), name) != name:
            tied[name] = first[id(tensor)]
    return tied


def _tied_keys(model: PreTrainedModel) -> Sequence[str]:
    return list(getattr(model, "_tied_weights_keys", None) or [])


def save(model: PreTrainedModel, folder: Path, form: str = "hub") -> Path:
    """Save the model in one of `forms_of`; returns the folder."""
    with quiet():
        model.save_pretrained(folder, **({"save_original_format": False} if form == "own" else {}))
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [type(model).__name__]  # transformers 4.57 forgets it for some
    if form == "old":
        if config.get("tie_word_embeddings") == type(model.config)().tie_word_embeddings:
            del config["tie_word_embeddings"]  # transformers 4 left out what is its class's default
        stored = weights(folder)
        copies = {name: stored[saved].clone() for name, saved in tied_names(model).items()}
        whole = {**stored, **copies, **computed_buffers(model)}
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def computed_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return what old checkpoints stored of what transformers computes: positions, causal masks, rotary frequencies."""
    kind, layers = model.config.model_type, range(model.config.num_hidden_layers)
    mask, frequencies = torch.ones(1, 1, VOCAB, VOCAB).tril(), 1e4 ** -torch.linspace(0, 1, 4)
    per_layer = {
        "gpt2": {"transformer.h.{}.attn.bias": mask},
        "llama": {"model.layers.{}.self_attn.rotary_emb.inv_freq": frequencies},
        "gpt_neox": {
            "gpt_neox.layers.{}.attention.bias": mask.bool(),
            "gpt_neox.layers.{}.attention.masked_bias": torch.tensor(-1e9),
            "gpt_neox.layers.{}.attention.rotary_emb.inv_freq": frequencies,
        },
    }.get(kind, {})
    found = {name.format(i): tensor.clone() for i in layers for name, tensor in per_layer.items()}
    return found | ({"bert.embeddings.position_ids": torch.arange(VOCAB)[None]} if kind == "bert" else {})


def load(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a folder with the class that its config names; returns the model and transformers' loading info."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    with quiet():
        model, info = getattr(transformers, name).from_pretrained(folder, dtype="auto", output_loading_info=True)
    return model, info


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no remarks of transformers in the tests' output."""
    logging = transformers.utils.logging
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def make_word_tokenizer(folder: Path, order: Sequence[int], extra: Sequence[str] = ()) -> None:
    """Save a word-level tokenizer in which the row of word number i is order[i]; `extra` tokens come after."""
    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, len(order)))]
    vocab = {name: int(row) for name, row in zip(names, order, strict=True)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.add_tokens(list(extra))
    fast.save_pretrained(folder)


@torch.no_grad()
def renumber(model: PreTrainedModel, order: Sequence[int]) -> PreTrainedModel:
    """Return the model with the row of token i moved to order[i] in embeddings, output head and its bias."""
    moved = copy.deepcopy(model)
    tables = {id(p): p for p in _vocabulary_parameters(moved)}
    for parameter in tables.values():
        parameter[torch.tensor(order)] = parameter.clone()
    return moved


def _vocabulary_parameters(model: PreTrainedModel) -> list[Tensor]:
    head = model.get_output_embeddings()
    found = [model.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)]
    return [parameter for parameter in found if parameter is not None]
