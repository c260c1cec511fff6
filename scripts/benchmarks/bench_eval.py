"""Time the evaluation beside plain lm-eval: start-up, and the same requests on the same model, in turns.

Both are asked the same prompts with the same lengths on the same weights, one after the other, several times over; the
table has medians of wall-clock and of CPU time (which tells more on a busy machine). A second table has the score of
each task by both, and how many answers differ.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts: spinning threads starve the neighbours

from common.cli import Parser, add_output_flags, run
from common.errors import UsageError
from common.files.paths import user_path
from common.logging import logger

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from common.files.json_values import JsonObject
    from eval.benchmarks import Benchmark
    from eval.data.protocol import Loaded
    from eval.harness.requests import InstanceRequests
    from eval.request_types import Answer, Request
    from eval.settings import Settings

    Answers = dict[str, Answer]

ROOT = Path(__file__).resolve().parents[2]


def parser() -> Parser:
    p = Parser(prog="scripts/benchmarks/bench_eval.py", description=__doc__)
    p.add_argument("--model", type=user_path, required=True, help="checkpoint folder")
    p.add_argument("--data_dir", type=user_path, required=True, help="benchmark data laid out like the hub")
    p.add_argument("--tasks", default="mmlu_virology,gsm8k", help="lm-eval tasks (leaves, not groups), comma-separated")
    p.add_argument("--num_fewshot", type=int, help="examples in prompts of tasks that fix none (default: the task's)")
    p.add_argument("--limit", type=int, default=16, help="items of each task")
    p.add_argument("--max_gen_toks", type=int, default=48, help="new tokens of each generation")
    p.add_argument("--batch_sizes", default="1,8,auto", help="rows per batch; plain lm-eval leaves out auto")
    p.add_argument("--repeats", type=int, default=3, help="timed runs of each")
    p.add_argument("--dtype", default="float32", help="dtype of the weights")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument(
        "--allow_code_execution", action="store_true", help="run the code that the model writes for HumanEval and MBPP"
    )
    p.add_argument("--startup", action="store_true", help="time whole processes on one item instead")
    add_output_flags(p)
    return p


@dataclass
class Timed:
    """Measurement of one backend: seconds of each repetition, and the answers of the last."""

    name: str
    wall: list[float]
    cpu: list[float]
    answers: Answers


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    if args.startup:
        print(startup(args))
        return 0
    questions = build(args)
    requests = list({r.key: r for pairs in questions.requests_by_task.values() for _, rs in pairs for r in rs}.values())
    if not requests:
        raise UsageError("There is nothing to time.")
    ways = candidates(args, requests)
    for round_ in range(args.repeats):
        for name, answer, timed in ways:
            logger.info(f"round {round_ + 1} of {args.repeats}: {name}")
            wall, cpu = time.perf_counter(), time.process_time()
            timed.answers = answer()
            timed.wall.append(time.perf_counter() - wall)
            timed.cpu.append(time.process_time() - cpu)
    print(f"{len(requests)} requests of {args.tasks}, {args.dtype} on {args.device}, {args.repeats} repetitions\n")
    print(table([timed for _, _, timed in ways]))
    print("\n" + score_table(questions, requests, ways[0][2], ways[1][2]))
    return 0


@dataclass
class Questions:
    """Loaded tasks, their settings and items, and lm-eval's instances with their requests."""

    loaded: Mapping[Benchmark, Loaded]
    settings: Settings
    plan: Mapping[str, Sequence[int]] | None
    requests_by_task: Mapping[Benchmark, InstanceRequests]


def build(args: Namespace) -> Questions:
    """Return the requests of the tasks, as an evaluation makes them."""
    from eval.data.loading import load
    from eval.data.protocol import configure, plan_items
    from eval.harness import requests as asking
    from eval.log_filters import environment, muted
    from eval.settings import EVERY, Settings

    settings = Settings(
        preset="lm-eval",
        benchmarks=tuple(args.tasks.split(",")),
        math_benchmarks=(),
        data_dir=args.data_dir,
        offline=True,
        limits={EVERY: args.limit},
        num_fewshot={} if args.num_fewshot is None else {EVERY: args.num_fewshot},
        max_gen_toks=args.max_gen_toks,
        allow_code_execution=args.allow_code_execution,
        quiet=True,
    )
    settings.check()
    with environment(settings, local=True), muted(settings):
        loaded = load(tuple(settings.chosen()), settings)
        configure(loaded, settings, 4096)
        plan = plan_items(loaded, settings, [])
        requests_by_task = asking.build(loaded, settings, plan, "bench", None)
    return Questions(loaded, settings, plan, requests_by_task)


def scores(questions: Questions, answers: Answers) -> dict[str, dict[str, float]]:
    """Return lm-eval's metrics of each task for some answers."""
    from eval.harness.grading import grade
    from eval.log_filters import muted

    for pairs in questions.requests_by_task.values():
        for instance, requests in pairs:
            instance.resps = [answers[r.key] for r in requests]
    with muted(questions.settings):
        raw = grade(questions.loaded, questions.plan, questions.settings)
    return {
        task: {k: v for k, v in metrics.items() if isinstance(v, float) and "stderr" not in k}
        for task, metrics in raw["results"].items()
    }


def score_table(questions: Questions, requests: Sequence[Request], lm_eval_run: Timed, project: Timed) -> str:
    """Return the scores of each task by lm-eval and by ours, and the number of answers that differ."""
    first, second = scores(questions, lm_eval_run.answers), scores(questions, project.answers)
    rows = [f"| task | metric | {lm_eval_run.name} | {project.name} | other answers |", "|---|---|---:|---:|---:|"]
    for task, metrics in first.items():
        of_task = [r for r in requests if r.task == task]
        other = sum(not same(lm_eval_run.answers[r.key], project.answers[r.key]) for r in of_task)
        for metric, value in metrics.items():
            rows.append(f"| {task} | {metric} | {value:.4f} | {second[task][metric]:.4f} | {other} of {len(of_task)} |")
    return "\n".join(rows)


def candidates(args: Namespace, requests: Sequence[Request]) -> list[tuple[str, Callable[[], Answers], Timed]]:
    """lm-eval and ours at each batch size."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, trust_remote_code=False).to(args.device)
    length = min(4096, getattr(model.config, "max_position_embeddings", 4096))
    ways = []
    for rows in args.batch_sizes.split(","):
        if rows == "auto":
            ways.append(("ours, batch auto", _project_backend(model, tokenizer, None, length, requests)))
            continue
        ways.append((f"lm-eval, batch {rows}", _lm_eval(model, tokenizer, int(rows), length, requests)))
        ways.append((f"ours, batch {rows}", _project_backend(model, tokenizer, int(rows), length, requests)))
    torch.manual_seed(0)
    return [(name, answer, Timed(name, [], [], {})) for name, answer in ways]


def _project_backend(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: int | None,
    length: int,
    requests: Sequence[Request],
) -> Callable[[], Answers]:
    from eval.harness.backends.answering import LMBackend
    from eval.harness.backends.hf import HFModel

    lm = HFModel(model, rows=rows, tokenizer=tokenizer, max_length=length, softmax_dtype="float32", batch_size="auto")
    backend = LMBackend(lm, lm.used)

    def answer() -> Answers:
        answers: Answers = {}
        backend.answer(requests, lambda r, a, _: answers.update({r.key: a}))
        return answers

    return answer


def _lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    length: int,
    requests: Sequence[Request],
) -> Callable[[], Answers]:
    import logging

    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = HFLM(model, tokenizer=tokenizer, batch_size=rows, max_length=length)

    def answer() -> Answers:
        answers_by_key: Answers = {}
        for kind, method in (("score", "loglikelihood"), ("generate", "generate_until")):
            chosen = [r for r in requests if r.kind == kind]
            if chosen:
                seconds = [r.continuation if kind == "score" else _settings(r) for r in chosen]
                pairs = zip(chosen, seconds, strict=True)
                instances = [Instance(method, {}, (r.context, s), 0) for r, s in pairs]
                answers = getattr(lm, method)(instances, disable_tqdm=True)
                answers_by_key |= {r.key: a for r, a in zip(chosen, answers, strict=True)}
        return answers_by_key

    return answer


def _settings(request: Request) -> JsonObject:
    return {"until": list(request.until), "max_gen_toks": request.max_tokens, "do_sample": False}


def table(timed: Sequence[Timed]) -> str:
    """Medians, how much longer each took than ours, and how many answers differ from ours."""
    project = next(t for t in timed if t.name.startswith("ours"))
    rows = ["| way | wall s | CPU s | wall, ours = 1 | other answers |", "|---|---:|---:|---:|---:|"]
    for t in timed:
        wall, cpu = statistics.median(t.wall), statistics.median(t.cpu)
        ratio = statistics.median(a / b for a, b in zip(t.wall, project.wall, strict=True))
        other = sum(not same(a, project.answers[key]) for key, a in t.answers.items())
        rows.append(f"| {t.name} | {wall:.1f} | {cpu:.1f} | {ratio:.2f} | {other} |")
    return "\n".join(rows)


def same(a: Answer, b: Answer) -> bool:
    """Equal texts; log-likelihoods to a hundredth."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return abs(a[0] - b[0]) < 1e-2
    return a == b


def startup(args: Namespace) -> str:
    """Whole processes on one item of the first task: lm-eval's imports alone, lm-eval, ours; wall-clock and CPU."""
    task = args.tasks.split(",")[0]
    data = args.data_dir / "hub" if (args.data_dir / "hub").is_dir() else args.data_dir
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    imports = "import lm_eval.evaluator, lm_eval.tasks, lm_eval.models.huggingface"
    model = str(args.model.resolve())
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        lm_eval_run = [
            sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype={args.dtype}",
            "--tasks", task, "--limit", "1", "--device", args.device, "--gen_kwargs", "max_gen_toks=1",
        ]  # fmt: skip
        project = [
            sys.executable, str(ROOT / "evaluate_model.py"), "--preset", "lm-eval", "--model", model, "--data_dir",
            str(args.data_dir.resolve()), "--benchmarks", task, "--math_benchmarks", "", "--limit", "1", "--dtype",
            args.dtype, "--device", args.device, "--max_gen_toks", "1", "--save_path", folder, "--quiet",
            "--no_cache",
        ]  # fmt: skip
        loading = f"transformers.AutoTokenizer.from_pretrained({model!r}, trust_remote_code=False)"
        tokenizer = f"{imports}, transformers; {loading}"
        commands = {
            "lm-eval's imports alone": [sys.executable, "-c", imports],
            "lm-eval's imports, the tokenizer": [sys.executable, "-c", tokenizer],
            "lm-eval, one item": lm_eval_run,
            "ours, one item": project,
        }
        wall: dict[str, list[float]] = {name: [] for name in commands}
        cpu: dict[str, list[float]] = {name: [] for name in commands}
        for round_ in range(args.repeats):
            for name, command in commands.items():
                logger.info(f"round {round_ + 1} of {args.repeats}: {name}")
                before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
                subprocess.run(command, cwd=data, env=offline, check=True, capture_output=True)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        prepared = [
            json.loads(f.read_text())["aim"]["seconds"]["prepare"] for f in Path(folder).rglob("results_*.json")
        ]
    rows = [f"{task}, medians of {args.repeats}\n", "| process | wall s | CPU s |", "|---|---:|---:|"]
    rows += [f"| {n} | {statistics.median(wall[n]):.1f} | {statistics.median(cpu[n]):.1f} |" for n in commands]
    return "\n".join([*rows, f"| ours, until weights are loaded | {statistics.median(prepared):.1f} | |"])


if __name__ == "__main__":
    sys.exit(run(main))
