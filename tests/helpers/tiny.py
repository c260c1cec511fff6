"""Small real checkpoints, made on the spot with transformers: a base, fine-tuned models, tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 320


def make_tokenizer(folder: Path, size: int = VOCABULARY, extra: tuple[str, ...] = ()) -> None:
    """Save a word-level tokenizer with <unk>, <s>, </s>, then w3, w4, ... and `extra` tokens after `size`."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, size)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    if extra:
        fast.add_tokens(list(extra))
    fast.save_pretrained(folder)


def make_llama(
    folder: Path,
    seed: int = 0,
    *,
    vocab: int = VOCABULARY,
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    layers: int = 2,
    hidden: int = 48,
    extra: tuple[str, ...] = (),
    max_shard_size: str = "5GB",
) -> Path:
    """Save a random Llama of `vocab` rows with its tokenizer of (vocab - len(extra)) words and `extra` tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer(folder, vocab - len(extra), extra)
    return folder


def fine_tune(
    base: Path, folder: Path, seed: int, *, std: float = 0.01, extra: tuple[str, ...] = (), vocab: int | None = None
) -> Path:
    """Save a model that stands for a fine-tuned one: the base plus a random task vector, perhaps with more tokens."""
    model = LlamaForCausalLM.from_pretrained(base, dtype="auto")
    dtype = model.dtype
    torch.manual_seed(seed)
    old = model.config.vocab_size
    if extra or vocab:
        model.resize_token_embeddings(vocab or old + len(extra), mean_resizing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter.float() + std * torch.randn(parameter.shape)).to(dtype))
    model.save_pretrained(folder)
    make_tokenizer(folder, old, extra)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a safetensors checkpoint, sharded or not."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def write_texts(file: Path, n: int = 60, words: int = 40, seed: int = 5) -> Path:
    """Write n lines of random words of the tiny tokenizer as .jsonl."""
    generator = torch.Generator().manual_seed(seed)
    with file.open("w") as stream:
        for _ in range(n):
            ids = torch.randint(3, VOCABULARY, (words,), generator=generator).tolist()
            stream.write(json.dumps({"text": " ".join(f"w{i}" for i in ids)}) + "\n")
    return file


def train(base: Path, folder: Path, seed: int = 7, **settings: Any) -> None:
    """Save a LoRA adapter of random weights by PEFT."""
    import peft

    torch.manual_seed(seed)
    chosen = {
        "r": 4,
        "lora_alpha": 8,
        "init_lora_weights": False,
        "target_modules": ["q_proj", "down_proj"],
        **settings,
    }
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        peft.LoraConfig(task_type="CAUSAL_LM", **chosen),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or (parameter.requires_grad and "lora_" not in name):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(str(folder))


def make_gpt2(folder: Path) -> Path:
    """Save a tiny GPT-2, whose Conv1D layers are stored (in, out), with biases that are not zero."""
    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=48, n_layer=2, n_head=4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder
