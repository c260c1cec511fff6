"""Adapters as inputs of a merge whose result is an adapter: opened, and refused where their bases differ."""

from __future__ import annotations

from collections.abc import Sequence

from common.errors import HeadersUnknownError, UsageError
from common.files.json_values import JsonObject
from common.files.paths import read_json
from merging.checkpoints.checkpoint import Checkpoint, open_all
from merging.checkpoints.hub import CheckpointRef
from merging.recipe import MergeRecipe

CONFIG = "adapter_config.json"


def base_name(recipe: MergeRecipe) -> str:
    """Return the name of the base. Raises UsageError for a model that is no BASE+ADAPTER."""
    refs = [CheckpointRef.parse(name) for name in recipe.models]
    for ref in refs:
        if ref.adapter is None:
            raise UsageError(f"--save_as adapter needs every model as BASE+ADAPTER; {ref} is a whole model.")
    return recipe.base_model or str(refs[0].alone)


def open_adapters(names: Sequence[str], headers_only: bool) -> list[Checkpoint]:
    """Open adapters and their base, of which only headers are downloaded.

    headers_only: download no weights of the adapters either.
    """
    try:
        return open_all(names, headers_only, adapters_only=True)
    except HeadersUnknownError:
        if headers_only:
            raise
        return open_all(names)


def check_same_base(models: Sequence[Checkpoint], base: Checkpoint) -> None:
    """Refuse adapters of another base. Raises UsageError."""
    for model in models:
        if model.parts[0].exact_name != base.exact_name:
            raise UsageError(
                f"--save_as adapter: {model.name} has another base than {base.name}; an adapter is the change of one "
                "base (give it by the same name everywhere)."
            )


def adapter_configs(models: Sequence[Checkpoint]) -> list[JsonObject]:
    """Return the adapters' own configs."""
    return [read_json(model.parts[1].folder / CONFIG, "") for model in models]


def base_modules(base: Checkpoint) -> list[str]:
    """Return the modules of a base that have a weight."""
    return [name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight")]


def different_bases(models: Sequence[Checkpoint]) -> list[str]:
    """Return the sentence on adapters whose configs name different bases, if they do."""
    configs = zip(adapter_configs(models), models, strict=True)
    bases = {str(config.get("base_model_name_or_path")): model for config, model in configs}
    if len(bases) < 2:
        return []
    listed = "; ".join(f"{model.ref.adapter} on {name}" for name, model in bases.items())
    return [
        f"The adapters say that they were trained on bases of different names ({listed}); they are treated as one base."
    ]
