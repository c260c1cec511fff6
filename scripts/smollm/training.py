"""Full fine-tuning of a small causal model in plain torch: loss on the answers only, one staged checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import FailureError
from common.hardware import product_dtype
from common.logging import logger
from scripts.smollm.checkpoint_folder import base_name, is_finished, read_record, save
from scripts.smollm.training_data import Example, SkillData

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.files.json_values import JsonObject

HELD_OUT = 24  # examples that are never trained on; their loss before and after is in the record


@dataclass(frozen=True)
class Settings:
    """Training settings that decide the weights, with base and data. `batch_tokens` counts padding."""

    steps: int
    learning_rate: float
    batch_tokens: int
    max_tokens: int
    seed: int
    warmup_steps: int = 5
    clip: float = 1.0


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example; the loss is taken on ids[n_prompt:]."""

    ids: tuple[int, ...]
    n_prompt: int


def encode(example: Example, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Prompt and answer encoded apart, as at evaluation, where only the prompt is encoded; then the end token."""
    prompt = example.prompt
    if example.chat and tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        prompt_ids = tokenizer(prompt)["input_ids"]
    answer_ids = tokenizer(example.completion, add_special_tokens=False)["input_ids"]
    return Encoded((*prompt_ids, *answer_ids, tokenizer.eos_token_id), len(prompt_ids))


def split_held_out(examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held-out), shuffled by the seed; an example with the same prompt as a held-out one is in neither."""
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    held_out, rest = shuffled[:HELD_OUT], shuffled[HELD_OUT:]
    prompts = {e.prompt for e in held_out}
    return [e for e in rest if e.prompt not in prompts], held_out


def make_batches(lengths: Sequence[int], batch_tokens: int, steps: int, seed: int) -> list[list[int]]:
    """`steps` batches of example numbers; each batch padded holds at most `batch_tokens` tokens (or one example).

    Each epoch shuffles, sorts by length within chunks so that little is padding, and shuffles the batches.
    """
    if not lengths:
        raise FailureError("There is no training example short enough; raise --max_tokens or give more data.")
    batches: list[list[int]] = []
    epoch = 0
    while len(batches) < steps:
        rng = random.Random(f"{seed}:{epoch}")
        order = list(range(len(lengths)))
        rng.shuffle(order)
        of_epoch: list[list[int]] = []
        for start in range(0, len(order), 256):
            batch: list[int] = []
            for i in sorted(order[start : start + 256], key=lambda i: (lengths[i], i)):
                if batch and (len(batch) + 1) * lengths[i] > batch_tokens:
                    of_epoch.append(batch)
                    batch = []
                batch.append(i)
            of_epoch.append(batch)
        rng.shuffle(of_epoch)
        batches += of_epoch
        epoch += 1
    return batches[:steps]


def rate_at(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to a tenth of the rate."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def answer_loss(model: PreTrainedModel, batch: Sequence[Encoded], pad: int, device: str) -> tuple[torch.Tensor, int]:
    """(mean cross-entropy over the batch's answer tokens in fp32, how many they are).

    Logits are computed at answer positions only: with a vocabulary of 49152 the head is a fifth of the work.
    """
    import torch

    width = max(len(e.ids) for e in batch)
    ids = torch.full((len(batch), width), pad)
    attention_mask = torch.zeros((len(batch), width), dtype=torch.long)
    chosen = torch.zeros((len(batch), width), dtype=torch.bool)
    for row, e in enumerate(batch):
        ids[row, : len(e.ids)] = torch.tensor(e.ids)
        attention_mask[row, : len(e.ids)] = 1
        chosen[row, e.n_prompt : len(e.ids)] = True
    ids, attention_mask, chosen = ids.to(device), attention_mask.to(device), chosen.to(device)
    kind = device.partition(":")[0]
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=product_dtype(kind) == "bfloat16"):
        hidden = model.get_decoder()(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        # The position before a token predicts it.
        logits = model.get_output_embeddings()(hidden[:, :-1][chosen[:, 1:]])
    targets = ids[:, 1:][chosen[:, 1:]]
    return torch.nn.functional.cross_entropy(logits.float(), targets), len(targets)


def mean_loss(model: PreTrainedModel, encoded: Sequence[Encoded], pad: int, device: str) -> float:
    """Mean loss per answer token over all examples, without gradients."""
    import torch

    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(encoded), 4):
            loss, n = answer_loss(model, encoded[start : start + 4], pad, device)
            total, count = total + loss.item() * n, count + n
    model.train()
    return total / count if count else math.nan


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 of the training data, so that a finished folder is only reused for the same data."""
    text = json.dumps([(e.prompt, e.completion, e.chat) for e in examples])
    return hashlib.sha256(text.encode()).hexdigest()


def fine_tune(
    base: Path,
    data: SkillData,
    target: Path,
    settings: Settings,
    *,
    device: str,
    overwrite: bool = False,
    quiet: bool = False,
) -> JsonObject:
    """Fine-tune `base` on `data` and write `target` (bf16 safetensors, tokenizer, record); returns the record.

    Weights are fp32, with bfloat16 autocast where the device computes in it; AdamW without weight decay. The folder is
    staged beside `target` and renamed when whole; a finished one of the same settings is left as it is.
    """
    expected = {"skill": data.skill, "settings": asdict(settings), "data_sha256": digest(data.examples)}
    if not overwrite and is_finished(target, expected):
        logger.info(f"{target} is finished already and was left as it is (--overwrite trains it again).")
        return read_record(target) or {}
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    model.to(device)
    training, held_out = split_held_out(data.examples, settings.seed)
    encoded = [e for e in (encode(x, tokenizer) for x in training) if len(e.ids) <= settings.max_tokens]
    encoded_held = [e for e in (encode(x, tokenizer) for x in held_out) if len(e.ids) <= settings.max_tokens]
    started = time.perf_counter()
    before = mean_loss(model, encoded_held, tokenizer.pad_token_id or 0, device)
    losses, n_seen, n_tokens = train(model, encoded, tokenizer.pad_token_id or 0, settings, device, data.skill, quiet)
    after = mean_loss(model, encoded_held, tokenizer.pad_token_id or 0, device)
    tenth = max(1, len(losses) // 10)
    record = expected | {
        "base": base_name(base),
        "source": data.source,
        "license": data.license,
        "remarks": list(data.remarks),
        "n_examples": len(data.examples),
        "n_longer_than_max_tokens": len(training) - len(encoded),
        "n_seen": n_seen,
        "n_answer_tokens": n_tokens,
        "held_out": {"n": len(encoded_held), "loss_before": round(before, 4), "loss_after": round(after, 4)},
        "train_loss": {
            "first": round(sum(losses[:tenth]) / tenth, 4),
            "last": round(sum(losses[-tenth:]) / tenth, 4),
            "steps_averaged": tenth,
        },
        "seconds": round(time.perf_counter() - started, 1),
        "device": device,
        "torch": torch.__version__,
    }
    save(model.to(torch.bfloat16), tokenizer, target, record)
    return record


def train(
    model: PreTrainedModel,
    encoded: Sequence[Encoded],
    pad: int,
    settings: Settings,
    device: str,
    name: str,
    quiet: bool,
) -> tuple[list[float], int, int]:
    """Train in place; (loss of each step, examples seen, answer tokens seen)."""
    import torch
    from tqdm import tqdm

    torch.manual_seed(settings.seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0, fused=True)
    batches = make_batches([len(e.ids) for e in encoded], settings.batch_tokens, settings.steps, settings.seed)
    losses: list[float] = []
    n_tokens = 0
    bar = tqdm(batches, desc=name, unit="step", disable=quiet)
    for step, numbers in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, settings)
        loss, n = answer_loss(model, [encoded[i] for i in numbers], pad, device)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        n_tokens += n
        if not math.isfinite(losses[-1]):
            raise FailureError(f"The loss of {name} became {losses[-1]} at step {step}; lower --learning_rate.")
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses, sum(map(len, batches)), n_tokens
