"""Companion files of a result: what belongs beside the template model's weights besides config and tokenizer.

sentence-transformers' modules, further chat templates, processors, vocabularies of their own and licenses are copied;
what is not copied is reported by name.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.errors import CheckpointError
from common.files import bounded_reading
from common.files.bounded_reading import UnreadableError
from common.terminal_text import foreign
from merging.checkpoints.model_folder import tokenizer_files

COPIED = (
    "modules.json", "config_sentence_transformers.json", "sentence_*_config.json", "*processor_config.json",
    "*preprocessor_config.json", "*feature_extractor*.json", "LICENSE*", "LICENCE*", "license*", "NOTICE*", "Notice*",
    "COPYING*", "USE_POLICY*", "*TERMS_OF_USE*", "*_LICENSE*",
)  # fmt: skip
"""Patterns of names in a model folder."""
WITH_TOKENIZER = ("additional_chat_templates/*.jinja", "*vocab*", "*.tiktoken", "*.spm", "*.bpe", "*.model")
"""Those that go with the tokenizer, copied only where the result has the template model's."""
WRITTEN = re.compile(
    r"config\.json|generation_config\.json|README\.md|mergekit_config\.ya?ml|merge\.lock\.json|run_record\.json"
    r"|adapter_config\.json|.*\.index\.json"
)
"""Files that a result has of its own."""
WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|onnx_data|ckpt|npz|mlmodel|tflite|ot)")
LEFTOVERS = re.compile(
    r"\..*|optimizer.*|scheduler.*|rng_state.*|trainer_state\.json|training_args.*|(all|train|eval|predict)_results\.json"
    r"|.*\.(log|png|jpe?g|gif|svg|webp|pdf|ipynb|lock|tfevents.*)|events\.out.*|latest|zero_to_fp32\.py|checkpoint-\d+"
    r"|global_step\d+|runs|logs|onnx|openvino|original|metal|figures|assets|images|params\.json|consolidated.*"
)
"""Traces of training, pictures and other formats, which are passed over."""


def copy_companions(template: Path, name: str, result: Path, has_its_tokenizer: bool) -> list[str]:
    """Copy the companion files of the template model into a folder that has configs and tokenizer already.

    name: the template model's, for messages; has_its_tokenizer: the result has the template model's. Returns
    the sentences on files with weights that are copied unmerged, and on files that are not copied. Raises
    CheckpointError for modules that lie outside the folder or are missing.
    """
    files = _companions(template, name, has_its_tokenizer)
    for file in files:
        target = result / file.relative_to(template)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    copied = {file.relative_to(template) for file in files}
    tokenizer_names = {file.name for file in tokenizer_files(template)}
    uncopied = [
        file.name for file in sorted(template.iterdir())
        if Path(file.name) not in copied and not any(path.parts[0] == file.name for path in copied)
        and file.name not in (*tokenizer_names, "additional_chat_templates") and not (result / file.name).exists()
        and not any(pattern.fullmatch(file.name) for pattern in (WRITTEN, WEIGHTS, LEFTOVERS))
    ]  # fmt: skip
    weights = sorted(str(path) for path in copied if WEIGHTS.fullmatch(path.name) and len(path.parts) > 1)
    return [
        *([f"Copied from {name}, not merged: {_listed(weights)}."] if weights else []),
        *([f"Not copied from {name}: {_listed(uncopied)}."] if uncopied else []),
    ]


def _companions(template: Path, name: str, has_its_tokenizer: bool) -> list[Path]:
    """The companion files in a model folder, those of sentence-transformers' modules among them."""
    patterns = (*COPIED, *(WITH_TOKENIZER if has_its_tokenizer else ()))
    files = {
        file for pattern in patterns for file in template.glob(pattern)
        if file.is_file() and not WRITTEN.fullmatch(file.name) and (file.parent != template or not _is_weights(file))
    }  # fmt: skip
    for module in _modules(template, name):
        files |= {file for file in module.rglob("*") if file.is_file() and not LEFTOVERS.fullmatch(file.name)}
    return sorted(files)


def _is_weights(file: Path) -> bool:
    return bool(WEIGHTS.fullmatch(file.name))


def _modules(template: Path, name: str) -> Iterable[Path]:
    """The folders of sentence-transformers' modules (pooling, dense, normalization) but the transformer's own."""
    if not (template / "modules.json").is_file():
        return
    entries = _entries(template / "modules.json")
    for entry in entries:
        if not isinstance(entry, dict) or entry.get("path", "") == "":
            continue
        path = entry["path"]
        place = template / str(path)
        if not isinstance(path, str) or template.resolve() not in place.resolve().parents:
            raise CheckpointError(f"{name}: modules.json names {path!r}, which is no folder in the model's folder.")
        if place.is_dir():
            yield place
        elif "Normalize" not in str(entry.get("type")):
            raise CheckpointError(
                f"{name}: modules.json names the folder {foreign(path)}, which is missing; download it again."
            )


def _entries(file: Path) -> Sequence[object]:
    try:
        content: object = bounded_reading.read_json(file)
    except (UnreadableError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}).") from error
    return content if isinstance(content, list) else []


def _listed(names: Sequence[str]) -> str:
    listed = ", ".join(foreign(name) for name in names[:6])
    return f"{listed} ({len(names)} files)" if len(names) > 6 else listed
