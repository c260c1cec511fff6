"""Identity of a model and its machine: digests of files, commit on the hub, hardware. No torch."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import BadInputError
from common.files.paths import file_digest, known_digest
from common.hardware import usable_cores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from common.files.json_values import JsonObject

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
BESIDE = (
    "*config.json", "*.index.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*",
    "merges.txt", "*.model", "chat_template*", "*.tiktoken", "tekken.json", "*.py",
)  # fmt: skip
"""What decides a model's answers, besides its weights; records, cards and logs do not."""


def model_digest(folder: Path) -> str:
    """Return "sha256:..." over the names and contents of the files that decide what a checkpoint answers.

    Raises BadInputError where the folder holds no weights.
    """
    names = sorted(f.name for f in folder.iterdir() if f.is_file())
    weights = next((matches for pattern in WEIGHTS if (matches := [n for n in names if fnmatch(n, pattern)])), None)
    if not weights:
        raise BadInputError(f"{folder} holds no weights (model.safetensors, or shards with an index).")
    return _files_digest(folder, {*weights, *(n for n in names if any(fnmatch(n, p) for p in BESIDE))})


def adapter_digest(folder: Path) -> str:
    """Return "sha256:..." over the configuration and weights of an adapter."""
    names = {f.name for f in folder.iterdir() if f.is_file() and fnmatch(f.name, "adapter_*")}
    return _files_digest(folder, names)


def _files_digest(folder: Path, names: set[str]) -> str:
    chosen = sorted(names)
    with ThreadPoolExecutor(4) as pool:  # hashing lets other threads run
        digests = list(pool.map(lambda file: known_digest(file) or file_digest(file), map(folder.joinpath, chosen)))
    return "sha256:" + _over(zip(chosen, digests, strict=True))


def loaded_digest(model: PreTrainedModel) -> str:
    """The same kind of digest for a loaded transformers model, over its configuration and tensors."""
    import torch

    parts = [("config", hashlib.sha256(repr(sorted(model.config.to_dict().items())).encode()).hexdigest())]
    for name, tensor in sorted(model.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        parts.append((name, hashlib.sha256(raw.data).hexdigest()))
    return "sha256:" + _over(parts)


def _over(parts: Iterable[tuple[str, str]]) -> str:
    whole = hashlib.sha256()
    for name, digest in parts:
        whole.update(f"{name}\0{digest}\n".encode())
    return whole.hexdigest()


def hub_commit(folder: Path) -> str | None:
    """The commit that a snapshot of the hub's cache is of; None for any other folder."""
    real = folder.resolve()
    return real.name if real.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", real.name) else None


def project_commit() -> str | None:
    """The commit this project's files are of, with "+changes" where they were changed; None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no") if commit else None
    return commit + ("+changes" if changed else "") if commit else None


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def hardware(gpus: Sequence[str] = ()) -> JsonObject:
    """The processor's name, the cores this process may use, the memory in GiB, and the names of the GPUs used."""
    cores = usable_cores()
    machine: JsonObject = {"cpu": _processor(), "cores": cores, "gpus": list(gpus)}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        machine["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return machine


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()
