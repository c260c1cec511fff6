"""The benchmarks of the paper: their flags' names, columns, lm-eval tasks, and the data sets they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from console.errors import UsageError, nearest


@dataclass(frozen=True)
class Benchmark:
    """One benchmark as asked for: `task` is lm-eval's name, `metric` its key in lm-eval's results ("" takes the first).

    `datasets` are the hub names it reads, `folder` where lm-eval's task files lie (below its tasks folder; "" if not
    known), `runs_code` whether scoring executes what the model wrote.
    """

    name: str
    column: str
    task: str
    metric: str = ""
    datasets: tuple[str, ...] = ()
    folder: str = ""
    runs_code: bool = False
    math: bool = False


LM_EVAL: Mapping[str, Benchmark] = {
    b.name: b
    for b in (
        Benchmark("mmlu", "MMLU", "mmlu", "acc,none", ("cais/mmlu",), "mmlu/default"),
        Benchmark("ifeval", "IFEval", "ifeval", "mean of 4 accuracies", ("google/IFEval",), "ifeval"),
        Benchmark("mbpp", "MBPP", "mbpp", "pass_at_1,none", ("google-research-datasets/mbpp",), "mbpp", runs_code=True),
        Benchmark("humaneval", "HumanEval", "humaneval", "pass@1,create_test", (), "humaneval", runs_code=True),
    )
}
MMLU_PRO = Benchmark(
    "mmlu_pro", "MMLU-Pro", "mmlu_pro", "exact_match,custom-extract", ("TIGER-Lab/MMLU-Pro",), "mmlu_pro"
)
MATHS: Mapping[str, Benchmark] = {
    "math": Benchmark("math", "MATH", "math_paper", "acc,none", ("EleutherAI/hendrycks_math",), math=True),
    "gsm8k": Benchmark("gsm8k", "GSM8K", "gsm8k_paper", "acc,none", ("openai/gsm8k",), math=True),
}


def chosen(benchmarks: Sequence[str], math_benchmarks: Sequence[str], mmlu_pro: bool = False) -> list[Benchmark]:
    """Return what the flags ask for, in their order and once each; a name that is not ours is an lm-eval task.

    Raises UsageError for an unknown maths benchmark or where nothing is asked for.
    """
    found: dict[str, Benchmark] = {}
    for name in benchmarks:
        found[name] = MMLU_PRO if name == "mmlu_pro" else LM_EVAL.get(name) or Benchmark(name, name, name)
    if mmlu_pro:
        found["mmlu_pro"] = MMLU_PRO
    for name in math_benchmarks:
        if name not in MATHS:
            hint = nearest(name, MATHS) or " lm-eval's own tasks go to --benchmarks."
            raise UsageError(f"--math_benchmarks knows math and gsm8k, not {name!r}.{hint}")
        found[f"math:{name}"] = MATHS[name]
    if not found:
        raise UsageError("Nothing to evaluate: --benchmarks and --math_benchmarks are both empty.")
    return list(found.values())


def refuse_code(names: Sequence[str], allowed: bool) -> None:
    """Raise UsageError where `names` need model-written code to run and nobody allowed it."""
    if names and not allowed:
        verb = "run" if len(names) > 1 else "runs"
        raise UsageError(
            f"{' and '.join(names)} {verb} code that the model wrote; allow it with --allow_code_execution "
            "(it runs in a separate, limited process), or leave it out of --benchmarks."
        )
