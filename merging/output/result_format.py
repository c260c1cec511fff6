"""Interface of a result's kind, and the whole model as one; `merging.lora.adapter_format` has the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from common.errors import UsageError
from common.files.json_values import JsonObject, JsonValue
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.hub import CheckpointRef
from merging.checkpoints.licenses import licenses_of
from merging.output.load_check import check_loads, known_names
from merging.output.preparation import PreparedFiles, prepare_files
from merging.output.records.card import public_name
from merging.output.records.lock import files_of
from merging.output.writer import parse_size
from merging.plan.merge_plan import Lineage, MergePlan, OutputConfig
from merging.plan.report import as_text, describe
from merging.plan.types import Listing, Plan

if TYPE_CHECKING:
    from merging.engine.execution import ExecutionConfig
    from merging.engine.loop import BlocksOf


class ResultFormat(Protocol):
    """Steps of planning and writing that differ between a model and an adapter."""

    @property
    def plan(self) -> MergePlan:
        """The plan of the run."""

    @property
    def stem(self) -> str:
        """Name of the weight files without their numbers and ending."""

    def check_output(self, output: OutputConfig) -> None:
        """Raise UsageError for settings of the output that this kind of result does not have."""

    def shard_size(self, output: OutputConfig) -> float:
        """Return the most bytes of one weight file."""

    def input_files(self, checkpoint: Checkpoint) -> list[Path]:
        """Return the files of an input whose digests are in the lock."""

    def prepare_files(self) -> AbstractContextManager[PreparedFiles]:
        """Yield the finished configs and tokenizer in a folder that is gone at the end."""

    def check_loads(self, files: PreparedFiles) -> str | None:
        """Load the planned result without weights; return None, or a sentence where that could not be tried.

        Raises CheckpointError where it does not load.
        """

    def relaxed(self) -> Plan:
        """Return the plan of the tensors that AIM may relax."""

    def slice_of(self, tensors: range) -> Listing:
        """Return a part of the tensors that are written."""

    def blocks(self, execution: ExecutionConfig) -> BlocksOf | None:
        """Return the function that yields a tensor in blocks of rows; None for the engine's own."""

    def lock_entries(self) -> JsonObject:
        """Return entries of the lock that this kind of result has besides."""

    def check_lock(self, lock: Mapping[str, JsonValue]) -> None:
        """Raise CheckpointError where those entries are not a lock's."""

    def record(self) -> JsonObject:
        """Return entries of the run record: the tensors, and the tokenizer where there is one."""

    def card_front(self, lineage: Lineage) -> JsonObject:
        """Return the front matter of the model card that depends on the kind: parents, library, first tags."""

    def card_text(self, lineage: Lineage, method: str) -> list[str]:
        """Return the card's paragraphs on the method (a sentence) and the inputs."""

    def describe(self, save_path: Path, files: PreparedFiles) -> JsonObject:
        """Return the plan as data for `--dry_run --json`."""

    def describe_as_text(self, description: Mapping[str, JsonValue]) -> str:
        """Return that data for people."""


@dataclass(frozen=True)
class ModelFormat:
    """A merged model as a folder that transformers loads."""

    plan: MergePlan
    stem: str = "model"

    def check_output(self, output: OutputConfig) -> None:
        """Raise UsageError for statistics with the reference's arithmetic, which has no blocks in float32."""
        if output.layer_stats and self.plan.reference:
            raise UsageError(
                "--layer_stats needs blocks in float32, and does not go with --numerics reference; leave it out."
            )

    def shard_size(self, output: OutputConfig) -> float:
        """Return the most bytes of one weight file. Raises UsageError for text that is no size."""
        return parse_size(output.max_shard_size)

    def input_files(self, checkpoint: Checkpoint) -> list[Path]:
        """Return the files of an input that the result depends on."""
        return files_of(checkpoint)

    def prepare_files(self) -> AbstractContextManager[PreparedFiles]:
        """Yield configs and tokenizer, tried together. Raises CheckpointError where they do not fit."""
        return prepare_files(self.plan.inputs, self.plan.model, self.plan.template)

    def check_loads(self, files: PreparedFiles) -> str | None:
        """Load the planned model by transformers' Auto class on the meta device."""
        return check_loads(
            self.plan.model, files.configs, known_names(self.plan.model, self.plan.inputs.template_model)
        )

    def relaxed(self) -> Plan:
        """Return the plan of all tensors."""
        return self.plan.model

    def slice_of(self, tensors: range) -> Listing:
        """Return a part of the tensors."""
        return replace(self.plan.model, tensors=self.plan.model.tensors[tensors.start : tensors.stop])

    def blocks(self, execution: ExecutionConfig) -> None:
        """Return None: the engine computes tensors of a plan itself."""

    def lock_entries(self) -> JsonObject:
        """Return nothing: the lock of a model has no further entries."""
        return {}

    def check_lock(self, lock: Mapping[str, JsonValue]) -> None:
        """Pass: there are no further entries."""

    def record(self) -> JsonObject:
        """Return the counts of merged and copied tensors, and the origin of tokenizer and chat template."""
        model = self.plan.model
        return {
            "tensors": {
                "merged": sum(t.is_merged for t in model.tensors),
                "copied": sum(not t.is_merged for t in model.tensors),
                "aligned": [t.name for t in model.tensors if any(source.alignment for source in t.sources)],
                "left_out": dict(model.left_out),
            },
            "tokenizer": {"from": model.vocabulary.name, "chat_template": self.plan.template.origin},
        }

    def card_front(self, lineage: Lineage) -> JsonObject:
        """Return the library and the models that the hub shows as parents."""
        refs = [CheckpointRef.parse(model) for model in (lineage["base_model"], *lineage["models"]) if model]
        parents = [part.repo for ref in refs for part in (ref.alone, ref.adapter) if part and part.is_hub_id]
        return {"base_model": parents, "library_name": "transformers", "tags": []}

    def card_text(self, lineage: Lineage, method: str) -> list[str]:
        """Return the paragraphs on method, base, models and how their weights were read."""
        inputs = {str(checkpoint.ref.alone): checkpoint.reading for checkpoint in self.plan.inputs.all}
        return [
            method,
            f"Base model: {public_name(lineage['base_model']) if lineage['base_model'] else 'none'}",
            "Merged models:",
            "\n".join(f"- {public_name(model)}" for model in lineage["models"]),
            *(note.replace(name, public_name(name)) for name, notes in inputs.items() for note in notes),
        ]

    def describe(self, save_path: Path, files: PreparedFiles) -> JsonObject:
        """Return the plan as data."""
        preview = self.plan.relaxation.preview(self.plan.base, self.plan.model) if self.plan.relaxation else ()
        licenses = licenses_of(self.plan.inputs.all)
        warning = [licenses.warning] if licenses.warning else []
        license_name = licenses.result or ("other" if warning else None)
        return describe(self.plan, save_path, license_name, [*preview, *files.notes, *warning])

    def describe_as_text(self, description: Mapping[str, JsonValue]) -> str:
        """Return the data as tables and lines."""
        return as_text(description)
