"""Evaluate a checkpoint on the paper's benchmarks or any lm-eval task; results as JSON and a table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from console.cli import Parser, add_output_flags, run, say
from console.files import user_path
from eval.settings import BACKENDS, DEFAULT_LENGTH, DTYPES, Settings
from eval.tasks.prompts import TEMPLATES


def parser() -> Parser:
    """The flags; the original script's keep their spelling and defaults."""
    p = Parser(prog="evaluate_model.py", description=__doc__)
    p.add_argument("--model", required=True, help="checkpoint folder or hub id (organisation/name, with @revision)")
    p.add_argument(
        "--benchmarks", default="mmlu,ifeval,mbpp,humaneval", help='lm-eval tasks by name, comma-separated; "" for none'
    )
    p.add_argument("--math_benchmarks", default="math,gsm8k", help='math and gsm8k as the paper ran them; "" for none')
    p.add_argument("--mmlu_pro", action="store_true", help="also run lm-eval's mmlu_pro")
    p.add_argument("--n_gpu", type=int, help="GPUs to use; 0 for the CPU (default: all visible)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="auto is vllm where installed with a GPU, else hf"
    )
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights while evaluating")
    p.add_argument(
        "--max_model_len", type=int, help=f"tokens of prompt and answer (default: {DEFAULT_LENGTH}, or the model's own)"
    )
    p.add_argument("--apply_chat_template", action="store_true", help="wrap prompts in the tokenizer's chat template")
    p.add_argument("--batch_size", default="auto", help="rows per batch, or auto")
    p.add_argument(
        "--data_dir",
        type=user_path,
        help="folder of benchmark data laid out like the hub; nothing else is then read "
        "(default: Data where that exists, before the hub)",
    )
    p.add_argument("--include_path", type=user_path, help="folder of further lm-eval task files")
    p.add_argument("--math_prompt_type", choices=tuple(TEMPLATES), default="wcot", help="prompt of math and gsm8k")
    p.add_argument("--math_max_tokens", type=int, default=1024, help="new tokens per answer of math and gsm8k")
    p.add_argument("--max_gen_toks", type=int, help="fewer new tokens per answer of lm-eval's generation tasks")
    p.add_argument("--limit", type=int, help="items per benchmark, spread over its subjects (default: all)")
    p.add_argument(
        "--allow_code_execution",
        action="store_true",
        help="let HumanEval and MBPP run what the model writes, contained",
    )
    p.add_argument("--seed", type=int, default=1234, help="of every random choice")
    p.add_argument("--save_path", type=user_path, default=Path("results"), help="folder the results are added to")
    add_output_flags(p)
    return p


def names(value: str) -> tuple[str, ...]:
    """Split a comma-separated flag, dropping empty parts and repetitions."""
    return tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))


def main(argv: Sequence[str]) -> int:
    """Evaluate as the flags say; print the table, and on stderr where the results are."""
    a = parser().parse_args(argv)
    model = str(user_path(a.model)) if a.model.startswith("~") else a.model
    default_data = Path("Data") if Path("Data").is_dir() else None
    settings = Settings(
        benchmarks=names(a.benchmarks),
        math_benchmarks=names(a.math_benchmarks),
        mmlu_pro=a.mmlu_pro,
        backend=a.backend,
        device=a.device,
        n_gpu=a.n_gpu,
        dtype=a.dtype,
        max_model_len=a.max_model_len,
        apply_chat_template=a.apply_chat_template,
        batch_size=a.batch_size,
        data_dir=a.data_dir or default_data,
        offline=a.data_dir is not None,
        include_path=a.include_path,
        math_prompt_type=a.math_prompt_type,
        math_max_tokens=a.math_max_tokens,
        max_gen_toks=a.max_gen_toks,
        limit=a.limit,
        allow_code_execution=a.allow_code_execution,
        seed=a.seed,
        quiet=a.quiet,
        debug=a.debug,
    )
    from eval.harness import evaluate_with_samples, preflight
    from eval.store import save, table

    preflight(model, settings, a.save_path)
    result, samples = evaluate_with_samples(model, settings)
    written = save(result, samples, a.save_path)
    print(table(result))
    say(f"Results: {written}", a.quiet)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
