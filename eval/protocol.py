"""How loaded lm-eval tasks are run: prompts and lengths as the settings say, which items, code in the sandbox."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from eval.benchmarks import Benchmark, refuse_code
from eval.scores import spread
from eval.settings import Settings
from eval.tasks.code import CODE_EVAL, program_of
from eval.tasks.prompts import STOPS, prompt, question_of


@dataclass(frozen=True)
class Loaded:
    """The tasks of one benchmark: leaf tasks by name, groups by name, and the generation settings as shipped."""

    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    generation: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)


@contextmanager
def sandboxed_code_eval() -> Iterator[None]:
    """While open, `evaluate.load("code_eval")` is the sandbox: the stock code tasks load that metric when imported."""
    import evaluate as hf_evaluate

    original = hf_evaluate.load

    def load(path: str, *args: Any, **kwargs: Any) -> Any:
        return CODE_EVAL if path == "code_eval" else original(path, *args, **kwargs)

    hf_evaluate.load = load
    try:
        yield
    finally:
        hf_evaluate.load = original


def configure(loaded: Mapping[Benchmark, Loaded], settings: Settings, max_length: int) -> list[str]:
    """Set prompts, stop strings, lengths and shots of the tasks; return what should be said about it."""
    remarks: list[str] = []
    for benchmark, part in loaded.items():
        for name, task in part.tasks.items():
            if getattr(task, "UNSAFE_CODE", False):
                refuse_code([benchmark.name], settings.allow_code_execution)
                _judge_at_once(task)
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(seed=settings.seed)
            if task.get_config("output_type") != "generate_until":
                continue
            generation = dict(deepcopy(part.generation[name] or {}))
            if benchmark.math:
                kind = settings.math_prompt_type
                task.set_config("doc_to_text", lambda doc, kind=kind: prompt(kind, question_of(doc)))
                generation |= {"until": list(STOPS[kind]), "max_gen_toks": settings.math_max_tokens}
            wanted = generation.get("max_gen_toks", 256)
            if settings.max_gen_toks is not None and not benchmark.math:
                wanted = min(wanted, settings.max_gen_toks)
            if wanted > max_length * 3 // 4:
                wanted = max(1, max_length // 2)
                remark = f"{benchmark.name}: at most {wanted} new tokens, half of the {max_length} the model takes."
                remarks += [remark] if remark not in remarks else []
            task.set_config("generation_kwargs", generation | {"max_gen_toks": wanted})
    if settings.math_prompt_type == "wcot" and any(b.math for b in loaded):
        remarks.append("wcot: code blocks in answers are not executed (the reference executed them).")
    return remarks


def _judge_at_once(task: Any) -> None:
    """Let the sandbox run all programs of a task in parallel, before lm-eval scores them one by one."""
    if "apply_filters" in vars(task):
        return
    filters = task.apply_filters

    def apply_filters() -> Any:
        outcome = filters()
        programs = [
            program_of(candidate, task.doc_to_target(instance.doc))
            for instance in task.instances
            for response in instance.filtered_resps.values()
            for candidate in ([response] if isinstance(response, str) else response)
        ]
        CODE_EVAL.prefetch(programs)
        return outcome

    task.apply_filters = apply_filters


def plan_items(
    loaded: Mapping[Benchmark, Loaded], settings: Settings, remarks: list[str]
) -> dict[str, list[int]] | None:
    """Which items of which task are taken, as lm-eval's `samples`; None for all."""
    sizes = {b: {name: len(task.eval_docs) for name, task in part.tasks.items()} for b, part in loaded.items()}
    if settings.limit is None:
        remarks += [f"{b.name}: all {sum(s.values())} items{_parts(s)}." for b, s in sizes.items()]
        return None
    plan: dict[str, list[int]] = {}
    for b, parts in sizes.items():
        taken = spread(settings.limit, parts)
        plan |= taken
        count = sum(map(len, taken.values()))
        remarks.append(f"{b.name}: {count} of {sum(parts.values())} items{_parts(parts)} (--limit {settings.limit}).")
    return plan


def _parts(sizes: Mapping[str, int]) -> str:
    return f" of {len(sizes)} subjects" if len(sizes) > 1 else ""


def prompt_hashes(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """One SHA-256 per benchmark over its prompts in order: equal hashes, equal questions."""

    def digest(hashes: Iterable[str]) -> str:
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    return {name: digest(item["prompt_hash"] for item in items) for name, items in samples.items()}
