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

from merging.checkpoint import Checkpoint, CheckpointRef, read_json
from merging.preflight import Plan
from merging.vocabulary import is_vocabulary_tensor

VERSION = "0.1.0"
RECORD = "run_record.json"
NOT_TOKENIZER = {
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
}
TOKENIZER_FILES = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
                   "*.model", "*.tiktoken", "preprocessor_config.json", "processor_config.json")  # fmt: skip


def copy_tokenizer(donor: Checkpoint, folder: Path) -> list[str]:
    """Copy the donor's tokenizer files byte for byte; returns their names (empty where it has none)."""
    names = {file.name for pattern in TOKENIZER_FILES for file in donor.folder.glob(pattern) if file.is_file()}
    for name in sorted(names - NOT_TOKENIZER):
        shutil.copyfile(donor.folder / name, folder / name)
    return sorted(names - NOT_TOKENIZER)


def write_configs(donor: Checkpoint, others: Sequence[Checkpoint], folder: Path, plan: Plan) -> None:
    """Write config.json (dtype and vocabulary as the tensors have them) and generation_config.json.

    The generation config is the donor's with the union of everybody's end-of-sequence ids that have a row.
    """
    config = dict(donor.config)
    dtypes = {tensor.dtype for tensor in plan.tensors if tensor.is_float}
    if len(dtypes) == 1:
        config.pop("torch_dtype", None)
        config["dtype"] = dtypes.pop()
    rows = min((t.shape[0] for t in plan.tensors if is_vocabulary_tensor(t.name, donor)), default=None)
    if rows is not None and "vocab_size" in config:
        config["vocab_size"] = rows
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = _generation_config(donor)
    ids = [i for checkpoint in (donor, *others) for i in _end_ids(checkpoint) if rows is None or i < rows]
    union = list(dict.fromkeys(ids))
    if union:
        generation["eos_token_id"] = union[0] if len(union) == 1 else union
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    file = checkpoint.folder / "generation_config.json"
    if file.is_file():
        return read_json(file, "")
    kept = {k: checkpoint.config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in checkpoint.config}
    return {"_from_model_config": True, **kept}


def _end_ids(checkpoint: Checkpoint) -> list[int]:
    ids = _generation_config(checkpoint).get("eos_token_id")
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]


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
    """Return the lineage in a checkpoint's run record, or that of a checkpoint that was not merged here."""
    file = checkpoint.folder / RECORD
    unmerged: dict[str, Any] = {"method": None, "base_model": None, "models": [], "omega": None}
    return dict(read_json(file, "").get("lineage", unmerged)) if file.is_file() else unmerged


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
