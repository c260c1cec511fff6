"""The settings of one evaluation, checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from common.errors import UsageError, nearest
from common.files.json_types import Between, OneOf
from common.files.json_values import JsonObject
from common.typed_config import check_fields, read_mapping
from eval import model_args
from eval.benchmarks import PRESETS, Benchmark, chosen, refuse_code
from eval.tasks.prompts import TEMPLATES

DTYPES = ("bfloat16", "float16", "float32", "auto")
BACKENDS = ("auto", "hf", "vllm", "openai")
SANDBOXES = ("auto", "weak")
PAPER_LENGTH = 4096
DTYPE_OF: Mapping[str, str | None] = {"paper": None, "lm-eval": "auto"}
Count = Annotated[int, Between(1)]
EVERY = ""
"""The name in `num_fewshot` that means every task without a number of its own."""


@dataclass(frozen=True)
class Settings:
    """Settings of one evaluation; the defaults are the original script's.

    `dtype` None means bfloat16, and float32 on a processor that only emulates it; "auto" is the checkpoint's.
    `max_model_len` None means the model's own length, in the paper's preset at most 4096. `n_gpu` None means all
    visible. `data_dir` is a folder laid out like the hub; with `offline` nothing outside it is asked for data.
    `limits` maps benchmarks to numbers of items, spread over their subjects, and `num_fewshot` to numbers of examples;
    the name "" means the others. `max_gen_toks` shortens lm-eval's generation tasks. `n_samples` over 1 draws that many
    answers at `temperature`. `no_cache` asks the model again for what the journal holds. `model_args` goes to
    lm-eval's model, `gen_kwargs` changes the generation settings of every task, and `system_instruction` stands before
    each prompt.
    """

    preset: Annotated[str, OneOf(PRESETS)] = "paper"
    benchmarks: tuple[str, ...] = ("mmlu", "ifeval", "mbpp", "humaneval")
    math_benchmarks: tuple[str, ...] = ("math", "gsm8k")
    mmlu_pro: bool = False
    num_fewshot: Mapping[str, int] = field(default_factory=dict)
    backend: Annotated[str, OneOf(BACKENDS)] = "auto"
    base_url: str | None = None
    model_args: JsonObject = field(default_factory=dict)
    gen_kwargs: JsonObject = field(default_factory=dict)
    system_instruction: str | None = None
    device: str = "auto"
    n_gpu: Annotated[int, Between(0)] | None = None
    data_parallel: Count = 1
    dtype: Annotated[str, OneOf(DTYPES)] | None = None
    max_model_len: Count | None = None
    apply_chat_template: bool = False
    batch_size: str = "auto"
    data_dir: Path | None = None
    offline: bool = False
    include_path: Path | None = None
    math_prompt_type: Annotated[str, OneOf(tuple(TEMPLATES))] = "wcot"
    math_max_tokens: Count = 1024
    max_gen_toks: Count | None = None
    n_samples: Count = 1
    temperature: Annotated[float, Between(0, numbers=True)] = 0.0
    limits: Mapping[str, int] = field(default_factory=dict)
    allow_code_execution: bool = False
    sandbox: Annotated[str, OneOf(SANDBOXES)] = "auto"
    seed: int = 1234
    no_cache: bool = False
    quiet: bool = False
    debug: bool = False

    def chosen(self) -> list[Benchmark]:
        """The benchmarks asked for."""
        return chosen(self.benchmarks, self.math_benchmarks, self.mmlu_pro, self.preset)

    def check(self) -> None:
        """Raise UsageError for the first setting that cannot be right; reads folders' names only."""
        check_fields(self)
        size = self.batch_size.removeprefix("auto:")
        if self.batch_size != "auto" and not (size.isdecimal() and int(size) > 0):
            raise UsageError(f"--batch_size is auto, auto:N or a number of at least 1, not {self.batch_size!r}.")
        kind, _, index = self.device.partition(":")
        if kind not in ("auto", "cpu", "cuda", "mps") or (index and (kind != "cuda" or not index.isdecimal())):
            raise UsageError(f"--device is auto, cpu, cuda, cuda:N or mps, not {self.device!r}.")
        model_args.check_model_args(self.model_args, "hf" if self.backend == "auto" else self.backend)
        model_args.check_gen_kwargs(self.gen_kwargs)
        for name in ("data_dir", "include_path"):
            folder = getattr(self, name)
            if folder is not None and not folder.is_dir():
                raise UsageError(f"--{name} {folder} is not a folder.")
        self._check_server()
        benchmarks = self.chosen()
        self._check_samples(benchmarks)
        self._check_names(benchmarks)
        refuse_code([b.name for b in benchmarks if b.runs_code], self.allow_code_execution)

    def _check_server(self) -> None:
        if (self.backend == "openai") != (self.base_url is not None):
            raise UsageError("--backend openai and --base_url URL belong together: give both or neither.")
        if self.base_url is not None:
            parts = urlsplit(self.base_url)
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise UsageError(
                    f"--base_url {self.base_url} is not an address; give one such as http://localhost:8000/v1."
                )

    def _check_samples(self, benchmarks: list[Benchmark]) -> None:
        if self.n_samples > 1 and self.temperature == 0:
            raise UsageError(
                f"--n_samples {self.n_samples} needs a --temperature above 0: greedy answers are all the same."
            )
        single = [b.name for b in benchmarks if not b.samples and b.name != "mmlu"]
        if self.n_samples > 1 and single:
            raise UsageError(
                f"--n_samples scores HumanEval, MBPP and, in the paper's preset, MATH and GSM8K; leave out "
                f"{', '.join(single)} or --n_samples."
            )

    def _check_names(self, benchmarks: list[Benchmark]) -> None:
        names = {b.name for b in benchmarks}
        for flag, numbers, least in (("num_fewshot", self.num_fewshot, 0), ("limit", self.limits, 1)):
            for name, count in numbers.items():
                if count < least:
                    raise UsageError(f"--{flag} must be at least {least}, not {count}.")
                if name != EVERY and name not in names:
                    raise UsageError(f"--{flag} names {name!r}, which is not evaluated.{nearest(name, names)}")
        paper = [b.name for b in benchmarks if b.paper_prompt and self.num_fewshot.get(b.name)]
        if paper:
            raise UsageError(
                f"--num_fewshot {paper[0]}: the paper's prompt has no examples; --preset lm-eval has a task with them."
            )

    @property
    def trusts_remote_code(self) -> bool:
        """True where --model_args allows a model's own code to run."""
        return self.model_args.get("trust_remote_code") is True

    @property
    def rows(self) -> int | None:
        """Rows of a batch; None for auto."""
        return int(self.batch_size) if self.batch_size.isdecimal() else None

    def limit(self, benchmark: Benchmark) -> int | None:
        """Return the number of items of a benchmark to evaluate; None for all."""
        return self.limits.get(benchmark.name, self.limits.get(EVERY))

    def recorded(self) -> JsonObject:
        """The settings as JSON for the results file; "limit" is the largest of the limits, None where there is none."""
        values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
        return values | {"limit": max(self.limits.values(), default=None)}

    @classmethod
    def from_recorded(cls, data: JsonObject, source: str) -> Settings:
        """Return the settings of a results file; what this version does not know is left out.

        Raises UsageError for a value of another type, naming the file `source` and the key.
        """
        known_fields = {f.name for f in fields(cls)}
        values = {k: v for k, v in data.items() if k in known_fields}
        return read_mapping(cls, {"benchmarks": (), "math_benchmarks": (), **values}, source, "settings")


def parse_numbers(flag: str, value: str | None) -> dict[str, int]:
    """Read `5` (for all that are not named) or `mmlu=5,arc_easy=25`. Raises UsageError naming the flag."""
    numbers: dict[str, int] = {}
    for part in (p.strip() for p in (value or "").split(",")):
        name, equals, count = part.rpartition("=")
        if not part:
            continue
        if not count.strip().isdecimal() or (equals and not name.strip()):
            raise UsageError(f"--{flag} {part!r}: expected a number, or benchmark=number.")
        numbers[name.strip() if equals else EVERY] = int(count)
    return numbers
