"""What stands beside the weights of a finished result: tokenizer, configs, card, lock and run record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.versions import MERGING, versions
from merging.engine.base_comparison import CHANGED
from merging.output.layer_statistics import as_markdown, by_layer
from merging.output.preparation import Prepared
from merging.output.records.card import Licenses, pipeline_tag_of, public_name, write_card
from merging.output.records.lock import (
    FORMAT,
    check_inputs,
    check_others,
    check_tensors,
    describe_input,
    small_files,
    tensors_of,
    write_lock,
)
from merging.output.records.run_record import write_record
from merging.output.staging.stage import Stage
from merging.plan.merge_plan import Output, Variant, Work
from merging.recipe.mergekit.writer import write_mergekit

if TYPE_CHECKING:
    from merging.engine.execution import ExecutionConfig


class Finisher:
    """Finishes the results of a work whose weights are written, each in its stage."""

    def __init__(self, work: Work, output: Output, job: ExecutionConfig, small: Prepared, licenses: Licenses) -> None:
        self.work, self.output, self.job, self.small, self.licenses = work, output, job, small, licenses
        self.said: list[str] = []
        self.tables: list[str] = []

    def finish(self, variant: Variant, stage: Stage, digests: Mapping[Path, str | None], seconds: float) -> None:
        """Write everything beside the weights of one result.

        `said` and `tables` gather what is to be told at the end. Raises CheckpointError where the result does not
        repeat the lock that it must.
        """
        work = self.work
        recipe, lineage = {**work.recipe, **variant.recipe}, {**work.lineage, **variant.lineage}
        self._write_configs(stage)
        rows = self._layer_statistics(stage) if self.output.layer_stats else []
        table = self._table(variant, rows) if rows else None
        self.tables += [table] if table else []
        name = self.output.save_path.name
        title = name if variant.folder == "." else f"{name} {variant.folder}"
        tag = pipeline_tag_of(self.small.configs["config.json"])
        names = {str(checkpoint.ref.alone): checkpoint.reading for checkpoint in work.inputs.all}
        reading = [note.replace(name, public_name(name)) for name, notes in names.items() for note in notes]
        write_card(stage.folder, title, lineage, recipe, self.licenses, tag, table, reading, work.merge_recipe)
        write_lock(stage.folder, self._lock(recipe, stage, digests))
        details = {
            "recipe": recipe,
            "sources": dict(work.sources),
            "inputs": [{"name": c.name, "commit": c.commit} for c in work.inputs.all],
            **_account(work, stage),
            **variant.details(),
            **({"layer_statistics": rows} if rows else {}),
            **({"processes": self.output.process_group.world_size} if self.output.process_group.world_size > 1 else {}),
            "seconds": round(seconds, 3),
        }
        if self._equals_base(stage):
            details["equals_base"] = True
            base = self.work.inputs.base
            assert base is not None
            self.said.append(f"{title} equals the base {base.name} in every value: the merge changed nothing.")
        write_record(stage.folder, lineage, details)

    def _equals_base(self, stage: Stage) -> bool:
        """True where every merged tensor has the base's values."""
        based = any(tensor.is_merged and tensor.base is not None for tensor in self.work.plan.tensors)
        return based and not any(CHANGED in entry for entry in stage.journal.entries)

    def _write_configs(self, stage: Stage) -> None:
        """Write tokenizer and configs."""
        self.small.copy_to(stage.folder)
        if self.work.mergekit is not None:
            write_mergekit(stage.folder, *self.work.mergekit)
        for entry in stage.journal.entries:
            if "nonfinite" in entry:
                self.said.append(f"Tensor {entry['name']}: {entry['nonfinite']} entries are not finite.")

    def _layer_statistics(self, stage: Stage) -> list[dict[str, Any]]:
        merged = {tensor.name for tensor in self.work.plan.tensors if tensor.is_merged}
        entries = [entry for entry in stage.journal.entries if entry["name"] in merged]
        return by_layer(((entry["name"], entry["layer_statistics"]) for entry in entries), len(self.work.inputs.models))

    def _table(self, variant: Variant, rows: Sequence[Mapping[str, Any]]) -> str:
        table = as_markdown(rows, [model.name for model in self.work.inputs.models])
        return table if variant.folder == "." else f"{variant.folder}. {table}"

    def _lock(self, recipe: Mapping[str, Any], stage: Stage, digests: Mapping[Path, str | None]) -> dict[str, Any]:
        """The lock of what is in the stage. Raises CheckpointError where it does not repeat the expected one."""
        import torch

        work, expected = self.work, self.output.expected
        inputs = [describe_input(checkpoint, digests) for checkpoint in work.inputs.distinct]
        others = {name: digests.get(file) for name, file in work.files.items()}
        tensors = tensors_of(work.plan, stage.journal.entries)
        if expected is not None:
            check_inputs(expected, inputs)
            check_others(expected, others)
            check_tensors(expected, tensors)
        return {
            "format": FORMAT,
            "program": work.program,
            "recipe": dict(recipe),
            "sources": dict(work.sources),
            "device": self.job.device.type,
            **({"threads": torch.get_num_threads()} if work.whole_matrix else {}),
            "max_shard_size": self.output.max_shard_size,
            "versions": versions(MERGING),
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
