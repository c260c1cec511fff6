"""Trains the quickstart's tiny Llamas: a character tokenizer, answer-only loss, Muon and AdamW in fp32 on the CPU."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from scripts.quickstart.skills import ALPHABET, Item

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
VOCABULARY = {token: i for i, token in enumerate((PAD, BOS, EOS, *ALPHABET))}
IGNORED = -100  # a label that cross_entropy leaves out
WARM_UP = 15  # steps


@dataclass(frozen=True)
class Shape:
    """The size of a Llama; its vocabulary is the alphabet."""

    hidden: int
    layers: int
    heads: int


@dataclass(frozen=True)
class Schedule:
    """Steps of `batch` items at a rate that rises for WARM_UP steps and falls linearly to 0.

    `muon_rate` is Muon's, for the matrices of the layers; None trains them with AdamW at `rate`, like all else.
    """

    steps: int
    batch: int
    rate: float
    muon_rate: float | None = None


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer: one token a character, <s> before the text; anything outside the alphabet vanishes."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, VOCABULARY[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_model(shape: Shape, seed: int) -> LlamaForCausalLM:
    """A fresh fp32 Llama; the caller's random state is left as it was."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=VOCABULARY[PAD],
        bos_token_id=VOCABULARY[BOS],
        eos_token_id=VOCABULARY[EOS],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: LlamaForCausalLM = LlamaForCausalLM(config).float()
    return model


def as_batch(items: Sequence[Item]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (n, length), padded on the right, and labels (n, length) that keep the answer and the end token only."""
    import torch

    rows, labels = [], []
    for item in items:
        question = [VOCABULARY[BOS], *(VOCABULARY[c] for c in item.prompt)]
        answer = [*(VOCABULARY[c] for c in item.answer), VOCABULARY[EOS]]
        rows.append(question + answer)
        labels.append([IGNORED] * len(question) + answer)
    length = max(map(len, rows))
    ids = [row + [VOCABULARY[PAD]] * (length - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor([row + [IGNORED] * (length - len(row)) for row in labels])


def orthogonalise(stack: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of each matrix of (n, rows, columns) near 1: five Newton-Schulz steps.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", with its coefficients. In fp32:
    torch.optim.Muon works in bf16, which a CPU without bf16 units multiplies very slowly.
    """
    import torch

    x = stack / (stack.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.transpose(1, 2)
    for _ in range(5):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = 3.4445 * x + torch.bmm(-4.7750 * gram + 2.0315 * torch.bmm(gram, gram), x)
    result: torch.Tensor = x if wide else x.transpose(1, 2)
    return result


class Muon:
    """Nesterov momentum 0.95, orthogonalised; matrices of one shape are stepped together, as one batch."""

    def __init__(self, matrices: Iterable[torch.Tensor]) -> None:
        import torch

        self.groups: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for matrix in matrices:
            self.groups.setdefault(tuple(matrix.shape), []).append(matrix)
        self.momenta = {shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()}

    def step(self, rate: float) -> None:
        """Move every matrix by `rate` along its orthogonalised momentum (tall ones further, by sqrt(rows/columns))."""
        import torch

        with torch.no_grad():
            for shape, group in self.groups.items():
                gradients = torch.stack([matrix.grad for matrix in group if matrix.grad is not None])
                momentum = self.momenta[shape].lerp_(gradients, 0.05)
                update = orthogonalise(gradients.lerp(momentum, 0.95)) * max(1.0, shape[0] / shape[1]) ** 0.5
                torch._foreach_add_(group, list(update.unbind()), alpha=-rate)


def train(
    model: LlamaForCausalLM,
    sample: Callable[[random.Random], list[Item]],
    plan: Schedule,
    seed: str,
    bar: tqdm[NoReturn],
) -> None:
    """Train `model` in place on batches from `sample`, by `plan`; `bar` is advanced once a step."""
    import torch

    rng = random.Random(seed)
    matrices = [p for name, p in model.named_parameters() if plan.muon_rate and p.ndim == 2 and ".layers." in name]
    matrix_ids = {id(p) for p in matrices}
    other_parameters = [p for p in model.parameters() if id(p) not in matrix_ids]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(other_parameters, lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.0)
    model.train()
    for step in range(plan.steps):
        factor = min((step + 1) / WARM_UP, (plan.steps - step) / max(1, plan.steps - WARM_UP))
        ids, labels = as_batch(sample(rng))
        # Padding is on the right and attention looks left, so no answer sees it and no mask is needed.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = plan.rate * factor
        adam.step()
        muon.step((plan.muon_rate or 0.0) * factor)
        if step % 10 == 0 or step + 1 == plan.steps:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        bar.update()


def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]) -> float:
    """The percentage of `items` whose greedy answer is exactly right."""
    import torch

    model.eval()
    longest = max(len(item.answer) for item in items) + 1
    batch = tokenizer([item.prompt for item in items], return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.inference_mode():
        tokens = model.generate(**batch, max_new_tokens=longest, do_sample=False)  # type: ignore[misc] # as in eval
        ids = tokens[:, batch["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(ids, skip_special_tokens=True)
    result: float = 100 * sum(got == item.answer for got, item in zip(answers, items, strict=True)) / len(items)
    return result
