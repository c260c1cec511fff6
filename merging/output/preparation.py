"""Configs and tokenizer of a result, made and tried before the first weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.files.json_values import JsonValue
from common.files.paths import read_json
from common.files.temporary import temporary_folder
from merging.checkpoints.model_folder import tokenizer_files
from merging.output.companion_files import copy_companions
from merging.output.load_check import check_architecture
from merging.plan.result_config import make_configs, rows_of, write_configs
from merging.plan.slices import Inputs
from merging.plan.types import Plan
from merging.tokenizers.chat_template import ChatTemplate, write_template
from merging.tokenizers.writer import check_tokenizer, write_tokenizer


@dataclass(frozen=True)
class PreparedFiles:
    """Finished small files in a folder of their own, the configs' content, and sentences for the user."""

    folder: Path
    configs: Mapping[str, Mapping[str, JsonValue]]
    notes: tuple[str, ...]

    def copy_to(self, folder: Path) -> None:
        """Put the files into the folder of the weights."""
        for file in sorted(self.folder.rglob("*")):  # shutil.copytree would give the folder the mode of this one
            target = folder / file.relative_to(self.folder)
            if file.is_dir():
                target.mkdir(exist_ok=True)
            else:
                shutil.copyfile(file, target)


@contextmanager
def prepare_files(inputs: Inputs, plan: Plan, template: ChatTemplate) -> Iterator[PreparedFiles]:
    """Yield the result's configs and tokenizer, in a folder that is gone at the end.

    The tokenizer was loaded beside the config, as users load it: every planned token has its planned id, and no id
    lacks a row. Raises CheckpointError where that cannot be.
    """
    check_architecture(inputs.template_model.config, inputs.template_model.name, len(inputs.template_model.tensors))
    configs, notes = make_configs(inputs, plan)
    with temporary_folder("prepared") as folder:
        write_tokenizer(plan.vocabulary, inputs.all, folder)
        if not tokenizer_files(folder):
            notes = [*notes, f"{plan.vocabulary.name} has no tokenizer files; the result has none."]
        write_template(template, folder)
        write_configs(folder, configs)
        check_tokenizer(folder, plan.vocabulary, rows_of(inputs.template_model, plan))
        if not any(file.suffix == ".gguf" for file in inputs.template_model.files):
            model, is_same = inputs.template_model, plan.vocabulary.folder == inputs.template_model.folder
            notes = [*notes, *copy_companions(model.parts[0].folder, model.name, folder, is_same)]
        yield PreparedFiles(folder, configs, (*notes, *_code(folder, inputs.template_model.name, plan.vocabulary.name)))


def _code(folder: Path, model: str, tokenizer: str) -> Iterator[str]:
    """A sentence for each of the files that names code beside it, which is not copied."""
    for name, owner in (("config.json", model), ("tokenizer_config.json", tokenizer)):
        named = json.dumps(read_json(folder / name, "").get("auto_map")) if (folder / name).is_file() else "null"
        if named != "null" and "--" not in named:
            yield f"{name} names code of its own ({named}), which is not copied: put the .py files of {owner} beside."
