"""Making a checkpoint that was planned: stage, stream, side files, lock, and only then the place it was asked for."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console.cli import say
from console.errors import UsageError
from merging.card import licences_of, pipeline_tag_of, write_card
from merging.chat_template import ChatTemplate, write_template
from merging.checks import check_space
from merging.digests import InputDigests
from merging.health import as_markdown, by_layer
from merging.layout import Inputs
from merging.load_check import check_loads
from merging.lock import (
    FORMAT,
    check_inputs,
    check_others,
    check_tensors,
    describe_input,
    files_of,
    small_files,
    tensors_of,
    write_lock,
)
from merging.mergekit_writer import write_mergekit
from merging.planned import Plan
from merging.scratch import is_scratch
from merging.sidefiles import make_configs, versions, write_configs, write_record
from merging.stage import Stage, check_target, staged
from merging.tokenizer import write_tokenizer
from merging.writer import ShardedWriter, parse_size

if TYPE_CHECKING:
    from merging.checkpoint import Checkpoint
    from merging.stream import Job


@dataclass(frozen=True)
class Output:
    """Where and how the merged checkpoint is written.

    expected: a lock that the result must repeat. health: whether figures per layer are taken; load_check: whether the
    planned folder is loaded in transformers before it is written.
    """

    save_path: Path
    max_shard_size: str = "5GB"
    overwrite: bool = False
    device: str = "auto"
    quiet: bool = False
    resume: bool = False
    allow_nonfinite: bool = False
    health: bool = False
    load_check: bool = True
    expected: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Relaxing:
    """AIM applied in the same pass: made by the caller from the base, since merging knows no activations.

    `make(base, plan)` returns the relaxation of the loop; `details` is called after it for the run record.
    """

    omega: float
    importance_file: Path
    make: Callable[[Checkpoint, Plan], Any]
    details: Callable[[], Mapping[str, Any]]


@dataclass(frozen=True)
class Work:
    """A checkpoint that is to be made: everything decided, nothing written.

    recipe: what a lock repeats it from; make_job loads torch and what the loop needs; details: for the run record,
    called at the end; files: inputs besides the checkpoints (an importance file); whole_matrix: whether products of
    whole matrices enter, whose last bits depend on the number of threads.
    """

    program: str
    label: str
    paper: str
    inputs: Inputs
    plan: Plan
    template: ChatTemplate
    recipe: Mapping[str, Any]
    sources: Mapping[str, str]
    lineage: Mapping[str, Any]
    notes: tuple[str, ...]
    make_job: Callable[[], Job]
    details: Callable[[], Mapping[str, Any]] = field(default=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    whole_matrix: bool = False
    mergekit: tuple[Mapping[str, Any], Sequence[str]] | None = None


def produce(work: Work, output: Output) -> Path:
    """Write the checkpoint that was planned and return its folder.

    Raises UsageError, CheckpointError or FailureError; then nothing is at the target that was not there before.
    """
    started = time.perf_counter()
    inputs, quiet = work.inputs, output.quiet
    check_output(work, output)
    licences = licences_of(inputs.all)
    for note in (*work.notes, *([licences.warning] if licences.warning else [])):
        say(note, quiet)
    job = _with_output(work.make_job(), output)
    files = [*(file for checkpoint in inputs.all for file in files_of(checkpoint)), *work.files.values()]
    configs = make_configs(inputs, work.plan)
    unloaded = check_loads(work.plan, configs, inputs.donor.tensors) if output.load_check else None
    if unloaded:
        say(unloaded, quiet)
    with (
        staged(output.save_path, output.overwrite, _key(work, files, output, job), output.resume, quiet) as stage,
        InputDigests(files) as digests,
    ):
        said = _write(work, output, stage, job, configs)
        health = _health(work, stage) if output.health else None
        name = output.save_path.name
        tag = pipeline_tag_of(configs["config.json"])
        write_card(stage.folder, name, work.lineage, work.recipe, work.paper, licences, tag, health)
        lock = _lock(work, output, stage, job, digests.all())
        write_lock(stage.folder, lock)
        details = {
            "recipe": dict(work.recipe),
            "sources": dict(work.sources),
            "inputs": [{"name": c.name, "commit": c.commit} for c in inputs.all],
            **_account(work, stage),
            **work.details(),
            "seconds": round(time.perf_counter() - started, 3),
        }
        write_record(stage.folder, work.lineage, details)
    for sentence in said:
        say(sentence, quiet)
    if health:
        print(health)
    return output.save_path


def check_output(work: Work, output: Output) -> None:
    """Refuse an output that cannot be written, or that would touch an input. Raises UsageError, FailureError."""
    parse_size(output.max_shard_size)
    taken = [*(place for checkpoint in work.inputs.all for place in checkpoint.places), *work.files.values()]
    check_target(output.save_path, output.overwrite, taken)
    check_space(output.save_path, work.plan.bytes)


def _with_output(job: Job, output: Output) -> Job:
    """The job with what the output asks of the loop. Raises UsageError for what does not go together."""
    if output.health and job.reference:
        raise UsageError("--health looks at blocks in float32, and does not go with --numerics reference.")
    job = replace(job, allow_nonfinite=output.allow_nonfinite)
    if not output.health:
        return job
    from merging.observe import TensorHealth

    return replace(job, observe=TensorHealth)


def _key(work: Work, files: Sequence[Path], output: Output, job: Job) -> str:
    """What an interrupted run must have in common with the one that goes on with it: all that the bytes depend on."""
    lasting = [file for file in files if not is_scratch(file)]
    seen = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in lasting]
    same = [work.program, work.recipe, seen, versions(), output.max_shard_size, output.health, str(job.device)]
    return hashlib.sha256(json.dumps(same, default=str).encode()).hexdigest()


def _write(work: Work, output: Output, stage: Stage, job: Job, configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Write weights, tokenizer and configs; returns what is to be said at the end."""
    from merging import stream

    writer = ShardedWriter(stage.folder, work.plan.tensors, parse_size(output.max_shard_size), stage.journal)
    stream.run(work.plan, job, writer, output.quiet, work.label)
    writer.close()
    vocabulary = work.plan.vocabulary
    said = []
    if not write_tokenizer(vocabulary, work.inputs.all, stage.folder):
        said.append(f"{vocabulary.name} has no tokenizer files; the result has none.")
    write_template(work.template, stage.folder)
    write_configs(stage.folder, configs)
    if work.mergekit is not None:
        write_mergekit(stage.folder, *work.mergekit)
    for entry in stage.journal.entries:
        if "nonfinite" in entry:
            said.append(f"Tensor {entry['name']}: not finite in {entry['nonfinite']} places.")
    return said


def _health(work: Work, stage: Stage) -> str:
    merged = {tensor.name for tensor in work.plan.tensors if tensor.is_merged}
    found = ((entry["name"], entry["health"]) for entry in stage.journal.entries if entry["name"] in merged)
    rows = by_layer(found, len(work.inputs.models))
    return as_markdown(rows, [model.name for model in work.inputs.models])


def _lock(work: Work, output: Output, stage: Stage, job: Job, digests: Mapping[Path, str]) -> dict[str, Any]:
    """The lock of what is in the stage. Raises CheckpointError where it does not repeat the expected one."""
    import torch

    inputs = [describe_input(checkpoint, digests) for checkpoint in work.inputs.all]
    others = {name: digests.get(file) for name, file in work.files.items()}
    tensors = tensors_of(work.plan, stage.journal.entries)
    if output.expected is not None:
        check_inputs(output.expected, inputs)
        check_others(output.expected, others)
        check_tensors(output.expected, tensors)
    return {
        "format": FORMAT,
        "program": work.program,
        "recipe": dict(work.recipe),
        "sources": dict(work.sources),
        "device": job.device.type,
        **({"threads": torch.get_num_threads()} if work.whole_matrix else {}),
        "max_shard_size": output.max_shard_size,
        "versions": versions(),
        "inputs": inputs,
        "other_inputs": others,
        "files": small_files(stage.folder),
        "tensors": tensors,
    }


def _account(work: Work, stage: Stage) -> dict[str, Any]:
    """What became of the tensors, the vocabulary and the tokenizer, for the run record."""
    tensors = work.plan.tensors
    return {
        "tensors": {
            "merged": sum(t.is_merged for t in tensors),
            "copied": sum(not t.is_merged for t in tensors),
            "aligned": [t.name for t in tensors if any(source.alignment for source in t.sources)],
            "left_out": dict(work.plan.left_out),
            "nonfinite": {e["name"]: e["nonfinite"] for e in stage.journal.entries if "nonfinite" in e},
        },
        "notes": list(work.notes),
        "tokenizer": {"from": work.plan.vocabulary.name, "chat_template": work.template.origin},
    }
