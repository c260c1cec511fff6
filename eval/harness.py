"""The lm-eval adapter: tasks, backends, one evaluation. The only file that imports lm_eval, and only when it runs.

`evaluate` may be called many times in one process; the tasks it has read stay in memory.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

from console.cli import say
from console.errors import EvaluationError, ProjectError, UsageError
from eval.backend import first_line, load_config, load_tokenizer, place, rows_per_batch, show_only, split
from eval.benchmarks import Benchmark
from eval.catalogue import folders_for
from eval.checks import check_length, check_model, own_length, usable_length
from eval.mirror import check_data, offer_nltk, redirected
from eval.protocol import Loaded, configure, plan_items, prompt_hashes, sandboxed_code_eval
from eval.quiet import environment, muted
from eval.result import EvalResult, Lineage, Score
from eval.scores import scores_of
from eval.settings import Settings
from eval.store import check_save_path, save
from eval.versions import versions

Samples = dict[str, list[dict[str, Any]]]


def evaluate(
    model: Any, settings: Settings, *, tokenizer: Any = None, name: str | None = None, save_path: Path | None = None
) -> EvalResult:
    """Evaluate one model and return its scores; with `save_path`, also write results and samples there.

    `model` is a checkpoint folder, a hub id, or a loaded transformers model with its `tokenizer`; `name` is what the
    result calls it (by default its path). Raises UsageError for what cannot be asked, EvaluationError for what cannot
    be done, both before weights are loaded wherever that can be known.
    """
    result, samples = evaluate_with_samples(model, settings, tokenizer=tokenizer, name=name)
    if save_path is not None:
        save(result, samples, save_path)
    return result


def evaluate_with_samples(
    model: Any, settings: Settings, *, tokenizer: Any = None, name: str | None = None
) -> tuple[EvalResult, Samples]:
    """As `evaluate`, and the samples (prompt, generation, verdict) by benchmark."""
    started = time.time()
    benchmarks = preflight(model, settings)
    label = name or (model if isinstance(model, str) else getattr(model, "name_or_path", "") or type(model).__name__)
    with ExitStack() as stack:
        stack.enter_context(environment(settings, local=not isinstance(model, str) or Path(model).is_dir()))
        stack.enter_context(muted(settings))
        settings = place(settings, model)
        if isinstance(model, str):
            tokenizer = load_tokenizer(model)
        elif tokenizer is None:
            raise UsageError("A loaded model needs its tokenizer: evaluate(model, settings, tokenizer=...).")
        if settings.apply_chat_template and not getattr(tokenizer, "chat_template", None):
            raise UsageError(f"The tokenizer of {label} has no chat template; leave out --apply_chat_template.")
        config = (load_config(model) if isinstance(model, str) else model.config).to_dict()
        check_length(own_length(config), settings.max_model_len, label)
        length = usable_length(own_length(config), settings.max_model_len)
        loaded = _load(tuple(benchmarks), settings)
        remarks = configure(loaded, settings, length)
        plan = plan_items(loaded, settings, remarks)
        for remark in remarks:
            say(remark, settings.quiet)
        with muted(settings, progress=True):
            lm, used = _model(model, tokenizer, config, settings, length, label)
            raw = _run(lm, loaded, settings, plan)
        del lm
        gc.collect()  # the next model of the same process finds the memory free
    by_task: Mapping[str, list[dict[str, Any]]] = raw.pop("samples")
    tagged = {t: [{"task": t, **s} for s in items] for t, items in by_task.items()}
    samples = {b.task: [s for t in loaded[b].tasks for s in tagged[t]] for b in benchmarks}
    scores: dict[str, Score] = {}
    for b in benchmarks:
        scores |= scores_of(b, list(loaded[b].tasks), raw, tagged)
    used |= {"remarks": remarks, "seconds": round(time.time() - started, 1), "prompts_sha256": prompt_hashes(samples)}
    asked = {"limit": settings.limit, "batch_size": settings.batch_size, "random_seed": settings.seed}
    config = {"model": used["backend"], "model_args": {"pretrained": label}, **asked, **used}
    result = EvalResult(
        model=label,
        scores=scores,
        lineage=Lineage.of_checkpoint(label),
        settings={**settings.recorded(), **used},
        versions=versions(),
        harness={**raw, "config": config, "date": started},
    )
    return result, samples


def preflight(model: Any, settings: Settings, save_path: Path | None = None) -> list[Benchmark]:
    """Check everything that needs no heavy import; return the benchmarks. Raises UsageError or EvaluationError."""
    settings.check()
    benchmarks = settings.chosen()
    if isinstance(model, str):
        check_model(model, settings.apply_chat_template, settings.max_model_len)
        Lineage.of_checkpoint(model)  # a broken run record is said now, not after hours of scoring
    if save_path is not None:
        check_save_path(save_path)
    if settings.offline:
        check_data(benchmarks, settings.data_dir)
    return benchmarks


def _load(benchmarks: tuple[Benchmark, ...], settings: Settings) -> Mapping[Benchmark, Loaded]:
    """The tasks of all benchmarks: kept for the next model, unless the user's own files, which may change, are read."""
    offer_nltk(settings.data_dir)
    read = _read if settings.include_path else _kept
    return read(benchmarks, settings.data_dir, settings.offline, settings.include_path)


def _read(
    benchmarks: tuple[Benchmark, ...], data_dir: Path | None, offline: bool, include_path: Path | None
) -> Mapping[Benchmark, Loaded]:
    """Read tasks and their data. Raises UsageError for an unknown name, EvaluationError for data that is not there."""
    manager = _indexed(benchmarks, include_path)
    loaded: dict[Benchmark, Loaded] = {}
    with redirected(data_dir, offline), sandboxed_code_eval():
        for b in benchmarks:
            try:
                found = manager.load([b.task])
            except ProjectError:
                raise
            except Exception as error:  # task files run code of their own
                raise EvaluationError(f"The benchmark {b.name!r} could not be read: {first_line(error)}") from error
            shipped = {n: deepcopy(t.get_config("generation_kwargs")) for n, t in found["tasks"].items()}
            loaded[b] = Loaded(found["tasks"], found.get("groups", {}), shipped)
    return loaded


_kept = lru_cache(maxsize=4)(_read)


def _indexed(benchmarks: tuple[Benchmark, ...], include_path: Path | None) -> Any:
    """lm-eval's index of the folders needed; of everything only where a group's parts are not found beside it."""
    from lm_eval.tasks import TaskManager

    own = [str(include_path)] if include_path else []
    known = TaskManager(include_path=own, include_defaults=False).all_tasks if own else ()
    folders = [str(f) for f in folders_for(benchmarks, known)]
    manager = TaskManager(include_path=folders + own, include_defaults=False)
    if any(_members(b.task, manager) is None for b in benchmarks):
        manager = TaskManager(include_path=folders + own, include_defaults=True)
    for b in benchmarks:
        if _members(b.task, manager) is None:
            raise EvaluationError(f"lm-eval could not read the task files of benchmark {b.name!r}.")
    return manager


def _members(name: str, manager: Any) -> list[str] | None:
    """The leaf tasks behind a name; None where the index lacks one of them."""
    entry = manager.task_index.get(name)
    if entry is None:
        return None
    if entry.kind.name not in ("GROUP", "TAG"):
        return [name]
    children = entry.tags if entry.kind.name == "TAG" else entry.cfg.get("task") or ()
    if isinstance(children, str) or any(not isinstance(child, str) for child in children):
        return [name]  # tasks written out inside the group's file
    parts = [_members(child, manager) for child in sorted(children)]
    return None if any(p is None for p in parts) else [leaf for p in parts if p for leaf in p]


def _model(
    model: Any, tokenizer: Any, config: Mapping[str, Any], settings: Settings, length: int, label: str
) -> tuple[Any, dict[str, Any]]:
    """Return lm-eval's model and what was decided. Raises EvaluationError where it cannot be loaded."""
    batch = rows_per_batch(settings, config)
    try:
        lm = (_vllm if settings.backend == "vllm" else _hf)(model, tokenizer, settings, batch, length)
    except Exception as error:  # loading runs third-party code for every architecture
        raise EvaluationError(f"The model {label} could not be loaded: {first_line(error)}") from error
    dtype = str(getattr(getattr(lm, "model", None), "dtype", settings.dtype)).removeprefix("torch.")
    used = {"backend": settings.backend, "device": settings.device, "n_gpu": settings.n_gpu, "dtype_used": dtype}
    return lm, used | {"batch_size_used": batch, "max_length": length}


def _hf(model: Any, tokenizer: Any, settings: Settings, batch: int | str, length: int) -> Any:
    """transformers on the CPU, on one GPU, or with its layers over several."""
    from lm_eval.models.huggingface import HFLM

    common = {"tokenizer": tokenizer, "max_length": length, "batch_size": batch}
    if not isinstance(model, str):
        return HFLM(pretrained=model, **common)
    name, revision = split(model)
    show_only(settings)
    several = (settings.n_gpu or 0) > 1
    return HFLM(name, revision=revision, dtype=settings.dtype, device=settings.device, parallelize=several, **common)


def _vllm(model: str, tokenizer: Any, settings: Settings, batch: int | str, length: int) -> Any:
    """vLLM, tensor-parallel over the GPUs; it loads its tokenizer itself. No test of ours runs it."""
    from lm_eval.models.vllm_causallms import VLLM

    show_only(settings)
    name, revision = split(model)
    return VLLM(
        pretrained=name,
        revision=revision,
        dtype=settings.dtype,
        tensor_parallel_size=settings.n_gpu or 1,
        max_model_len=length,
        batch_size=batch,
        seed=settings.seed,
    )


def _run(lm: Any, loaded: Mapping[Benchmark, Loaded], settings: Settings, plan: Any) -> dict[str, Any]:
    """Generate and score by lm-eval, seeded."""
    import random

    import numpy as np
    import torch
    from lm_eval import evaluator

    random.seed(settings.seed)
    np.random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    tasks: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
    for part in loaded.values():
        tasks["tasks"] |= part.tasks
        tasks["groups"] |= part.groups
    with _one_bar():
        raw = evaluator.evaluate(
            lm=lm,
            task_dict=tasks,
            samples=plan,
            bootstrap_iters=1000,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=True,
            confirm_run_unsafe_code=settings.allow_code_execution,
        )
    return dict(raw)


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
