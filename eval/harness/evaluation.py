"""One evaluation from model to result: tasks, prompts, answers (through the journal), scores.

`evaluate` may be called many times in one process; the tasks it has read stay in memory.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.distributed import SINGLE_PROCESS, ProcessGroup, launcher_ranks
from common.errors import EvaluationError, UsageError
from common.files.json_values import JsonObject
from common.logging import logger
from common.versions import EVALUATION, package_versions, versions
from eval.benchmarks import Benchmark
from eval.data.data_sources import check_data
from eval.harness import identity, models
from eval.harness.checks import check_model
from eval.harness.journal import Journal
from eval.harness.models import EvaluatedModel
from eval.harness.references import label_of
from eval.harness.server import Server
from eval.log_filters import environment, muted
from eval.model_args import SAMPLING
from eval.progress import Progress
from eval.request_types import Backend
from eval.results.answer_facts import answer_facts
from eval.results.result import EvalResult, Lineage
from eval.results.store import check_save_path, model_folder, save
from eval.sandbox.supervisor import containment
from eval.seeding import seeded
from eval.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from eval.data.protocol import Loaded
    from eval.harness.requests import FactLists, InstanceRequests

Samples = dict[str, list[JsonObject]]
"""lm-eval's samples by task or benchmark."""


@dataclass(frozen=True)
class Identity:
    """Identity of a model in its result: digest, commit and hardware."""

    digest: str
    commit: str | None
    gpus: tuple[str, ...] = ()


def evaluate(
    model: str | PreTrainedModel,
    settings: Settings,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str | None = None,
    save_path: Path | None = None,
) -> EvalResult:
    """Evaluate one model and return its scores; with `save_path`, also write results and samples there.

    `model` is a checkpoint folder, a hub id, or a loaded transformers model with its `tokenizer`; `name` is what the
    result calls it (by default its path). With `save_path`, answers are kept there as they come, and those of an
    earlier run are not asked for again. Raises UsageError or BadInputError for what cannot be asked, EvaluationError
    for what cannot be done, before weights are loaded wherever that can be known.
    """
    result, samples = evaluate_with_samples(model, settings, tokenizer=tokenizer, name=name, save_path=save_path)
    if save_path is not None:
        save(result, samples, save_path)
    return result


def evaluate_with_samples(
    model: str | PreTrainedModel,
    settings: Settings,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str | None = None,
    save_path: Path | None = None,
) -> tuple[EvalResult, Samples]:
    """Evaluate and also return the samples (prompt, generation, verdict) by benchmark; writes the journal only."""
    if launcher_ranks()[1] > 1:
        raise UsageError(
            "evaluate() and evaluate_with_samples() run in one process; on several ranks call evaluate_on_ranks() "
            "within common.distributed.init_distributed()."
        )
    evaluated = evaluate_on_ranks(model, settings, tokenizer=tokenizer, name=name, save_path=save_path)
    assert evaluated is not None
    return evaluated


def evaluate_on_ranks(
    model: str | PreTrainedModel,
    settings: Settings,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str | None = None,
    save_path: Path | None = None,
    benchmarks: list[Benchmark] | None = None,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> tuple[EvalResult, Samples] | None:
    """Answer this rank's slice of the requests; return the result of all ranks on rank 0, None on the others.

    `benchmarks` are what `preflight` returned, where the caller has checked already. Raises StoppedError where another
    rank has ended.
    """
    started = time.time()
    benchmarks = preflight(model, settings) if benchmarks is None else benchmarks
    if process_group.world_size > 1 and save_path is None:
        raise EvaluationError("Several ranks share answers through the journal in save_path; give a save_path.")
    screen = sys.stderr
    with ExitStack() as stack:
        stack.enter_context(environment(settings, local=not isinstance(model, str) or Path(model).is_dir()))
        stack.enter_context(muted(settings))
        settings = models.resolve_device(settings, model, process_group)
        subject = models.describe(model, settings, tokenizer, name)
        from eval.data.loading import load
        from eval.data.protocol import configure, plan_items
        from eval.harness import grading
        from eval.harness import requests as asking

        loaded = load(tuple(benchmarks), settings)
        remarks = configure(loaded, settings, subject.length)
        plan = plan_items(loaded, settings, remarks)
        remarks += _setting_remarks(settings)

        def report(warning: str) -> None:
            if warning not in remarks:
                remarks.append(warning)
                logger.info(warning)

        for warning in remarks:
            logger.info(warning)
        subject = models.with_weights(subject, settings)
        who, scope = _identified(subject, settings, save_path)
        with seeded(settings.seed):
            template = subject.template(settings.apply_chat_template, report)
            rule = models.special_tokens_of(subject, settings)
            requests = asking.build(loaded, settings, plan, scope, template, rule)
        _check_thinking(requests, settings)
        journal = stack.enter_context(
            Journal(model_folder(save_path, subject.label) if save_path else None, process_group.rank)
        )
        if settings.no_cache:
            journal.forget()
        process_group.barrier()  # before anybody adds to the journal: the shares follow from what it lacks
        n_known = _count_known_answers(requests, journal)
        superseded = journal.superseded(r for pairs in requests.values() for _, part in pairs for r in part)
        if superseded:
            report(
                f"The journal holds {superseded} answers to these items from another checkpoint, prompt, setting or "
                "version; they are not used."
            )
        prepared = round(time.time() - started, 1)  # imports, tokenizer, tasks, prompts: what comes before the weights
        source = _Lazy(subject, settings, who, journal, report)

        def show(column: str, total: int, done: int, expected_seconds: float) -> Progress:
            return Progress(column, total, done, not settings.quiet and process_group.is_main, expected_seconds, screen)

        with muted(settings, progress=True):
            seconds = asking.answer_all(requests, journal, source, process_group, show)
        used = source.used()
        source.backend = None
        gc.collect()  # the next model of the same process finds the memory free
        process_group.barrier()
        if not process_group.is_main:
            return None
        if process_group.world_size > 1:
            journal.reread()
        asking.assign(requests, journal)
        truncated = asking.truncated_prompts(requests, journal)
        for benchmark, count in truncated.items():
            report(f"{benchmark}: the prompts of {count} items lost their beginning to fit {subject.length} tokens.")
        raw = grading.grade(loaded, plan, settings)
        add_facts(raw["samples"], asking.facts_of(requests, journal))
    seconds = {"total": round(time.time() - started, 1), "prepare": prepared, "load": source.seconds} | seconds
    settings_used = settings.recorded() | used | {"max_length": subject.length, "processes": process_group.world_size}
    settings_used |= {"remarks": remarks, "answers": n_known, "prompts_truncated": truncated}
    return assembled(subject.label, benchmarks, loaded, raw, settings_used, who, seconds, started)


def assembled(
    label: str,
    benchmarks: list[Benchmark],
    loaded: Mapping[Benchmark, Loaded],
    raw: JsonObject,
    settings: JsonObject,
    who: Identity,
    seconds: Mapping[str, float],
    started: float,
) -> tuple[EvalResult, Samples]:
    """Put lm-eval's dictionary, scores, outcomes and circumstances into one result; samples by benchmark."""
    from eval.data.protocol import prompt_hashes
    from eval.harness.scores import Found, scores_of
    from eval.tasks.code import CODE_EVAL
    from eval.tasks.scoring import sizes_of

    by_task: Samples = raw.pop("samples")
    tagged = {t: [{"task": t, **s} for s in items] for t, items in by_task.items()}
    samples = {b.task: [s for t in loaded[b].tasks for s in tagged[t]] for b in benchmarks}
    further = sizes_of(settings["n_samples"])
    columns: Found = {}
    for b in benchmarks:
        columns |= scores_of(b, loaded[b], raw, tagged, further if b.samples else ())
    answers = {b.column: facts for b in benchmarks if (facts := answer_facts(samples[b.task]))}
    data = {b.name: dict(loaded[b].data) for b in benchmarks if loaded[b].data}
    settings = settings | {"containment": CODE_EVAL.record()}
    settings = settings | {"prompts_sha256": prompt_hashes(samples), "data": data}
    config = {"model": settings["backend"], "model_args": {"pretrained": label}, "random_seed": settings["seed"]}
    result = EvalResult(
        model=label,
        scores={column: score for column, (score, _) in columns.items()},
        lineage=Lineage.of_checkpoint(label),
        settings=settings,
        versions=versions(EVALUATION),
        harness={**raw, "config": {**config, **settings}, "date": started},
        outcomes={column: outcomes for column, (_, outcomes) in columns.items() if outcomes is not None},
        answers=answers,
        digest=who.digest,
        commit=who.commit,
        hardware=identity.hardware(who.gpus),
        seconds=dict(seconds),
        project_commit=identity.project_commit(),
    )
    return result, samples


def preflight(model: str | PreTrainedModel, settings: Settings, save_path: Path | None = None) -> list[Benchmark]:
    """Check everything that needs no heavy import; return the benchmarks. Raises UsageError or BadInputError."""
    settings.check()
    benchmarks = settings.chosen()
    if any(b.runs_code for b in benchmarks):
        containment(settings.sandbox == "weak")
    if settings.backend == "openai":
        if not isinstance(model, str):
            raise UsageError("--backend openai asks a server for a model by its name; give the name it is served by.")
        Server(str(settings.base_url)).check(model)
    elif isinstance(model, str):
        check_model(model, settings.apply_chat_template, settings.max_model_len)
        Lineage.of_checkpoint(label_of(model))  # a broken run record is said now, not after hours of scoring
    if save_path is not None:
        check_save_path(save_path)
    if settings.offline:
        check_data(benchmarks, settings.data_dir)
    return benchmarks


def _identified(subject: EvaluatedModel, settings: Settings, save_path: Path | None) -> tuple[Identity, str]:
    """The model's identity, and the scope of its answers; a loaded model is only digested for a journal."""
    if not isinstance(subject.model, str) and save_path is None:
        return Identity("not taken", None), "in memory"
    digest, commit = models.identify(subject, settings)
    return Identity(digest, commit, _gpus(settings)), models.scope_of(digest, settings, subject)


def _gpus(settings: Settings) -> tuple[str, ...]:
    if not settings.device.startswith("cuda"):
        return ()
    import torch

    _, _, index = settings.device.partition(":")
    numbers = [int(index)] if index else range(settings.n_gpu or 1)
    return tuple(torch.cuda.get_device_name(i) for i in numbers)


def _count_known_answers(requests: Mapping[Benchmark, InstanceRequests], journal: Journal) -> dict[str, int]:
    keys = {r.key for pairs in requests.values() for _, part in pairs for r in part}
    count = sum(key in journal.answers for key in keys)
    return {"from the journal": count, "new": len(keys) - count}


def _setting_remarks(settings: Settings) -> list[str]:
    """Return the backend that runs, and settings without an effect."""
    package = {"hf": "transformers", "vllm": "vllm", "openai": "lm-eval"}[settings.backend]
    where = str(settings.base_url) if settings.backend == "openai" else f"{settings.device}, {settings.dtype}"
    version = package_versions((package,)).get(package.replace("-", "_"), "")
    remarks = [f"Backend: lm-eval's {settings.backend} ({package} {version}) on {where}."]
    temperature = settings.gen_kwargs.get("temperature") or settings.temperature or settings.gen_kwargs.get("do_sample")
    idle = [name for name in SAMPLING if name in settings.gen_kwargs]
    if idle and not temperature:
        remarks.append(
            f"--gen_kwargs {', '.join(idle)} without a temperature above 0: greedy answers do not depend on it."
        )
    if settings.batch_size.startswith("auto:") and not settings.device.startswith("cuda"):
        remarks.append(f"--batch_size {settings.batch_size} is auto without a GPU: memory is estimated for each batch.")
    return remarks


def _check_thinking(requests: Mapping[Benchmark, InstanceRequests], settings: Settings) -> None:
    """Raise UsageError where a reasoning model is to score choices, which it does without its reasoning."""
    if not settings.model_args.get("enable_thinking"):
        return
    names = [b.name for b, pairs in requests.items() if any(r.kind != "generate" for _, rs in pairs for r in rs)]
    if names:
        raise UsageError(f"--model_args enable_thinking=true: {', '.join(names)} scores choices without generating.")


def add_facts(samples: Samples, facts: Mapping[tuple[str, int], FactLists]) -> None:
    """Add number of tokens, finish reason and truncation of each answer to the samples."""
    for task, items in samples.items():
        for item in items:
            item.update(facts.get((task, item["doc_id"]), {}))


class _Lazy:
    """The backend, made when it is first needed."""

    def __init__(
        self, subject: EvaluatedModel, settings: Settings, who: Identity, journal: Journal,
        report: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.subject, self.settings, self.who, self.journal = subject, settings, who, journal
        self.report = report
        self.backend: Backend | None = None
        self.seconds = 0.0

    def __call__(self) -> Backend:
        if self.backend is None:
            started = time.monotonic()
            self.backend = models.make_backend(self.subject, self.settings)
            self.seconds = round(time.monotonic() - started, 1)
            for warning in self.backend.remarks:
                self.report(warning)
            run = {"model": self.subject.label, "digest": self.who.digest, "settings": self.settings.recorded()}
            self.journal.begin(run | {"versions": versions(EVALUATION), "time": time.strftime("%Y-%m-%d %H:%M:%S")})
        return self.backend

    def used(self) -> JsonObject:
        return dict(self.backend.used()) if self.backend is not None else {}
