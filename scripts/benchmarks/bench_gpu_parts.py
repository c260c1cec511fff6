"""Measurements of the device itself and of calibration for scripts/benchmarks/bench_gpu.py.

Each part returns plain figures for JSON. A time is the median of several runs with the least and the most, each begun
and ended with nothing under way on the device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from aim.capture.hooks import output_head
from aim.capture.whole_model import calibrate, first_batch_size
from common.files.json_values import JsonObject
from scripts.benchmarks.bench_calibration import original

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

HEAD = 128
"""Width of an attention head, from the widths on that have one."""


def settle(device: torch.device) -> None:
    """Return when the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device, runs: int, times: int = 1) -> dict[str, float]:
    """Return seconds of one call of `work`: the median, least and most of `runs` runs of `times` calls, after one."""
    work()
    figures = []
    for _ in range(runs):
        settle(device)
        started = time.perf_counter()
        for _ in range(times):
            work()
        settle(device)
        figures.append((time.perf_counter() - started) / times)
    return {"seconds": statistics.median(figures), "least": min(figures), "most": max(figures), "runs": runs}


def limits(device: torch.device, runs: int) -> JsonObject:
    """Measure what the device can do: bf16 products (flop/s), copies in, out (bytes/s) and within it (read + written).

    The product is the better of two sizes, of random numbers; copies are of page-locked memory, one at a time.
    """
    on_gpu = device.type == "cuda"
    products = {}
    for n in (8192, 16384) if on_gpu else (256,):
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        took = timed(partial(torch.mm, a, b, out=out), device, runs, times=40 if n < 10000 else 8)
        products[n] = {**took, "rate": 2 * n**3 / took["seconds"]}
        del a, b, out
    size = 1 << (30 if on_gpu else 22)
    host = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu).fill_(1)
    destination, second = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    copies = {}
    for name, to, source, counted in (
        ("in", destination, host, size), ("out", host, destination, size), ("within", second, destination, 2 * size),
    ):  # fmt: skip
        took = timed(partial(to.copy_, source, non_blocking=True), device, runs, times=4)
        copies[name] = {**took, "rate": counted / took["seconds"]}
    return {
        "products": products, "matrix_rate": max(entry["rate"] for entry in products.values()), "copies": copies,
    }  # fmt: skip


def random_llama(shape: Mapping[str, int], device: torch.device) -> LlamaForCausalLM:
    """Make a Llama of the shape on the device, in bf16, of random weights; nothing lies on a disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    head = HEAD if shape["hidden"] >= 4096 else 64
    config = LlamaConfig(
        hidden_size=shape["hidden"], intermediate_size=shape["intermediate"], num_hidden_layers=shape["layers"],
        num_attention_heads=shape["hidden"] // head, num_key_value_heads=shape["kv"] // head, head_dim=head,
        vocab_size=shape["vocab"], max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    llama: LlamaForCausalLM = model.to(device).eval()
    return llama


def product_flops(model: LlamaForCausalLM, head: bool) -> int:
    """Return the operations per token of the products with weights (2 for each weight), with or without the head's.

    Attention's own products, norms and the statistics are not counted: the rate is what is left for the weights.
    """
    last = output_head(model)
    modules = [m for m in model.modules() if isinstance(m, nn.Linear) and (head or m is not last)]
    return sum(2 * module.weight.numel() for module in modules)


def calibration(
    shape: Mapping[str, int], device: torch.device, runs: int, blocks: int, block_size: int, plain_blocks: int
) -> JsonObject:
    """Measure calibration of a random Llama beside the original's way on a few blocks of the same model."""
    started = time.perf_counter()
    model = random_llama(shape, device)
    settle(device)
    seconds_to_build = time.perf_counter() - started
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, shape["vocab"], (blocks, block_size), generator=generator)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    bytes_before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    seconds_here = timed(lambda: calibrate(model, ids), device, runs)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    few = ids[:plain_blocks].to(device)
    seconds_original = timed(lambda: original(model, few), device, runs)
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()), "attention": model.config._attn_implementation,
        "seconds_to_make": seconds_to_build, "weights_bytes": bytes_before, "peak_bytes": peak,
        "block_size": block_size,
        "batch": first_batch_size(device, block_size), "ways": {},
    }  # fmt: skip
    for name, took, count, head in (
        ("ours", seconds_here, blocks, False),
        ("one block at a time", seconds_original, plain_blocks, True),
    ):
        tokens = count * block_size
        speed = tokens / took["seconds"]
        rate = product_flops(model, head) * speed
        figures["ways"][name] = {**took, "tokens": tokens, "tokens_per_second": speed, "rate": rate}
    return figures
