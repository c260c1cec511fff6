"""A merged LoRA adapter as a kind of result: what `merging.output.result_format` asks of it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import CheckpointError, UsageError
from common.files.json_values import JsonObject, JsonValue
from common.files.temporary import temporary_folder
from merging.checkpoints.adapters.adapter import AdaptedWeights
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.hub import CheckpointRef
from merging.checkpoints.licenses import licenses_of
from merging.checkpoints.model_folder import tokenizer_files
from merging.lora.adapter_config import adapter_config
from merging.lora.inputs import CONFIG, adapter_configs, base_modules
from merging.lora.layout import AdapterPlan
from merging.lora.load_check import check_adapter_loads
from merging.lora.report import adapter_as_text, describe_adapter
from merging.lora.whole import base_shape
from merging.output.digests import tensor_digest
from merging.output.preparation import PreparedFiles, prepare_files
from merging.output.records.card import public_name
from merging.output.records.lock import files_of
from merging.plan.merge_plan import Lineage, MergePlan, OutputConfig
from merging.plan.result_config import make_configs
from merging.plan.types import Listing, Plan
from merging.tokenizers.chat_template import template_of

if TYPE_CHECKING:
    from merging.engine.execution import ExecutionConfig
    from merging.engine.loop import BlocksOf


@dataclass(frozen=True)
class AdapterFormat:
    """A merged adapter as a folder that PEFT loads over its base."""

    plan: MergePlan
    stem: str = "adapter_model"

    @property
    def layout(self) -> AdapterPlan:
        """The factors and whole tensors that are written."""
        assert isinstance(self.plan.layout, AdapterPlan)
        return self.plan.layout

    @cached_property
    def config(self) -> Mapping[str, JsonValue]:
        """The adapter_config.json."""
        configs, base = adapter_configs(self.plan.inputs.models), self.plan.base
        return adapter_config(self.layout, configs, base.ref, base_modules(base))

    @property
    def has_tokenizer(self) -> bool:
        """True where the result brings a tokenizer: it differs from the base's, or its chat template does."""
        vocabulary = self.plan.model.vocabulary
        return (
            vocabulary.folder != self.plan.base.folder
            or bool(vocabulary.added)
            or self.plan.template.text != template_of(self.plan.base.folder)
        )

    @property
    def rows(self) -> int | None:
        """Rows of the result's input embedding where the base has another number, which PEFT must find there."""
        tables = [(t.shape[0], t.base) for t in self.layout.wholes.values() if t.is_embedding and t.base is not None]
        return next((rows for rows, source in tables if base_shape(source)[0] != rows), None)

    @property
    def advice(self) -> list[str]:
        """Sentences for the user of the result: its tokenizer, and the rows that its base needs."""
        sentences = []
        if self.has_tokenizer:
            sentences.append("The adapter brings a tokenizer of its own, to be loaded from its folder.")
        if self.rows is not None:
            sentences.append(
                f"The adapter has embeddings of {self.rows} rows, its base has another number: call "
                f"`model.resize_token_embeddings({self.rows})` before you load the adapter."
            )
        return sentences

    def check_output(self, output: OutputConfig) -> None:
        """Raise UsageError for statistics, which need whole tensors."""
        if output.layer_stats:
            raise UsageError("--layer_stats needs whole tensors, which --save_as adapter does not make; leave it out.")

    def shard_size(self, output: OutputConfig) -> float:
        """Return infinity: PEFT reads one file."""
        return math.inf

    def input_files(self, checkpoint: Checkpoint) -> list[Path]:
        """Return the files of an input that are digested whole: all but the base's weights."""
        weights = checkpoint.weights
        base = weights.base if isinstance(weights, AdaptedWeights) else weights
        return [file for file in files_of(checkpoint) if file not in base.files]

    @contextmanager
    def prepare_files(self) -> Iterator[PreparedFiles]:
        """Yield adapter_config.json, and the tokenizer that the adapter brings, tried next to the model's config.

        Raises CheckpointError where it does not fit.
        """
        configs, _ = make_configs(self.plan.inputs, self.plan.model)
        with temporary_folder("adapter") as folder:
            if self.has_tokenizer:
                with prepare_files(self.plan.inputs, self.plan.model, self.plan.template) as whole:
                    for file in tokenizer_files(whole.folder):
                        shutil.copyfile(file, folder / file.name)
            (folder / CONFIG).write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            yield PreparedFiles(folder, configs, tuple(self.advice))

    def check_loads(self, files: PreparedFiles) -> str | None:
        """Load the planned adapter in PEFT, without weights."""
        return check_adapter_loads(self.layout, self.config, files.configs["config.json"])

    def relaxed(self) -> Plan:
        """Return the plan of the tensors that the adapter changes."""
        changed = set(self.layout.names)
        tensors = tuple(tensor for tensor in self.plan.model.tensors if tensor.name in changed)
        return replace(self.plan.model, tensors=tensors)

    def slice_of(self, tensors: range) -> Listing:
        """Return a part of the tensors that are written."""
        return replace(self.layout, tensors=self.layout.tensors[tensors.start : tensors.stop])

    def blocks(self, execution: ExecutionConfig) -> BlocksOf:
        """Return the function that computes factors in fp64 and whole tensors as the engine does."""
        from merging.lora.tensors import Maker  # loads torch

        relaxation: Any = execution.relaxation
        return Maker(self.layout.method, execution, relaxation).blocks

    def lock_entries(self) -> JsonObject:
        """Return digests of the base's names, shapes and dtypes, and of its tensors that are read."""
        base, headers = self.plan.base, hashlib.sha256()
        for name, info in sorted(base.tensors.items()):
            headers.update(f"{name} {list(info.shape)} {info.dtype}\n".encode())
        names = {t.base.name for t in self.layout.wholes.values() if t.base is not None}
        tensors = {name: tensor_digest([base.read(name)]) for name in sorted(names)}
        return {"base_weights": {"headers": headers.hexdigest(), "tensors": tensors}}

    def check_lock(self, lock: Mapping[str, JsonValue]) -> None:
        """Raise CheckpointError where the base's weights are not a lock's, as far as an adapter depends on them."""
        name, expected, actual = self.plan.base.name, lock["base_weights"], self.lock_entries()["base_weights"]
        if actual["headers"] != expected["headers"]:
            raise CheckpointError(
                f"{name}: its tensors have other names, shapes or dtypes than those of the lock's base; get the "
                "version that the lock names."
            )
        for tensor, digest in expected["tensors"].items():
            if actual["tensors"].get(tensor) != digest:
                raise CheckpointError(
                    f"{name}: tensor {tensor} is not that of the lock's base; get the version that the lock names."
                )

    def record(self) -> JsonObject:
        """Return the rank of each pair of factors, and the tensors that are stored whole."""
        ranks = {s.module: s.rank for s in self.layout.sums}
        return {"tensors": {"factors": ranks, "whole": list(self.layout.wholes)}}

    def card_front(self, lineage: Lineage) -> JsonObject:
        """Return the base, the library and PEFT's tag."""
        base = str(self.config["base_model_name_or_path"])
        return {"base_model": [base] if CheckpointRef(base).is_hub_id else [], "library_name": "peft", "tags": ["lora"]}

    def card_text(self, lineage: Lineage, method: str) -> list[str]:
        """Return the paragraphs on use, method, adapters, and what the user has to do."""
        base = public_name(str(self.config["base_model_name_or_path"]))
        return [
            f"A LoRA adapter for {base}: PEFT adds it to that model (`PeftModel.from_pretrained(base, folder)`).",
            method,
            "Adapters:",
            "\n".join(f"- {public_name(model)}" for model in lineage["models"]),
            *self.advice,
        ]

    def describe(self, save_path: Path, files: PreparedFiles) -> JsonObject:
        """Return the plan as data."""
        relaxation, licenses = self.plan.relaxation, licenses_of(self.plan.inputs.all)
        preview = relaxation.preview(self.plan.base, self.relaxed()) if relaxation else ()
        warning = [licenses.warning] if licenses.warning else []
        tokenizer = self.plan.model.vocabulary.name if self.has_tokenizer else None
        notes = [*preview, *files.notes, *warning]
        return describe_adapter(self.plan, self.layout, self.config, save_path, tokenizer, licenses.result, notes)

    def describe_as_text(self, description: Mapping[str, JsonValue]) -> str:
        """Return the data as lines."""
        return adapter_as_text(description)
