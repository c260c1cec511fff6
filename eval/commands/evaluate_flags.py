"""The flags of evaluate_model.py, and the settings they mean. No heavy import."""

from __future__ import annotations

import argparse
from pathlib import Path

from common.cli import Parser, add_output_flags
from common.errors import UsageError
from common.files.paths import user_path
from eval.benchmarks import PRESETS
from eval.model_args import parse
from eval.settings import BACKENDS, DTYPE_OF, DTYPES, PAPER_LENGTH, SANDBOXES, Settings, parse_numbers
from eval.tasks.prompts import TEMPLATES


def parser() -> Parser:
    """Return the parser; the original script's flags keep their spelling and defaults."""
    p = Parser(
        prog="evaluate_model.py",
        usage="evaluate_model.py --model MODEL [flags]",
        description="Evaluate checkpoints on benchmarks; results are printed as a table and kept as JSON.",
    )
    _add_model_flags(p)
    _add_answer_flags(p)
    _add_backend_flags(p)
    add_output_flags(p)
    return p


def _add_model_flags(p: Parser) -> None:
    g = p.add_argument_group("models and benchmarks")
    g.add_argument(
        "--model",
        help="checkpoint folder or hub id (organization/name, with @revision); several separated by commas (required)",
    )
    g.add_argument(
        "--preset",
        choices=PRESETS,
        default="paper",
        help="tasks as the paper ran them, or lm-eval's stock GSM8K and MATH, the checkpoint's dtype and full length",
    )
    g.add_argument(
        "--benchmarks", default="mmlu,ifeval,mbpp,humaneval", help='lm-eval tasks by name, comma-separated; "" for none'
    )
    g.add_argument("--math_benchmarks", default="math,gsm8k", help='math and gsm8k of the preset; "" for none')
    g.add_argument("--mmlu_pro", action="store_true", help="also run lm-eval's mmlu_pro")
    g.add_argument("--include_path", type=user_path, help="folder of further lm-eval task files")
    g.add_argument(
        "--data_dir",
        type=user_path,
        help="folder of benchmark data laid out like the hub; nothing else is then read "
        "(default: Data where that exists, before the hub)",
    )
    g.add_argument("--limit", help="items per benchmark, spread over its subjects, or ifeval=100,... (default: all)")
    g.add_argument(
        "--rescore",
        nargs="?",
        type=user_path,
        const=Path(),
        metavar="RESULTS",
        help="grade the answers of a results file again, without a model (default: --model's newest)",
    )


def _add_answer_flags(p: Parser) -> None:
    g = p.add_argument_group("prompts and answers")
    g.add_argument(
        "--num_fewshot",
        help="examples in prompts: a number for tasks that fix none (MMLU), or mmlu=5,... (default: the task's)",
    )
    g.add_argument("--apply_chat_template", action="store_true", help="wrap prompts in the tokenizer's chat template")
    g.add_argument(
        "--math_prompt_type", choices=tuple(TEMPLATES), help="prompt of the paper's math and gsm8k (default: wcot)"
    )
    g.add_argument("--math_max_tokens", type=int, default=1024, help="new tokens per answer of the paper's maths")
    g.add_argument(
        "--max_gen_toks",
        type=int,
        help="fewer new tokens per answer of lm-eval's generation tasks (default: the task's)",
    )
    g.add_argument("--n_samples", type=int, default=1, help="answers per item, for pass@k; needs --temperature")
    g.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0 is greedy")
    g.add_argument("--gen_kwargs", help="generation settings of every task: top_p=0.9,repetition_penalty=1.1,...")
    g.add_argument("--system_instruction", help="system message, or text before each prompt without a chat template")
    g.add_argument("--seed", type=int, default=1234, help="seed of every random choice")
    g = p.add_argument_group("code execution")
    g.add_argument(
        "--allow_code_execution",
        action="store_true",
        help="run the code that the model writes for HumanEval and MBPP, in a sandbox",
    )
    weak = "weak: run it with resource limits alone where the machine gives no sandbox (auto: refuse)"
    g.add_argument("--sandbox", choices=SANDBOXES, default="auto", help=weak)


def _add_backend_flags(p: Parser) -> None:
    g = p.add_argument_group("backend and device")
    g.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="lm-eval's model: hf (auto too), vllm, or a server"
    )
    g.add_argument(
        "--model_args", help="arguments of lm-eval's model: trust_remote_code=true,attn_implementation=eager,..."
    )
    g.add_argument(
        "--base_url", help="URL of an OpenAI-compatible server, for --backend openai: http://localhost:8000/v1"
    )
    g.add_argument("--n_gpu", type=int, help="GPUs to use; 0 for the CPU (default: all visible)")
    g.add_argument("--data_parallel", type=int, default=1, help="copies of the model that share vllm's GPUs")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    dtype = (
        "dtype of the weights (default: bfloat16, float32 on a CPU that emulates it; lm-eval: auto, the checkpoint's)"
    )
    g.add_argument("--dtype", choices=DTYPES, help=dtype)
    length = f"largest number of tokens of prompt and answer (default: the model's own, at most {PAPER_LENGTH})"
    g.add_argument("--max_model_len", type=int, help=length)
    g.add_argument(
        "--batch_size", default="auto", help="rows per batch, or requests at a time; auto or auto:N: as many as fit"
    )
    g = p.add_argument_group("output")
    g.add_argument(
        "--save_path", type=user_path, default=Path("results"), help="folder that results and answers are added to"
    )
    g.add_argument(
        "--no_cache", action="store_true", help="ask again for the answers that an earlier run left in --save_path"
    )
    g.add_argument("--answers", action="store_true", help="also print length, cut and empty answers by benchmark")


def names(value: str) -> tuple[str, ...]:
    """Split a comma-separated flag, dropping empty parts and repetitions."""
    return tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))


def models_of(a: argparse.Namespace) -> list[str]:
    """The models asked for, paths with ~ expanded. Raises UsageError where there are none."""
    models = [str(user_path(m)) if m.startswith("~") else m for m in names(a.model or "")]
    if not models:
        raise UsageError("--model FOLDER_OR_ID is needed (`python evaluate_model.py --help` lists the flags).")
    return models


def settings_of(a: argparse.Namespace) -> Settings:
    """The settings that flags mean. Raises UsageError for flags that contradict the preset."""
    if a.preset != "paper" and a.math_prompt_type:
        raise UsageError("--math_prompt_type is of the paper's preset; lm-eval's tasks have their own prompts.")
    default_data = Path("Data") if Path("Data").is_dir() else None
    return Settings(
        preset=a.preset,
        benchmarks=names(a.benchmarks),
        math_benchmarks=names(a.math_benchmarks),
        mmlu_pro=a.mmlu_pro,
        num_fewshot=parse_numbers("num_fewshot", a.num_fewshot),
        backend=a.backend,
        base_url=a.base_url,
        model_args=parse("model_args", a.model_args),
        gen_kwargs=parse("gen_kwargs", a.gen_kwargs),
        system_instruction=a.system_instruction,
        device=a.device,
        n_gpu=a.n_gpu,
        data_parallel=a.data_parallel,
        dtype=a.dtype or DTYPE_OF[a.preset],
        max_model_len=a.max_model_len,
        apply_chat_template=a.apply_chat_template,
        batch_size=a.batch_size,
        data_dir=a.data_dir or default_data,
        offline=a.data_dir is not None,
        include_path=a.include_path,
        math_prompt_type=a.math_prompt_type or "wcot",
        math_max_tokens=a.math_max_tokens,
        max_gen_toks=a.max_gen_toks,
        n_samples=a.n_samples,
        temperature=a.temperature,
        limits=parse_numbers("limit", a.limit),
        allow_code_execution=a.allow_code_execution,
        sandbox=a.sandbox,
        seed=a.seed,
        no_cache=a.no_cache,
        quiet=a.quiet,
        debug=a.debug,
    )
