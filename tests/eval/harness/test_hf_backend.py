"""The hf backend: answers equal those of lm-eval's hf model, whatever the batch; memory that does not suffice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.request_types import Request
from tests.helpers.evaluation import ROOT

WORDS = ("assert", "the", "model", "returns", "what", "a", "test", "says", "and", "then", "prints", "its", "name", "or")


def sentence(seed: int, words: int) -> str:
    draw = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=draw).tolist())


def generations(prefix: str = "") -> list[Request]:
    """Prompts of 1 to 40 words, two sets of stop strings, 1 to 30 new tokens."""
    return [
        Request(
            key=f"g{i}",
            task="task",
            item=i,
            number=0,
            kind="generate",
            context=prefix + sentence(i, 1 + 3 * i),
            until=("is", "\n\n") if i % 2 else ("Q",),
            max_tokens=1 + (7 * i) % 30,
        )
        for i in range(14)
    ]


def scores(prefix: str = "") -> list[Request]:
    """Choices of one and of several tokens, contexts that end in spaces, an empty one, and one that is too long."""
    contexts = [prefix + sentence(i, 2 + 3 * i) + " " * (i % 3) for i in range(8)]
    contexts += [prefix or "", prefix + sentence(99, 400)]
    endings = (" A", " B", " return the number", "x")
    return [
        Request(f"s{i}:{n}", "task", i, n, "score", context, ending)
        for i, context in enumerate(contexts)
        for n, ending in enumerate(endings)
    ]


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[Any, Any]:
    """The tiny model in float32 and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32"), AutoTokenizer.from_pretrained(checkpoint)


def backend(loaded: tuple[Any, Any], rows: int | None) -> Any:
    """The hf backend of a loaded model."""
    from eval.harness.backends.answering import LMBackend
    from eval.harness.backends.hf import HFModel

    lm = HFModel(loaded[0], tokenizer=loaded[1], rows=rows, max_length=256, softmax_dtype="float32", batch_size="auto")
    return LMBackend(lm, lm.used)


def answers(loaded: tuple[Any, Any], requests: Sequence[Request], rows: int | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    backend(loaded, rows).answer(requests, lambda r, a, _: found.update({r.key: a}))
    return found


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, a in one.items():
        if isinstance(a, tuple):
            assert other[key][0] == pytest.approx(a[0], abs=1e-4), key
            assert other[key][1] == a[1], key
        else:
            assert other[key] == a, key


def lm_evals(loaded: tuple[Any, Any], requests: Sequence[Request]) -> dict[str, Any]:
    """What lm-eval's own transformers backend answers, one request at a time in a batch of one."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(loaded[0], tokenizer=loaded[1], batch_size=1, max_length=256)
    found: dict[str, Any] = {}
    for kind, method in (("score", lm.loglikelihood), ("generate", lm.generate_until), ("rolling", None)):
        chosen = [r for r in requests if r.kind == kind]
        for r in chosen if method is None else ():
            found[r.key] = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (r.context,), 0)])[0]
        if method is not None and chosen:
            second = [
                r.continuation if kind == "score" else {"until": list(r.until), "max_gen_toks": r.max_tokens}
                for r in chosen
            ]
            instances = [Instance(method.__name__, {}, (r.context, s), 0) for r, s in zip(chosen, second, strict=True)]
            found |= {r.key: a for r, a in zip(chosen, method(instances, disable_tqdm=True), strict=True)}
    return found


def test_answers_are_lm_evals_whatever_the_batch(loaded: tuple[Any, Any]) -> None:
    """In float32, one row at a time, five, or all at once: lm-eval's very texts, and log-likelihoods to 1e-4."""
    requests = [*generations(), *scores()]
    theirs = lm_evals(loaded, requests)
    assert len({a for a in theirs.values() if isinstance(a, str)}) > 5
    for rows in (1, 5, None):
        assert_same(theirs, answers(loaded, requests, rows))


def test_texts_are_scored_in_windows_as_lm_eval_does(loaded: tuple[Any, Any]) -> None:
    """Log-likelihoods of whole texts, shorter and longer than the model's length, are lm-eval's."""
    texts = [Request(f"r{n}", "t", n, 0, "rolling", sentence(n, n)) for n in (1, 5, 900)]
    theirs = lm_evals(loaded, texts)
    ours = answers(loaded, texts, None)
    assert ours == pytest.approx(theirs, abs=2e-2)


@pytest.mark.parametrize("kind", ["mistral", "mamba", "gpt2"])
def test_other_kinds_of_models(loaded: tuple[Any, Any], kind: str) -> None:
    """Sliding windows, recurrent states and learned positions: the same texts in any batch, and lm-eval's."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        MambaConfig,
        MambaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
    )

    torch.manual_seed(1)
    words = len(loaded[1])
    shape: dict[str, Any] = {"vocab_size": words, "hidden_size": 16, "num_hidden_layers": 2, "eos_token_id": 1}
    attention = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    made = {
        "mistral": lambda: MistralForCausalLM(MistralConfig(**shape, **attention, sliding_window=8)),
        "mamba": lambda: MambaForCausalLM(MambaConfig(**shape, state_size=4)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=words, n_positions=256, n_embd=16, n_layer=2, n_head=2)),
    }[kind]()
    model = (made.eval(), loaded[1])
    requests = [*generations()[:8], *scores()[:8]] if kind != "mamba" else scores()[:8]
    theirs = lm_evals(model, requests)
    for rows in (1, 4):
        assert_same(theirs, answers(model, requests, rows))


CROWDED = """
import json, sys
sys.path.insert(0, {root!r})
from tests.eval.harness.test_hf_backend import crowded
print(json.dumps(crowded({folder!r})))
"""


def crowded(folder: str) -> dict[str, Any]:
    """Answers of a wide model, with plenty of memory and with little beyond what it holds; for a process of its own."""
    import resource

    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), AutoTokenizer.from_pretrained(folder)
    requests = [replace(r, key=f"{r.key}/{n}", context=r.context + f" {n}") for n in range(3) for r in generations()]
    requests += [
        replace(r, key=f"{r.key}/{n}", context=r.context + f" {n}") for n in range(4) for r in scores()[::4][:8]
    ]
    outcome: dict[str, Any] = {}
    for name, megabytes in (("free", None), ("tight", 40)):
        engine, found = backend(loaded, 64), {}
        if megabytes is not None:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20),) * 2)
        engine.answer(requests, lambda r, a, _, found=found: found.update({r.key: a}))
        outcome[name] = {"answers": found, "limit": engine.lm._row_limit}
    return outcome


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's account of memory")
def test_memory_that_does_not_suffice_makes_batches_smaller(checkpoint: Path, tmp_path: Path) -> None:
    """Where the system really refuses memory in the middle of a run, batches shrink and the answers stay the same."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.save_pretrained(tmp_path)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=16384, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    code = CROWDED.format(root=str(ROOT), folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    free, tight = outcome["free"], outcome["tight"]
    assert free["limit"] is None
    assert tight["limit"] < 64
    assert tight["answers"].keys() == free["answers"].keys()
    for key, answer in free["answers"].items():
        other = tight["answers"][key]
        assert other == answer if isinstance(answer, str) else other == pytest.approx(answer, abs=1e-4)
