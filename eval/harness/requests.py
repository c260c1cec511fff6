"""Requests of lm-eval's tasks, and their answers through the journal: what is known is not asked again."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from common.distributed import ProcessGroup
from common.errors import BadInputError, EvaluationError, ProjectError
from eval.benchmarks import Benchmark
from eval.data.protocol import Loaded
from eval.harness.journal import FACTS, Journal
from eval.progress import Progress
from eval.request_types import Answer, Backend, Facts, Request, digest, key_of
from eval.settings import Settings

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

    from common.files.json_values import JsonObject

InstanceRequests = Sequence[tuple["Instance", Sequence[Request]]]
"""lm-eval's instances of a benchmark, each with its requests."""
FactLists = dict[str, list[list[int | str | None]]]
"""Facts of an item's answers by name: a list per request, an entry per answer."""
Template = Callable[..., str]
KINDS: Mapping[str, Literal["generate", "score", "rolling"]] = {
    "generate_until": "generate",
    "loglikelihood": "score",
    "loglikelihood_rolling": "rolling",
}
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def build(
    loaded: Mapping[Benchmark, Loaded],
    settings: Settings,
    plan: Mapping[str, Sequence[int]] | None,
    scope: str,
    template: Template | None,
    special_tokens: Callable[[Benchmark], bool | None] = lambda _: None,
) -> dict[Benchmark, InstanceRequests]:
    """Let lm-eval build its prompts; return each of its instances with the requests it stands for.

    Args:
        loaded: The tasks of each benchmark.
        settings: `gen_kwargs` and `system_instruction` apply to every task.
        plan: Items of each task; None for all.
        scope: Digest of the model and how it is run.
        template: Renders a chat; None for plain prompts.
        special_tokens: Returns for a benchmark whether its prompts get the tokenizer's begin token; None leaves that
            to the tokenizer.

    Raises:
        EvaluationError: A task's own prompt code fails.
        BadInputError: A prompt cannot be encoded.
    """
    requests_by_benchmark: dict[Benchmark, InstanceRequests] = {}
    for benchmark, part in loaded.items():
        pairs: list[tuple[Instance, list[Request]]] = []
        requests_by_benchmark[benchmark] = pairs
        for name, task in part.tasks.items():
            with _one_bar():
                _build_task(benchmark, task, settings, plan.get(name) if plan else None, template)
            rule = special_tokens(benchmark)
            for instance in task.instances:
                if instance.request_type == "generate_until" and settings.gen_kwargs:
                    instance.arguments = (instance.args[0], {**instance.args[1], **settings.gen_kwargs})
                _check_encodable(instance, benchmark)
                requests = requests_of(instance, name, task.VERSION, settings.seed, digest(scope, rule), rule)
                pairs.append((instance, requests))
    return requests_by_benchmark


def _build_task(
    benchmark: Benchmark, task: Task, settings: Settings, chosen: Sequence[int] | None, template: Template | None
) -> None:
    try:
        type(task).build_all_requests(
            task,
            samples=list(chosen) if chosen is not None else None,
            system_instruction=settings.system_instruction,
            apply_chat_template=template is not None,
            fewshot_as_multiturn=True,
            chat_template=template,
            tokenizer_name="",
        )
    except ProjectError:
        raise
    except UnicodeEncodeError as error:
        raise BadInputError(
            f"{benchmark.name}: a prompt has half of a surrogate pair (U+{ord(error.object[error.start]):04X}), which "
            "no tokenizer encodes; correct the data or --system_instruction."
        ) from error
    except Exception as error:  # prompts are made by code of the task's own
        line = (str(error).strip().splitlines() or ["no details"])[0]
        raise EvaluationError(
            f"The prompts of {benchmark.name} could not be made ({type(error).__name__}: {line}); where --num_fewshot "
            "asks for more examples than the task has, ask for fewer."
        ) from error


def _check_encodable(instance: Instance, benchmark: Benchmark) -> None:
    """Raise BadInputError for a prompt or choice with half of a surrogate pair, which no tokenizer encodes."""
    for text in instance.args:
        if isinstance(text, str) and (half := re.search("[\ud800-\udfff]", text)):
            raise BadInputError(
                f"{benchmark.name}: the prompt of item {instance.doc_id} has half of a surrogate pair "
                f"(U+{ord(half[0]):04X} after {half.start()} characters), which no tokenizer encodes; correct the data "
                "or --system_instruction."
            )


def requests_of(
    instance: Instance, task: str, version: object, seed: int, scope: str, special_tokens: bool | None = None
) -> list[Request]:
    """Return the requests of one of lm-eval's instances: one, or as many as samples are drawn."""
    kind = KINDS[instance.request_type]
    arguments = instance.args
    doc = digest(instance.doc)
    texts = [str(a) for a in arguments if isinstance(a, str)]
    if kind != "generate":
        key = key_of(scope, task, version, doc, kind, texts, None)
        continuation = texts[1] if len(texts) > 1 else ""
        one = Request(key, task, instance.doc_id, instance.idx, kind, texts[0], continuation)
        return [replace(one, special_tokens=special_tokens)]
    settings = normal_settings(arguments[1])
    temperature = settings.pop("temperature")
    requests = []
    for number in range(instance.repeats or 1):
        draw = {"temperature": temperature, "sample": number, "seed": seed} if temperature else {}
        key = key_of(scope, task, version, doc, kind, texts, settings | draw)
        options = {k: v for k, v in settings.items() if k not in ("until", "max_tokens")}
        requests.append(
            Request(
                key, task, instance.doc_id, number, kind, texts[0], until=tuple(settings["until"]),
                max_tokens=settings["max_tokens"], temperature=temperature, seed=seed, options=options,
                special_tokens=special_tokens,
            )
        )  # fmt: skip
    return requests


def normal_settings(generation: JsonObject) -> JsonObject:
    """A task's generation settings with one spelling: until, a list; max_tokens; temperature, 0 for greedy; others."""
    rest = dict(generation)
    until = rest.pop("until", None) or []
    lengths = [rest.pop(name, None) for name in _LENGTH_NAMES]
    sampled = rest.pop("do_sample", None)
    temperature = float(rest.pop("temperature", 0.0) or 0.0)
    if sampled is True and not temperature:
        temperature = 1.0
    if sampled is False:
        temperature = 0.0
    return {
        **rest,
        "until": [until] if isinstance(until, str) else list(until),
        "max_tokens": int(next((n for n in lengths if n is not None), 256)),
        "temperature": temperature,
    }


def answer_all(
    requests_by_benchmark: Mapping[Benchmark, InstanceRequests],
    journal: Journal,
    backend: Callable[[], Backend],
    process_group: ProcessGroup,
    show: Callable[[str, int, int, float], Progress],
) -> dict[str, float]:
    """Ask for what the journal lacks, benchmark by benchmark; return the seconds each took, earlier runs included.

    `backend` is called when something is first to be asked, so that nothing is loaded where all is known. Each rank
    answers its slice.
    """
    seconds = {b.column: journal.spent[b.column] for b in requests_by_benchmark if b.column in journal.spent}
    for benchmark, pairs in requests_by_benchmark.items():
        unique = {r.key: r for _, requests in pairs for r in requests}
        open_ = [r for r in unique.values() if r.key not in journal.answers]
        mine = process_group.strided_slice(sorted(open_, key=lambda r: (-len(r.context), r.key)))
        if not open_:
            continue
        model = backend()
        started = time.monotonic()
        total, n_known = (len(mine), 0) if process_group.world_size > 1 else (len(unique), len(unique) - len(open_))
        progress = show(benchmark.column, total, n_known, sum(request.work for request in mine))

        def answered(
            request: Request,
            answer: Answer,
            facts: Facts,
            benchmark: Benchmark = benchmark,
            progress: Progress = progress,
            started: float = started,
        ) -> None:
            journal.add(request, answer, benchmark.column, time.monotonic() - started, facts)
            progress.one(request.work)
            process_group.check_ranks()

        try:
            model.answer(mine, answered)
        finally:
            progress.close()
        spent = seconds.get(benchmark.column, 0.0) + time.monotonic() - started
        seconds[benchmark.column] = round(spent, 1)
    return seconds


def assign(requests_by_benchmark: Mapping[Benchmark, InstanceRequests], journal: Journal) -> None:
    """Hand the journal's answers to lm-eval's instances. Raises EvaluationError where some are missing."""
    for benchmark, pairs in requests_by_benchmark.items():
        lacking = sum(r.key not in journal.answers for _, requests in pairs for r in requests)
        if lacking:
            raise EvaluationError(f"{lacking} answers of {benchmark.name} are missing from the journal.")
        for instance, requests in pairs:
            instance.resps = [journal.answers[r.key] for r in requests]


def facts_of(
    requests_by_benchmark: Mapping[Benchmark, InstanceRequests], journal: Journal
) -> dict[tuple[str, int], FactLists]:
    """Return what is known of each item's answers, by task and item number.

    Each of `tokens`, `finish` and `prompt_truncated` is a list like the sample's `resps`: one list for each request,
    one entry for each answer, None where the model does not tell.
    """
    facts: dict[tuple[str, int], FactLists] = {}
    for pairs in requests_by_benchmark.values():
        for _, requests in pairs:
            item = facts.setdefault((requests[0].task, requests[0].item), {name: [] for name in FACTS})
            facts_per_request = [journal.facts.get(r.key, Facts()) for r in requests]
            for name in FACTS:
                item[name].append([getattr(f, name) for f in facts_per_request])
    return facts


def truncated_prompts(requests_by_benchmark: Mapping[Benchmark, InstanceRequests], journal: Journal) -> dict[str, int]:
    """Return how many items of each benchmark had a truncated prompt; benchmarks without any are left out."""
    counts: dict[str, int] = {}
    for benchmark, pairs in requests_by_benchmark.items():
        items = {
            (r.task, r.item)
            for _, requests in pairs
            for r in requests
            if (f := journal.facts.get(r.key)) and f.prompt_truncated
        }
        if items:
            counts[benchmark.name] = len(items)
    return counts


@contextmanager
def _one_bar() -> Iterator[None]:
    """Leave out the bars of building prompts, one for each of MMLU's 57 subjects and each done in a moment."""
    from lm_eval.api import task

    bar = task.tqdm
    task.tqdm = lambda items, *args, **kwargs: items
    try:
        yield
    finally:
        task.tqdm = bar
