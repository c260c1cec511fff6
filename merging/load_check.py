"""Whether a planned checkpoint will load in transformers: on the meta device, names and shapes, without weights."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from console.errors import CheckpointError
from merging.native.build import cache_folder
from merging.planned import Plan
from merging.result_config import write_configs
from merging.shards import header_bytes
from merging.sidefiles import versions
from merging.silence import quiet_transformers


def check_loads(plan: Plan, configs: Mapping[str, Mapping[str, Any]], known: Collection[str]) -> str | None:
    """Load the planned checkpoint with the class that its config names, on the meta device, before it is written.

    What is loaded is a file of the planned header whose data is a hole, beside the planned configs. known: tensors that
    the donor has; those that its class does not load (a value head, a layer that predicts) are told, not refused.
    Returns None where all is well, or the sentence on what is not loaded or could not be tried. Raises CheckpointError
    where tensors are missing, unexpected or of another shape.
    """
    names = configs["config.json"].get("architectures") or []
    passed = _passed(plan, configs, known)
    if passed is not None and passed.is_file():
        return passed.read_text(encoding="utf-8") or None
    try:
        import transformers
    except ImportError as error:
        return f"Loading was not tried: transformers cannot be imported ({error})."
    cls: Any = getattr(transformers, names[0], None) if names else None
    if cls is None:
        what = names[0] if names else "the architecture, which config.json does not name,"
        return f"Loading was not tried: {what} is not in transformers {transformers.__version__}."
    with tempfile.TemporaryDirectory() as scratch, quiet_transformers():
        folder = Path(scratch)
        write_configs(folder, configs)
        with (folder / "model.safetensors").open("wb") as stream:
            stream.write(header_bytes(plan.tensors))
            stream.truncate(stream.tell() + plan.bytes)
        try:
            _, found = cls.from_pretrained(
                folder, device_map="meta", output_loading_info=True, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:
            text = " ".join(str(error).split())
            raise CheckpointError(f"The result would not load in transformers as {names[0]}: {text[:300]}.") from error
    surplus = sorted(key for key in found.get("unexpected_keys", ()) if key in known)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        wrong = sorted(str(key) for key in found.get(kind, ()) if key not in surplus)
        if wrong:
            told = f"{kind.removesuffix('_keys')}: {', '.join(wrong[:3])}"
            raise CheckpointError(f"The result would not load in transformers as {names[0]} ({told}).")
    lost = f"transformers does not load {', '.join(surplus[:3])} as {names[0]}; the inputs have it too."
    told = lost if surplus else ""
    if passed is not None:
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.write_text(told, encoding="utf-8")
    return told or None


def _passed(plan: Plan, configs: Mapping[str, Mapping[str, Any]], known: Collection[str]) -> Path | None:
    """Where it is kept that a checkpoint of this very header and configs loads, since asking takes seconds.

    None where the version of transformers is not known.
    """
    version = versions().get("transformers")
    if version is None:
        return None
    asked = json.dumps([version, sys.version, configs, sorted(known), header_bytes(plan.tensors).decode("latin-1")])
    return cache_folder() / f"loads-{hashlib.sha256(asked.encode()).hexdigest()[:32]}"
