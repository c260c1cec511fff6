"""The settings of one evaluation, checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from console.errors import UsageError, nearest
from eval.benchmarks import Benchmark, chosen, refuse_code
from eval.tasks.prompts import TEMPLATES

DTYPES = ("bfloat16", "float16", "float32", "auto")
BACKENDS = ("auto", "hf", "vllm")
DEFAULT_LENGTH = 4096


@dataclass(frozen=True)
class Settings:
    """What and how to evaluate; the defaults are the original script's.

    `max_model_len` None means 4096 or the model's own length where that is shorter. `n_gpu` None means all visible.
    `data_dir` is a folder laid out like the hub; with `offline` nothing outside it is asked for data.
    `limit` counts items of a benchmark, spread over its subjects. `max_gen_toks` shortens lm-eval's generation tasks.
    """

    benchmarks: tuple[str, ...] = ("mmlu", "ifeval", "mbpp", "humaneval")
    math_benchmarks: tuple[str, ...] = ("math", "gsm8k")
    mmlu_pro: bool = False
    backend: str = "auto"
    device: str = "auto"
    n_gpu: int | None = None
    dtype: str = "bfloat16"
    max_model_len: int | None = None
    apply_chat_template: bool = False
    batch_size: str = "auto"
    data_dir: Path | None = None
    offline: bool = False
    include_path: Path | None = None
    math_prompt_type: str = "wcot"
    math_max_tokens: int = 1024
    max_gen_toks: int | None = None
    limit: int | None = None
    allow_code_execution: bool = False
    seed: int = 1234
    quiet: bool = False
    debug: bool = False

    def chosen(self) -> list[Benchmark]:
        """The benchmarks asked for."""
        return chosen(self.benchmarks, self.math_benchmarks, self.mmlu_pro)

    def check(self) -> None:
        """Raise UsageError for the first setting that cannot be right; reads folders' names only."""
        for name in ("limit", "max_model_len", "math_max_tokens", "max_gen_toks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} must be at least 1, not {value}.")
        if self.n_gpu is not None and self.n_gpu < 0:
            raise UsageError(f"--n_gpu must be 0 or more, not {self.n_gpu}.")
        for name, known in (("dtype", DTYPES), ("backend", BACKENDS), ("math_prompt_type", tuple(TEMPLATES))):
            value = getattr(self, name)
            if value not in known:
                raise UsageError(f"--{name} is one of {', '.join(known)}, not {value!r}.{nearest(value, known)}")
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size) > 0):
            raise UsageError(f"--batch_size is auto or a number of at least 1, not {self.batch_size!r}.")
        kind, _, index = self.device.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdecimal())):
            raise UsageError(f"--device is auto, cpu, cuda or cuda:N, not {self.device!r}.")
        for name in ("data_dir", "include_path"):
            folder = getattr(self, name)
            if folder is not None and not folder.is_dir():
                raise UsageError(f"--{name} {folder} is not a folder.")
        refuse_code([b.name for b in self.chosen() if b.runs_code], self.allow_code_execution)

    def recorded(self) -> Mapping[str, Any]:
        """The settings as JSON for the results file."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
