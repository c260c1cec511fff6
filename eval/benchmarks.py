"""The benchmarks of the paper by preset: their flags' names, columns, lm-eval tasks, metrics, and data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from common.errors import UsageError, nearest
from eval.outcomes import IFEVAL_MEAN

PRESETS = ("paper", "lm-eval")
UNFENCED = "pass@1 without code fences"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of an evaluation.

    `task` is lm-eval's name, `metric` the name of its column and `key` that metric in lm-eval's results ("" takes the
    first).
    `beside` are further metrics to report with it, name to key. `datasets` are the hub names it reads, `folders` where
    lm-eval's task files lie (below its tasks folder; empty if not known), `runs_code` whether scoring executes what
    the model wrote, `paper_prompt` whether the paper's maths prompts apply, `samples` whether several generations of
    an item can be scored.
    """

    name: str
    column: str
    task: str
    metric: str = ""
    key: str = ""
    beside: Mapping[str, str] = field(default_factory=dict, hash=False)
    datasets: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    runs_code: bool = False
    paper_prompt: bool = False
    samples: bool = False


def _code(name: str, column: str, key: str, datasets: tuple[str, ...]) -> Benchmark:
    beside = {UNFENCED: f"{UNFENCED},{key.partition(',')[2]}"}
    return Benchmark(name, column, name, "pass@1", key, beside, datasets, (name,), runs_code=True, samples=True)


_GSM8K, _MATH = ("openai/gsm8k",), ("EleutherAI/hendrycks_math",)
LM_EVAL: Mapping[str, Benchmark] = {
    b.name: b
    for b in (
        Benchmark("mmlu", "MMLU", "mmlu", "acc", "acc,none", {}, ("cais/mmlu",), ("mmlu/default",)),
        Benchmark("ifeval", "IFEval", "ifeval", IFEVAL_MEAN, "", {}, ("google/IFEval",), ("ifeval",)),
        _code("mbpp", "MBPP", "pass@1,none", ("google-research-datasets/mbpp",)),
        _code("humaneval", "HumanEval", "pass@1,create_test", ()),
    )
}
MMLU_PRO = Benchmark(
    "mmlu_pro", "MMLU-Pro", "mmlu_pro", "exact_match", "exact_match,custom-extract", {}, ("TIGER-Lab/MMLU-Pro",),
    ("mmlu_pro",),
)  # fmt: skip
MATHS: Mapping[str, Mapping[str, Benchmark]] = {
    "paper": {
        "math": Benchmark(
            "math", "MATH", "math_paper", "acc", "acc,none", {}, _MATH, paper_prompt=True, samples=True
        ),
        "gsm8k": Benchmark(
            "gsm8k", "GSM8K", "gsm8k_paper", "acc", "acc,none",
            {"strict match": "strict match,none", "flexible match": "flexible match,none"},
            _GSM8K, paper_prompt=True, samples=True,
        ),
    },
    "lm-eval": {
        "math": Benchmark(
            "math", "MATH", "minerva_math", "math_verify", "math_verify,none", {"exact_match": "exact_match,none"},
            _MATH, ("benchmarks", "minerva_math"),
        ),
        "gsm8k": Benchmark(
            "gsm8k", "GSM8K", "gsm8k", "strict match", "exact_match,strict-match",
            {"flexible match": "exact_match,flexible-extract"}, _GSM8K, ("gsm8k",),
        ),
    },
}  # fmt: skip


def chosen(
    benchmarks: Sequence[str], math_benchmarks: Sequence[str], mmlu_pro: bool = False, preset: str = "paper"
) -> list[Benchmark]:
    """Return what the flags ask for, in their order and once each; a name that is not ours is an lm-eval task.

    Raises UsageError for an unknown maths benchmark or where nothing is asked for.
    """
    maths = MATHS[preset]
    selected: dict[str, Benchmark] = {}
    for name in benchmarks:
        selected[name] = MMLU_PRO if name == "mmlu_pro" else LM_EVAL.get(name) or Benchmark(name, name, name)
    if mmlu_pro:
        selected["mmlu_pro"] = MMLU_PRO
    for name in math_benchmarks:
        if name not in maths:
            hint = nearest(name, maths) or " lm-eval's own tasks go to --benchmarks."
            raise UsageError(f"--math_benchmarks knows math and gsm8k, not {name!r}.{hint}")
        selected[f"math:{name}"] = maths[name]
    if not selected:
        raise UsageError("Nothing to evaluate: --benchmarks and --math_benchmarks are both empty.")
    tasks = [b.task for b in selected.values()]
    twice = next((t for t in tasks if tasks.count(t) > 1), None)
    if twice:
        raise UsageError(f"The task {twice!r} is asked for by --benchmarks and by --math_benchmarks; leave one out.")
    return list(selected.values())


def refuse_code(names: Sequence[str], allowed: bool) -> None:
    """Raise UsageError where `names` need model-written code to run and nobody allowed it."""
    if names and not allowed:
        verb = "run" if len(names) > 1 else "runs"
        raise UsageError(
            f"{' and '.join(names)} {verb} code that the model wrote; allow it with --allow_code_execution "
            "(it runs in a separate, limited process), or leave it out of --benchmarks."
        )
