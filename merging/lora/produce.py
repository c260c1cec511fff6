"""Making an adapter that was planned: stage, tensors, config, tokenizer, card, lock, and only then its place."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import CheckpointError, UsageError
from common.files.file_state import check_unchanged, states_of
from common.files.temporary import is_temporary
from common.logging import logger
from common.versions import MERGING, package_versions, versions
from merging.checkpoints.licenses import licenses_of
from merging.checkpoints.model_folder import tokenizer_files
from merging.lora.check import check_adapter_loads
from merging.lora.work import AdapterWork, described_base, described_inputs
from merging.output.digests import digest_of
from merging.output.preparation import prepared
from merging.output.records.card import Licenses, pipeline_tag_of, write_adapter_card
from merging.output.records.lock import (
    FORMAT,
    check_inputs,
    check_others,
    check_tensors,
    read_lock,
    small_files,
    tensors_of,
    write_lock,
)
from merging.output.records.run_record import write_record
from merging.output.shards import lay_out
from merging.output.staging.output_path import RECORD, check_target
from merging.output.staging.publication_check import check_files, check_small_files
from merging.output.staging.publication_check import check_tensors as check_written_tensors
from merging.output.staging.stage import Stage, recover, staged, written_bytes
from merging.output.writer import ShardedWriter, parse_size
from merging.pipeline import ended
from merging.plan.checks import check_space
from merging.plan.merge_plan import Output, Variant
from merging.plan.result_config import make_configs

CONFIG, STEM = "adapter_config.json", "adapter_model"


def produce_adapter(work: AdapterWork, output: Output) -> Path:
    """Write the adapter that was planned, or one for each omega in a folder of its own, and return the folder.

    Adapters are small: rank 0 makes them, and the other ranks share the calibration. Raises
    UsageError, CheckpointError or FailureError; then nothing is at the target that was not there before.
    """
    with ended(work.relaxing.finished if work.relaxing else lambda _: None, output.process_group):
        if not output.process_group.is_main:
            if work.relaxing:
                work.make()
            return output.save_path
        recover(output.save_path)
        check_adapter_output(work, output)
        with prepared_tokenizer(work) as tokenizer:
            return _make(work, output, tokenizer)


@contextmanager
def prepared_tokenizer(work: AdapterWork) -> Iterator[Sequence[Path]]:
    """Yield the finished files of the tokenizer that the adapter brings, tried beside the config of the whole model.

    Raises CheckpointError where it does not fit.
    """
    if not work.has_tokenizer:
        yield ()
        return
    with prepared(work.inputs, work.plan.of_model, work.template) as small:
        yield tokenizer_files(small.folder)


def _make(work: AdapterWork, output: Output, tokenizer: Sequence[Path]) -> Path:
    """Make the rest: all but the tokenizer."""
    started = time.perf_counter()
    licenses = licenses_of(work.inputs.all)
    for note in (*work.notes, *work.remarks, *([licenses.warning] if licenses.warning else [])):
        logger.info(note)
    configs, _ = make_configs(work.inputs, work.plan.of_model)
    config = configs["config.json"]
    untried = check_adapter_loads(work.plan, work.settings, config) if output.load_check else None
    if untried:
        logger.info(untried)
    others = states_of(work.files.values())
    maker = work.make()
    others = states_of(work.files.values()) | others  # an importance file may be new
    parts = [variant.folder for variant in work.variants]
    with staged(output.save_path, output.overwrite, _key(work), output.resume, parts) as stages:
        _write_tensors(work, output, stages, maker)
        inputs = _inputs(work, output.expected)
        for variant, stage in zip(work.variants, stages, strict=True):
            seconds = time.perf_counter() - started
            _finish(work, output, variant, stage, inputs, licenses, pipeline_tag_of(config), tokenizer, seconds)
        if len(stages) > 1:
            write_record(stages[0].folder.parent, work.lineage, {"recipe": dict(work.recipe), "variants": parts})
        for stage in stages:
            check_result(work, stage)
        for checkpoint in work.inputs.all:
            check_unchanged(checkpoint.states)
        check_unchanged(others)
    return output.save_path


def check_adapter_output(work: AdapterWork, output: Output) -> None:
    """Refuse an output that cannot be written, or that would touch an input. Raises UsageError, FailureError."""
    if output.layer_stats:
        raise UsageError("--layer_stats needs whole tensors, which --save_as adapter does not make; leave it out.")
    parse_size(output.max_shard_size)
    places = [place for checkpoint in work.inputs.all for place in checkpoint.places]
    kept = [*work.files.values(), *(work.relaxing.kept if work.relaxing else ())]
    check_target(output.save_path, output.overwrite, [*places, *kept], output.resume)
    check_space(output.save_path, work.bytes, written_bytes(output.save_path))


def _key(work: AdapterWork) -> str:
    """What an interrupted run must have in common with the one that goes on with it: all that the bytes depend on."""
    files = [*(f for checkpoint in work.inputs.all for f in checkpoint.files), *work.files.values()]
    lasting = [file for file in files if not is_temporary(file) and file.exists()]
    seen = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in lasting]
    results = [(variant.folder, variant.recipe) for variant in work.variants]
    same = [work.program, work.recipe, results, seen, package_versions(MERGING)]
    return hashlib.sha256(json.dumps(same, default=str).encode()).hexdigest()


def _write_tensors(work: AdapterWork, output: Output, stages: Sequence[Stage], maker: Any) -> None:
    """Write the tensors of all results, each read once."""
    from merging.engine import loop

    writers = [ShardedWriter(stage.folder, work.plan.tensors, math.inf, stage.journal, STEM) for stage in stages]
    done = min(writer.done for writer in writers)
    for writer in writers:
        writer.rewind(done)
    job = replace(maker.job, allow_nonfinite=output.allow_nonfinite)
    try:
        loop.run(work.plan, job, writers, work.label, blocks_of=maker.blocks)
        for writer in writers:
            writer.close()
    except BaseException:
        for writer in writers:
            writer.abandon()
        raise


def check_result(work: AdapterWork, stage: Stage) -> None:
    """Check a finished adapter on the disk before it is published. Raises DamagedError."""
    shards = lay_out(work.plan.tensors, math.inf, STEM)
    check_files(stage.folder, shards)
    check_written_tensors(stage.folder, shards, stage.journal.entries)
    check_small_files(stage.folder, read_lock(stage.folder)["files"], (RECORD, "README.md"))


def _inputs(work: AdapterWork, expected: Mapping[str, Any] | None) -> dict[str, Any]:
    """The part of a lock that tells of the inputs. Raises CheckpointError where they are not the expected lock's."""
    inputs, base = described_inputs(work), described_base(work)
    others = {name: digest_of(file) for name, file in work.files.items()}
    if expected is not None:
        check_inputs(expected, inputs)
        check_others(expected, others)
        check_base(expected, base, work.base.name)
    return {"inputs": inputs, "base_weights": base, "other_inputs": others}


def check_base(lock: Mapping[str, Any], found: Mapping[str, Any], name: str) -> None:
    """Raise CheckpointError where a base's weights are not those of a lock, as far as an adapter depends on them."""
    expected = lock["base_weights"]
    if found["headers"] != expected["headers"]:
        raise CheckpointError(f"{name}: its tensors have other names, shapes or dtypes than those of the lock's base.")
    other = next((t for t, digest in expected["tensors"].items() if found["tensors"].get(t) != digest), None)
    if other:
        raise CheckpointError(f"{name}: tensor {other} is not that of the lock's base; get the version that it names.")


def _finish(
    work: AdapterWork,
    output: Output,
    variant: Variant,
    stage: Stage,
    inputs: Mapping[str, Any],
    licenses: Licenses,
    tag: str | None,
    tokenizer: Sequence[Path],
    seconds: float,
) -> None:
    """Write everything beside the tensors of one result."""
    recipe, lineage = {**work.recipe, **variant.recipe}, {**work.lineage, **variant.lineage}
    (stage.folder / CONFIG).write_text(json.dumps(work.settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in tokenizer:
        shutil.copyfile(file, stage.folder / file.name)
    name = output.save_path.name
    title = name if variant.folder == "." else f"{name} {variant.folder}"
    base = str(work.settings["base_model_name_or_path"])
    write_adapter_card(stage.folder, title, lineage, recipe, licenses, tag, base, work.remarks, work.merge_recipe)
    tensors = tensors_of(work.plan, stage.journal.entries)
    if output.expected is not None:
        check_tensors(output.expected, tensors)
    lock = {
        "format": FORMAT,
        "program": work.program,
        "recipe": dict(recipe),
        "sources": dict(work.sources),
        "device": "cpu",
        "max_shard_size": output.max_shard_size,
        "versions": versions(MERGING),
        **inputs,
        "files": small_files(stage.folder),
        "tensors": tensors,
    }
    write_lock(stage.folder, lock)
    details = {
        "recipe": recipe,
        "sources": dict(work.sources),
        "inputs": [{"name": c.name, "commit": c.commit} for c in work.inputs.all],
        "tensors": {
            "factors": {s.module: s.rank for s in work.plan.sums},
            "whole": list(work.plan.wholes),
            "nonfinite": {e["name"]: e["nonfinite"] for e in stage.journal.entries if "nonfinite" in e},
        },
        "notes": [*work.notes, *work.remarks],
        **variant.details(),
        "seconds": round(seconds, 3),
    }
    write_record(stage.folder, lineage, details)
