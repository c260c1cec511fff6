"""Configuration of loaded lm-eval tasks: prompts, few-shot examples, lengths, scoring and selection of items."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from eval.benchmarks import Benchmark, refuse_code
from eval.data.fewshot import keep_item_out
from eval.sandbox.separation import obstacle
from eval.sandbox.supervisor import SandboxSettings, containment
from eval.settings import EVERY, Settings
from eval.tasks import scoring
from eval.tasks.code import CODE_EVAL, SandboxedCodeEval, program_with
from eval.tasks.prompts import STOPS, prompt, question_of
from eval.tasks.strict import without_reasoning

if TYPE_CHECKING:
    from types import FunctionType

    from evaluate import EvaluationModule
    from lm_eval.api.group import Group
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from lm_eval.filters import FilterEnsemble

    from common.files.json_values import JsonObject

LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Spellings of the largest number of new tokens in task files, lm-eval's own first."""


@dataclass(frozen=True)
class Loaded:
    """The tasks of one benchmark: leaf tasks by name, groups by name, and the generation settings as shipped."""

    tasks: Mapping[str, Task]
    groups: Mapping[str, Group]
    shipped: Mapping[str, Shipped] = field(default_factory=dict)
    data: JsonObject = field(default_factory=dict)
    """How many items there are, their digest, and whether they are the published ones (None: not known)."""


@dataclass(frozen=True)
class Shipped:
    """Values of a task file that a run may change; tasks stay in memory for the next run of the same process."""

    generation: JsonObject | None
    shots: int | None
    repeats: int
    filters: list[FilterEnsemble] | None
    process_results: FunctionType | None

    @classmethod
    def of(cls, task: Task) -> Shipped:
        """Return the settings that a task has as lm-eval loads it."""
        shots = task.get_config("num_fewshot")
        generation = deepcopy(task.get_config("generation_kwargs"))
        repeats, filters = task.get_config("repeats") or 1, getattr(task, "_filters", None)
        return cls(generation, shots, repeats, filters, task.get_config("process_results"))


@contextmanager
def sandboxed_code_eval(is_needed: bool) -> Iterator[None]:
    """While open, `evaluate.load("code_eval")` is the sandbox: the stock code tasks load that metric when imported.

    Where no task asks for that metric (`needed`), its library, which takes a second, is left alone.
    """
    if not is_needed:
        yield
        return
    import evaluate as hf_evaluate

    original = hf_evaluate.load

    def load(path: str, *args: object, **kwargs: object) -> EvaluationModule | SandboxedCodeEval:
        return CODE_EVAL if path == "code_eval" else original(path, *args, **kwargs)

    hf_evaluate.load, CODE_EVAL.is_loading = load, True
    try:
        yield
    finally:
        hf_evaluate.load, CODE_EVAL.is_loading = original, False


def configure(loaded: Mapping[Benchmark, Loaded], settings: Settings, max_length: int) -> list[str]:
    """Set prompts, stop strings, lengths, shots and samples of the tasks; return what should be said about it."""
    remarks = _set_up_sandbox(loaded, settings)
    for benchmark, part in loaded.items():
        for name, task in part.tasks.items():
            if getattr(task, "UNSAFE_CODE", False):
                refuse_code([benchmark.name], settings.allow_code_execution)
            _set_shots(benchmark, task, part.shipped[name], settings)
            _set_scoring(benchmark, task, part.shipped[name], settings)
            if task.get_config("output_type") == "generate_until":
                warning = _set_generation(benchmark, task, part.shipped[name], settings, max_length)
                remarks += [warning] if warning and warning not in remarks else []
    if settings.math_prompt_type == "wcot" and any(b.paper_prompt for b in loaded):
        remarks.append("wcot: code blocks in answers are not executed (the reference executed them).")
    return remarks


def _set_up_sandbox(loaded: Mapping[Benchmark, Loaded], settings: Settings) -> list[str]:
    """Set the sandbox of the metric where a task runs code, and return remarks on layers and on tests.

    Raises EvaluationError where the machine gives no sandbox.
    """
    tasks = {n: (b, t) for b, part in loaded.items() for n, t in part.tasks.items() if getattr(t, "UNSAFE_CODE", False)}
    CODE_EVAL.sandbox = None
    if not tasks or not settings.allow_code_execution:
        return []
    CODE_EVAL.sandbox = SandboxSettings(settings.sandbox == "weak", settings.seed)
    remarks = [f"Model-written code is contained by: {containment(CODE_EVAL.sandbox.weak)}."]
    for name, (benchmark, task) in tasks.items():
        if benchmark.runs_code:
            continue  # its tests are known to run apart from programs
        obstacles = [reason for doc in task.eval_docs if (reason := obstacle(str(task.doc_to_target(doc))))]
        if obstacles:
            remarks.append(
                f"{name}: the tests of {len(obstacles)} of {len(task.eval_docs)} items run in the program's process "
                f"({obstacles[0]}); a program could claim to have passed them."
            )
    return remarks


def _set_shots(benchmark: Benchmark, task: Task, shipped: Shipped, settings: Settings) -> None:
    shots = settings.num_fewshot.get(benchmark.name)
    if shots is None and shipped.shots is None:
        shots = settings.num_fewshot.get(EVERY)
    count = shipped.shots or 0 if shots is None else shots
    task.set_config("num_fewshot", count)
    task.set_fewshot_seed(seed=settings.seed)
    keep_item_out(task, settings.seed)


def _set_generation(
    benchmark: Benchmark, task: Task, shipped: Shipped, settings: Settings, max_length: int
) -> str | None:
    """Stop strings, lengths and sampling; return a remark where the model is too short for what was asked."""
    generation = dict(deepcopy(shipped.generation or {}))
    if benchmark.paper_prompt:
        kind = settings.math_prompt_type
        task.set_config("doc_to_text", lambda doc, kind=kind: prompt(kind, question_of(doc)))
        generation |= {"until": list(STOPS[kind]), "max_gen_toks": settings.math_max_tokens}
    if benchmark.samples and settings.temperature > 0:
        generation |= {"do_sample": True, "temperature": settings.temperature}
    warning = None
    lengths = [generation.pop(name, None) for name in LENGTH_NAMES]  # all of them: one that stays would be sent too
    max_new_tokens = int(next((length for length in lengths if length is not None), 256))
    if settings.max_gen_toks is not None and not benchmark.paper_prompt:
        max_new_tokens = min(max_new_tokens, settings.max_gen_toks)
    if max_new_tokens > max_length * 3 // 4:
        max_new_tokens = max(1, max_length // 2)
        warning = f"{benchmark.name}: at most {max_new_tokens} new tokens, half of the {max_length} the model takes."
    task.set_config("generation_kwargs", generation | {"max_gen_toks": max_new_tokens})
    return warning


def _set_scoring(benchmark: Benchmark, task: Task, shipped: Shipped, settings: Settings) -> None:
    """Verdicts on all answers of an item, in the sandbox over all cores where they are code."""
    repeats = settings.n_samples if benchmark.samples else shipped.repeats
    task.set_config("repeats", repeats)
    if benchmark.task == "minerva_math":
        stock = shipped.process_results
        assert stock is not None
        task.set_config("process_results", lambda doc, results: scoring.minerva(doc, results[0], stock))
    if benchmark.task == "gsm8k":
        task.apply_filters = lambda: _filter_without_reasoning(task)
    if not getattr(task, "UNSAFE_CODE", False):
        return
    runs_code = benchmark.runs_code
    if runs_code and repeats > 1 and shipped.filters:
        from lm_eval.filters import build_filter_ensemble

        name = shipped.filters[0].name
        task._filters = [build_filter_ensemble(name, [["custom", {"filter_fn": scoring.every_answer}]])]
    elif shipped.filters:
        task._filters = shipped.filters
    task.apply_filters = lambda: _judge_at_once(task, runs_code)
    if runs_code:
        task.set_config("process_results", lambda doc, results: scoring.code(doc, results[0]))


def _filter_without_reasoning(task: Task) -> list[Instance] | None:
    """Apply the filters to what follows </think> in each answer; the samples keep the whole answers."""
    whole = [instance.resps for instance in task.instances]
    for instance in task.instances:
        instance.resps = [without_reasoning(answer) for answer in instance.resps]
    try:
        instances: list[Instance] | None = type(task).apply_filters(task)
        return instances
    finally:
        for instance, answers in zip(task.instances, whole, strict=True):
            instance.resps = answers


def _judge_at_once(task: Task, runs_code: bool) -> list[Instance] | None:
    """Apply the filters, then run all programs of a task in parallel, before lm-eval scores items one by one."""
    outcome: list[Instance] | None = type(task).apply_filters(task)
    items = [(instance.doc, answer) for instance in task.instances for answer in instance.filtered_resps.values()]
    if runs_code:
        scoring.prefetch(items)
        return outcome
    programs = [(p, doc) for doc, answer in items for p in ([answer] if isinstance(answer, str) else answer)]
    CODE_EVAL.prefetch([program_with(task.doc_to_target(doc), program) for program, doc in programs])
    return outcome


def plan_items(
    loaded: Mapping[Benchmark, Loaded], settings: Settings, remarks: list[str]
) -> dict[str, list[int]] | None:
    """Return the items to evaluate by task, in the form of lm-eval's `samples`; None for all."""
    plan: dict[str, list[int]] = {}
    for b, part in loaded.items():
        sizes = {name: len(task.eval_docs) for name, task in part.tasks.items()}
        limit, total = settings.limit(b), sum(sizes.values())
        indices = {name: list(range(n)) for name, n in sizes.items()} if limit is None else items_per_part(limit, sizes)
        plan |= indices
        count = sum(map(len, indices.values()))
        scope = f"all {total} items" if limit is None else f"{count} of {total} items"
        why = "" if limit is None else f" (--limit {limit})"
        remarks.append(f"{b.name}: {scope}{_parts(sizes)}{why}.")
        if part.data.get("published") is False:
            remarks.append(f"{b.name}: these are not the published items; scores do not compare with others'.")
    return plan if settings.limits else None


def _parts(sizes: Mapping[str, int]) -> str:
    return f" of {len(sizes)} subjects" if len(sizes) > 1 else ""


def prompt_hashes(samples: Mapping[str, Sequence[JsonObject]]) -> dict[str, str]:
    """One SHA-256 per benchmark over its prompts in order: equal hashes, equal questions."""

    def digest(hashes: Iterable[str]) -> str:
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    return {name: digest(item["prompt_hash"] for item in items) for name, items in samples.items()}


def items_per_part(limit: int, sizes: Mapping[str, int]) -> dict[str, list[int]]:
    """Choose `limit` items over the parts of a benchmark: the first ones of each, evenly, at least one a part."""
    share, more = divmod(limit, len(sizes))
    return {name: list(range(min(size, max(1, share + (i < more))))) for i, (name, size) in enumerate(sizes.items())}
