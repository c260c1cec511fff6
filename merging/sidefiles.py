"""What stands beside the weights: config, generation config, run record."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from copy import deepcopy
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from console.errors import CheckpointError
from console.files import read_json
from merging.checkpoint import Checkpoint
from merging.layout import Inputs
from merging.planned import Plan
from merging.stage import RECORD
from merging.tied import main_of
from merging.vocabulary import token_ids

VERSION = "0.1.0"
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def make_configs(inputs: Inputs, plan: Plan) -> dict[str, dict[str, Any]]:
    """Return {file name: content} of config.json and generation_config.json.

    The config is the donor's, with dtype, vocabulary, tying and layers as the result's tensors have them. The
    generation config is the donor's, with everybody's end-of-sequence tokens as the result numbers them. Raises
    CheckpointError for ids that are no numbers.
    """
    donor = inputs.donor
    config = deepcopy(dict(donor.config))
    dtypes = {tensor.dtype for tensor in plan.tensors if tensor.is_float}
    if len(dtypes) == 1:
        config.pop("torch_dtype", None)
        config["dtype"] = dtypes.pop()
    table = main_of(donor, "input")
    rows = next((t.shape[0] for t in plan.tensors if t.own.name == table), None)
    nested = config.get("text_config")
    generation = deepcopy(_generation_config(donor))
    for part in (config, nested) if isinstance(nested, dict) else (config,):
        if rows is not None and "vocab_size" in part:
            part["vocab_size"] = rows
        if plan.layer_origin is not None:
            _take_layers(part, plan.layer_origin)
        if not plan.tied and ("tie_word_embeddings" in part or part is config):  # unsaid, it may be true
            part["tie_word_embeddings"] = False
        _renumber(part, donor, plan)
    _renumber(generation, donor, plan)
    for part in (generation, config, *([nested] if isinstance(nested, dict) else [])):
        _keep_rows(part, rows)
    ids = [i for checkpoint in inputs.all for i in _end_ids(checkpoint, plan) if rows is None or i < rows]
    union = list(dict.fromkeys(ids))
    if union:
        generation["eos_token_id"] = union[0] if len(union) == 1 else union
    return {"config.json": config, "generation_config.json": generation}


def _keep_rows(config: dict[str, Any], rows: int | None) -> None:
    """Take out ids of special tokens that have no row."""
    for key in TOKEN_IDS:
        value = config.get(key)
        if rows is not None and isinstance(value, int) and value >= rows:
            config[key] = None
        elif rows is not None and isinstance(value, list):
            config[key] = [i for i in value if not isinstance(i, int) or i < rows]


def _take_layers(config: dict[str, Any], origin: Sequence[int]) -> None:
    """Make a config describe the layers of the result: their number, and each list that has an entry per layer."""
    depth = next((config[key] for key in DEPTH_KEYS if key in config), None)
    for key, value in config.items():
        per_layer = isinstance(value, list) and len(value) == depth
        if per_layer and key != "architectures" and not key.endswith(("token_id", "token_ids")):
            config[key] = [value[i] for i in origin]
        elif key in DEPTH_KEYS:
            config[key] = len(origin)


def _renumber(config: dict[str, Any], donor: Checkpoint, plan: Plan) -> None:
    """Give the special tokens of a config the ids that the result's vocabulary has for them."""
    if plan.vocabulary.folder == donor.folder:
        return
    for key in TOKEN_IDS:
        value = config.get(key)
        if isinstance(value, int):
            config[key] = next(iter(_numbered([value], donor, plan)), None)
        elif isinstance(value, list):
            config[key] = _numbered(value, donor, plan)


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


def _end_ids(checkpoint: Checkpoint, plan: Plan) -> list[int]:
    """The checkpoint's end-of-sequence ids as the result numbers those tokens; tokens that it lacks are left out."""
    ids = _generation_config(checkpoint).get("eos_token_id")
    listed = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(i, int) for i in listed):
        raise CheckpointError(f"{checkpoint.name}: eos_token_id should be a number or a list of them, found {ids!r}.")
    return _numbered(listed, checkpoint, plan)


def _numbered(ids: Sequence[int], checkpoint: Checkpoint, plan: Plan) -> list[int]:
    """A checkpoint's token ids as the result numbers the same tokens."""
    theirs, ours = token_ids(checkpoint.folder), plan.vocabulary.tokens
    if theirs is None or ours is None:
        return list(ids)
    token_of = {i: token for token, i in theirs.items()}
    return [ours[token_of[i]] for i in ids if token_of.get(i) in ours]


def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    found = {"project": VERSION, "python": platform.python_version()}
    for package in ("torch", "transformers", "safetensors", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


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
    folder = checkpoint.parts[-1].folder if len(checkpoint.parts) > 1 else checkpoint.folder  # an adapter has its own
    file = folder / RECORD
    unmerged: dict[str, Any] = {"method": None, "base_model": None, "models": [], "omega": None}
    if not file.is_file():
        return unmerged
    found = read_json(file, "").get("lineage")
    if not isinstance(found, dict) or found.keys() != unmerged.keys() or not isinstance(found["models"], list):
        raise CheckpointError(f"{file} is not a run record of merge.py or performAIM.py; remove it to go on without.")
    return found
