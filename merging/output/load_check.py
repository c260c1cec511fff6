"""Check that transformers' Auto classes load a planned checkpoint: on the meta device, names and shapes, no weights."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from common.errors import CheckpointError
from common.files.bounded_reading import UnreadableError, read_text
from common.files.cache_folder import cache_folder, is_private_file, remember
from common.files.json_types import ListOf, Matching, check_shape
from common.files.json_values import JsonValue
from common.files.temporary import temporary_folder
from common.processes.execution_limits import time_limit
from common.quiet_transformers import quiet_transformers
from common.terminal_text import foreign, quoted
from common.versions import package_versions
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.tensor_names import layer_of
from merging.output.shards import header_bytes
from merging.plan.prediction import prediction_names
from merging.plan.result_config import write_configs
from merging.plan.types import Plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SECONDS = 300.0
"""Time in which transformers builds the empty model; the largest known take about 20."""
MAX_MODULES = 4096
"""The largest number of layers, blocks or experts in a config, unless the checkpoint has more tensors."""
COUNTS = ("layers", "blocks", "depth", "depths", "experts", "stages")
NAME = Matching(r"[\w.\-/]{1,100}", "a name of letters, digits, - and _")
ARCHITECTURES = ListOf(NAME)
AUTO_CLASSES = (
    "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMultimodalLM", "AutoModelForImageTextToText",
    "AutoModelForMaskedLM", "AutoModelForSequenceClassification", "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering", "AutoModelForSpeechSeq2Seq", "AutoModelForPreTraining", "AutoModel",
)  # fmt: skip
"""Auto classes in the order in which one is looked for that gives the class of a config."""


class _Loader(Protocol):
    """A class of transformers that loads a model."""

    @property
    def from_pretrained(self) -> Callable[..., tuple[object, Mapping[str, Collection[str]]]]:
        """Function of a folder that returns a model and, asked for `output_loading_info`, the keys that differ."""


class _AutoClass(_Loader, Protocol):
    """An Auto class, which chooses the class of a model by its config."""

    _model_mapping: Mapping[type, type | tuple[type, ...]]


def check_architecture(config: Mapping[str, JsonValue], label: str, tensors: int) -> None:
    """Check what Auto classes choose a model by, without transformers: model_type, architectures, numbers of modules.

    Args:
        config: content of config.json.
        label: the model, for messages.
        tensors: number of tensors of the checkpoint.

    Raises:
        CheckpointError: model_type is absent (and no code of its own named), a value has an odd type, or the config
            describes many more modules than the checkpoint has tensors.
    """
    source = f"{label}: config.json"
    try:
        if config.get("model_type") is not None:
            check_shape(config["model_type"], NAME, source, "model_type")
        elif not _has_code(config):
            raise UnreadableError(
                f"{source} has no model_type, by which transformers' Auto classes choose the class; add it."
            )
        if config.get("architectures") is not None:
            check_shape(config["architectures"], ARCHITECTURES, source, "architectures")
    except UnreadableError as error:
        raise CheckpointError(str(error)) from error
    for where, count in _counts(config):
        if count > max(MAX_MODULES, tensors):
            raise CheckpointError(f"{source}: {where} is {count}, and the checkpoint has {tensors} tensors.")


def _has_code(config: Mapping[str, JsonValue]) -> bool:
    """Return whether a config names code of its own for its class."""
    named = config.get("auto_map")
    return isinstance(named, Mapping) and "AutoConfig" in named


def _counts(config: Mapping[str, JsonValue], where: str = "") -> Iterator[tuple[str, int]]:
    """Yield (key, value) of the whole numbers in a config that count modules."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _counts(value, f"{where}{foreign(key)}.")
        elif type(value) is int:
            parts = key.lower().split("_")
            is_number = parts[0] in ("num", "n", "number") or parts[-1] in COUNTS  # no size of experts or layers
            if is_number and any(part in COUNTS for part in parts):
                yield f"{where}{foreign(key)}", value


def check_loads(plan: Plan, configs: Mapping[str, Mapping[str, JsonValue]], loadable: Collection[str]) -> str | None:
    """Load the planned checkpoint by transformers' Auto class on the meta device, before it is written.

    What is loaded is a file of the planned header whose data is a hole, beside the planned configs.

    Args:
        plan: the tensors that will be written.
        configs: content of config.json and generation_config.json.
        loadable: tensors that the template model has; those that its class does not load (a value head, a layer that
            predicts) are reported, not refused.

    Returns:
        None where all is well, or the sentence on what is not loaded or could not be tried.

    Raises:
        CheckpointError: the Auto class does not load it, or tensors are missing, unexpected or of another shape.
    """
    config = configs["config.json"]
    check_architecture(config, "The result", len(plan.tensors))
    passed = _passed(plan, configs, loadable)
    if passed is not None and is_private_file(passed):
        return foreign(read_text(passed), 600) or None
    try:
        import transformers
    except ImportError as error:
        return f"Loading was not tried: transformers cannot be imported ({error})."
    with temporary_folder("load_check") as folder, quiet_transformers():
        write_configs(folder, configs)
        with (folder / "model.safetensors").open("wb") as stream:
            stream.write(header_bytes(plan.tensors))
            stream.truncate(stream.tell() + plan.bytes)
        model_config = _config_class(folder, config)
        names = config.get("architectures") or []
        if model_config is None:
            what = names[0] if names else "its class"
            return f"Loading was not tried: {what} is code of the checkpoint's own, which is not run."
        name, loader = _loader(transformers, model_config, names)
        try:
            with time_limit(SECONDS, f"it is not built within {SECONDS:.0f} seconds"):
                _, info = loader.from_pretrained(
                    folder, device_map="meta", output_loading_info=True, trust_remote_code=False, local_files_only=True
                )
        except Exception as error:
            raise CheckpointError(
                f"The result would not load in transformers as {name}: {foreign(str(error), 300)}."
            ) from error
    beginnings = tuple(name for name in loadable if name.endswith("."))
    surplus = sorted(key for key in info.get("unexpected_keys", ()) if key in loadable or key.startswith(beginnings))
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        wrong = sorted(str(key) for key in info.get(kind, ()) if key not in surplus)
        if wrong:
            keys = f"{kind.removesuffix('_keys')}: {foreign(', '.join(wrong[:3]), 300)}"
            raise CheckpointError(f"The result would not load in transformers as {name} ({keys}).")
    lost = f"transformers does not load {', '.join(surplus[:3])} as {name}; the inputs have it too."
    report = lost if surplus else ""
    if passed is not None:
        remember(passed, report)
    return report or None


def known_names(plan: Plan, template_model: Checkpoint) -> set[str]:
    """Return the tensors that a class may leave unloaded: the template model's, and those of multi-token prediction.

    Of the latter the beginnings of their names too ("model.layers.61."), since transformers fuses experts there.
    """
    predicting = prediction_names(template_model)
    names = {tensor.name for tensor in plan.tensors if tensor.source.name in predicting}
    layers = {f"{layer[0]}{layer[1]}." for name in names if (layer := layer_of(name))}
    return {*template_model.tensors, *names, *layers}


def _config_class(folder: Path, config: Mapping[str, JsonValue]) -> PretrainedConfig | None:
    """Return transformers' config of a folder, None where only code of the checkpoint's own makes it.

    Raises CheckpointError where AutoConfig does not read it.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if _has_code(config) and config.get("model_type") not in CONFIG_MAPPING:
        return None
    try:
        with time_limit(SECONDS, f"it is not read within {SECONDS:.0f} seconds"):
            read: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            return read
    except Exception as error:
        raise CheckpointError(
            f"The result would not load in transformers: AutoConfig refuses config.json ({foreign(str(error), 300)}); "
            "--no-load_check writes it untried."
        ) from error


def _loader(transformers: ModuleType, config: PretrainedConfig, names: list[str]) -> tuple[str, _Loader]:
    """Return the name of the class that a config stands for, and what loads it: an Auto class, or itself.

    names: its architectures. Raises CheckpointError where they contradict its model_type, or no class is found.
    """
    autos: list[_AutoClass] = [getattr(transformers, name) for name in AUTO_CLASSES if hasattr(transformers, name)]
    loaded = {auto: _classes(auto, config) for auto in autos}
    kind = getattr(config, "model_type", type(config).__name__)
    if not names:
        first = next(((classes[0].__name__, auto) for auto, classes in loaded.items() if classes), None)
        if first is None:
            raise CheckpointError(f"The result would not load in transformers: no Auto class has a model for {kind}.")
        return first
    name = names[0]
    for auto, classes in loaded.items():
        if any(cls.__name__ == name for cls in classes):
            return name, auto
    cls = getattr(transformers, name, None)
    made_for = getattr(cls, "config_class", None)
    if cls is not None and made_for is not None and isinstance(config, made_for):
        return name, cls
    if made_for is not None:
        raise CheckpointError(
            f"The result would not load in transformers: config.json has the model_type {quoted(kind)}, and its "
            f"architectures {name} is of model_type {quoted(getattr(made_for, 'model_type', ''))}; correct one of them."
        )
    class_names = sorted({cls.__name__ for classes in loaded.values() for cls in classes})
    raise CheckpointError(
        f"The result would not load in transformers {transformers.__version__}: it has no class {quoted(name)}, and "
        f"for the model_type {quoted(kind)} {', '.join(class_names[:5]) or 'none'}."
    )


def _classes(auto: _AutoClass, config: PretrainedConfig) -> list[type]:
    """Return the model classes that an Auto class has for a config."""
    mapping = auto._model_mapping
    if type(config) not in mapping:
        return []
    classes = mapping[type(config)]
    return list(classes) if isinstance(classes, tuple | list) else [classes]


def _passed(plan: Plan, configs: Mapping[str, Mapping[str, JsonValue]], loadable: Collection[str]) -> Path | None:
    """Return where it is kept that a checkpoint of this very header and configs loads, since asking takes seconds.

    None where the version of transformers is not known, or there is no cache folder.
    """
    version, folder = package_versions(("transformers",)).get("transformers"), cache_folder()
    if version is None or folder is None:
        return None
    content = json.dumps(
        [version, sys.version, configs, sorted(loadable), header_bytes(plan.tensors).decode("latin-1")]
    )
    return folder / f"auto-{hashlib.sha256(content.encode()).hexdigest()[:32]}"
