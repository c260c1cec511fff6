"""What the evaluation's tests run on: a real Llama of 20k parameters, and a few items in the benchmarks' formats."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from eval.data.task_index import stock_folder

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("AIM_DATA_DIR", ROOT.parent / "shared" / "data"))
SUBJECTS = [p.stem.removeprefix("mmlu_") for p in sorted((stock_folder() / "mmlu" / "default").glob("mmlu_*.yaml"))]
QUESTIONS = [("Tom has 3 apples and eats 1. How many are left?", "3-1=2\n#### 2"), ("2+2?", "It is 4.\n#### 4")] * 2
PRO_SUBJECTS = [p.stem.removeprefix("mmlu_pro_") for p in sorted((stock_folder() / "mmlu_pro").glob("mmlu_pro_*.yaml"))]


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_data(folder: Path) -> Path:
    """A mirror with a few items of our own in the formats of GSM8K, MATH, MBPP, MMLU, MMLU-Pro and IFEval."""
    hub = folder / "hub"
    rows = [{"question": q, "answer": a} for q, a in QUESTIONS]
    write_jsonl(hub / "openai/gsm8k/main/test.jsonl", rows)
    write_jsonl(hub / "openai/gsm8k/main/train.jsonl", rows * 2)
    _mmlu(hub / "cais/mmlu")
    _mmlu_pro(hub / "TIGER-Lab/MMLU-Pro/default")
    math_row = {"problem": "1+1?", "level": "Level 1", "type": "Algebra", "solution": r"$1+1=\boxed{2}$."}
    for file in (ROOT / "eval/tasks/math").glob("math_*.yaml"):
        subject = hub / "EleutherAI/hendrycks_math" / file.stem.removeprefix("math_")
        write_jsonl(subject / "test.jsonl", [math_row] * 3)
        write_jsonl(subject / "train.jsonl", [math_row])
    tests = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 1) == 0"]
    mbpp = {"task_id": 11, "text": "Add.", "code": "def add(a, b):\n    return a + b", "test_list": tests}
    mbpp |= {"test_setup_code": "", "challenge_test_list": []}
    write_jsonl(hub / "google-research-datasets/mbpp/full/test.jsonl", [mbpp, {**mbpp, "task_id": 12}])
    kwargs = {"num_words": None, "relation": None, "keywords": None}
    follow = {"prompt": "Say it without commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [kwargs]}
    write_jsonl(hub / "google/IFEval/train.jsonl", [{"key": 1, **follow}, {"key": 2, **follow}])
    return folder


def _mmlu(folder: Path) -> None:
    for i, subject in enumerate(SUBJECTS):
        row = {"question": f"Which is number {i % 4}?", "subject": subject, "choices": list("WXYZ"), "answer": i % 4}
        write_jsonl(folder / subject / "test.jsonl", [row, row])
        write_jsonl(folder / subject / "dev.jsonl", [{**row, "question": f"Example {n}?"} for n in range(5)])
    parts = "".join(
        f"- config_name: {s}\n  data_files:\n  - split: test\n    path: {s}/test.jsonl\n"
        f"  - split: dev\n    path: {s}/dev.jsonl\n"
        for s in SUBJECTS
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{parts}---\n", encoding="utf-8")


def _mmlu_pro(folder: Path) -> None:
    rows = [
        {
            "question_id": i,
            "question": f"What is {i} plus 1?",
            "options": [str(i + 1), str(i), "none"],
            "answer": "A",
            "answer_index": 0,
            "cot_content": f"A: Let's think step by step. {i} plus 1 is {i + 1}. The answer is (A).",
            "category": subject.replace("_", " "),
            "src": "made",
        }
        for i, subject in enumerate(PRO_SUBJECTS)
    ]
    write_jsonl(folder / "test.jsonl", rows)
    write_jsonl(folder / "validation.jsonl", rows * 5)


def make_checkpoint(folder: Path, positions: int = 512) -> Path:
    """A random Llama with a byte-level BPE tokenizer trained here."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator([(ROOT / "tests/eval/harness/test_harness.py").read_text(encoding="utf-8")], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        **shape, vocab_size=len(tokenizer), max_position_embeddings=positions, bos_token_id=0, eos_token_id=1
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
