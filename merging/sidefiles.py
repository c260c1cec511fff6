"""What stands beside the weights: config, generation config, tokenizer, model card, run record."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from console.errors import CheckpointError
from console.files import read_json
from merging.checkpoint import Checkpoint
from merging.hub import CheckpointRef
from merging.preflight import Plan
from merging.vocabulary import is_vocabulary_tensor, token_ids
from merging.writer import RECORD

VERSION = "0.1.0"
TOKENIZER_FILES = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
                   "*.model", "*.tiktoken", "preprocessor_config.json", "processor_config.json")  # fmt: skip


def copy_tokenizer(donor: Checkpoint, folder: Path) -> list[str]:
    """Copy the donor's tokenizer files byte for byte; returns their names (empty where it has none)."""
    names = {file.name for pattern in TOKENIZER_FILES for file in donor.folder.glob(pattern) if file.is_file()}
    for name in sorted(names):
        shutil.copyfile(donor.folder / name, folder / name)
    return sorted(names)


def make_configs(donor: Checkpoint, others: Sequence[Checkpoint], plan: Plan) -> dict[str, dict[str, Any]]:
    """Return {file name: content} of config.json and generation_config.json.

    The config's dtype and vocabulary are as the tensors have them. The generation config is the donor's, with
    everybody's end-of-sequence tokens as the donor numbers them. Raises CheckpointError for ids that are no numbers.
    """
    config = dict(donor.config)
    dtypes = {tensor.dtype for tensor in plan.tensors if tensor.is_float}
    if len(dtypes) == 1:
        config.pop("torch_dtype", None)
        config["dtype"] = dtypes.pop()
    rows = min((t.shape[0] for t in plan.tensors if is_vocabulary_tensor(t.name, donor)), default=None)
    if rows is not None and "vocab_size" in config:
        config["vocab_size"] = rows
    generation = _generation_config(donor)
    ids = [i for checkpoint in (donor, *others) for i in _end_ids(checkpoint, donor) if rows is None or i < rows]
    union = list(dict.fromkeys(ids))
    if union:
        generation["eos_token_id"] = union[0] if len(union) == 1 else union
    return {"config.json": config, "generation_config.json": generation}


def write_configs(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Write what `make_configs` returned."""
    for name, content in configs.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    file = checkpoint.folder / "generation_config.json"
    if file.is_file():
        return read_json(file, "")
    kept = {k: checkpoint.config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in checkpoint.config}
    return {"_from_model_config": True, **kept}


def _end_ids(checkpoint: Checkpoint, donor: Checkpoint) -> list[int]:
    """The checkpoint's end-of-sequence ids as the donor numbers those tokens; tokens that it lacks are left out."""
    ids = _generation_config(checkpoint).get("eos_token_id")
    listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(i, int) for i in listed):
        raise CheckpointError(f"{checkpoint.name}: eos_token_id should be a number or a list of them, found {ids!r}.")
    theirs, ours = token_ids(checkpoint.folder), token_ids(donor.folder)
    if checkpoint is donor or theirs is None or ours is None:
        return listed
    token_of = {i: token for token, i in theirs.items()}
    return [ours[token_of[i]] for i in listed if token_of.get(i) in ours]


def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    found = {"project": VERSION, "python": platform.python_version()}
    for package in ("torch", "transformers", "safetensors", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe_inputs(checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """Return name, commit and file sizes of each input."""
    described = []
    for checkpoint in checkpoints:
        files = sorted({info.file for info in checkpoint.tensors.values()})
        sizes = {file.name: file.stat().st_size for file in files}
        described.append({"name": checkpoint.name, "commit": checkpoint.commit, "files": sizes})
    return described


def write_record(folder: Path, lineage: Mapping[str, Any], details: Mapping[str, Any]) -> None:
    """Write the run record: what was made of what, with every effective parameter."""
    record = {
        "lineage": dict(lineage),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        **details,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")


def read_lineage(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the lineage in a checkpoint's run record, or that of a checkpoint that was not merged here.

    Raises CheckpointError for a run record that lacks it.
    """
    file = checkpoint.folder / RECORD
    unmerged: dict[str, Any] = {"method": None, "base_model": None, "models": [], "omega": None}
    if not file.is_file():
        return unmerged
    found = read_json(file, "").get("lineage")
    if not isinstance(found, dict) or found.keys() != unmerged.keys() or not isinstance(found["models"], list):
        raise CheckpointError(f"{file} is not a run record of merge.py or performAIM.py; remove it to go on without.")
    return found


def write_card(folder: Path, title: str, lineage: Mapping[str, Any], recipe: Mapping[str, Any], paper: str) -> None:
    """Write README.md with front matter for the hub's model tree and the recipe in YAML."""
    named = [CheckpointRef.parse(model) for model in (lineage["base_model"], *lineage["models"]) if model]
    parents = [ref.path for ref in named if ref.is_hub_id]
    front = {
        **({"base_model": parents} if parents else {}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "activation-informed-merging"],
    }
    omega = lineage["omega"]
    relaxed = f", relaxed by AIM (arXiv:2502.02421) with omega {omega:g}" if omega is not None else ""
    text = (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {title}\n\n"
        f"Merged with {lineage['method'] or 'an unknown method'} ({paper}){relaxed}.\n\n"
        f"Base model: {lineage['base_model'] or 'none'}\n\nMerged models:\n\n"
        + "".join(f"- {model}\n" for model in lineage["models"])
        + f"\n## Recipe\n\n```yaml\n{yaml.safe_dump(dict(recipe), sort_keys=False)}```\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
