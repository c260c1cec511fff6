"""The adapter_config.json of a result: PEFT builds from it exactly the modules that the tensors are for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from common.files.json_values import JsonObject, JsonValue
from merging.checkpoints.adapters.adapter_keys import PREFIX
from merging.checkpoints.hub import CheckpointRef
from merging.lora.layout import AdapterPlan, Sum

SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Keys by which PEFT chooses the modules that get factors."""
SHARED = ("task_type", "auto_mapping", "megatron_core", "peft_version")
"""Keys that are kept where every adapter says the same."""


def adapter_config(
    layout: AdapterPlan, configs: Sequence[Mapping[str, JsonValue]], base: CheckpointRef, base_modules: Collection[str]
) -> JsonObject:
    """Return the config of a planned adapter.

    configs: the adapters' own; base: as the user names it; base_modules: the modules of the base that have a weight.
    """
    named = {**base_named(configs, base), "inference_mode": True}
    if layout.unchanged:
        return {**configs[0], **named}
    sums = layout.sums
    (rank, alpha), _ = Counter((s.rank, _alpha(s)) for s in sums).most_common(1)[0]
    shared = {key: configs[0].get(key) for key in SHARED if len({str(c.get(key)) for c in configs}) == 1}
    return {
        **{key: value for key, value in shared.items() if value is not None},
        "peft_type": "LORA",
        **named,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _pattern({s.module: s.rank for s in sums}, rank),
        "alpha_pattern": _pattern({s.module: _alpha(s) for s in sums}, alpha),
        **_selection(layout, configs, base_modules),
        "modules_to_save": _modules_to_save(layout, configs) or None,
        "bias": _bias(layout, configs),
        "fan_in_fan_out": any(bool(config.get("fan_in_fan_out")) for config in configs),
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "use_rslora": False,
    }


def base_named(configs: Sequence[Mapping[str, JsonValue]], base: CheckpointRef) -> JsonObject:
    """Return what a result calls its base: what its adapters do where they agree, else what the user does.

    A hub id goes before a folder, which must exist.
    """
    bases = {(config.get("base_model_name_or_path"), config.get("revision")) for config in configs}
    name, revision = bases.pop() if len(bases) == 1 else (None, None)
    has_id = isinstance(name, str) and CheckpointRef(name).is_hub_id
    if base.is_hub_id and not has_id:
        return {"base_model_name_or_path": base.repo, "revision": base.revision}
    if has_id or (isinstance(name, str) and name and Path(name).is_dir()):
        return {"base_model_name_or_path": name, "revision": revision}
    return {"base_model_name_or_path": base.full_name, "revision": None}


def _alpha(sum_: Sum) -> float | int:
    """lora_alpha by which PEFT scales with alpha / rank: a whole number where it is one but for rounding."""
    alpha = sum_.scaling * sum_.rank
    whole = round(alpha)
    return whole if whole and abs(alpha - whole) <= 1e-12 * whole else alpha


def _pattern(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """Say for which modules a value is not the usual one: by the last part of a name where all that have it agree."""
    by_end: dict[str, set[float]] = {}
    for module, value in values.items():
        by_end.setdefault(_end(module), set()).add(value)
    pattern = {}
    for module, value in values.items():
        if value != usual:
            pattern[_end(module) if len(by_end[_end(module)]) == 1 else module] = value
    return pattern


def _selection(
    layout: AdapterPlan, configs: Sequence[Mapping[str, JsonValue]], base_modules: Collection[str]
) -> JsonObject:
    """Choose the modules of the sums and no others: as the adapters do if they agree, else by last parts or names."""
    sums = layout.sums
    modules = {s.module for s in sums}
    same = all(config.get(key) == configs[0].get(key) for config in configs for key in SELECTION)
    alike = all({t.model for t in s.terms} == set(range(len(configs))) for s in sums)
    if same and alike and configs[0].get("target_modules"):
        return {key: configs[0].get(key) for key in SELECTION}
    ends = {_end(module) for module in modules}
    unchanged = {name for name in base_modules if _end(name) in ends} - {s.name.removesuffix(".weight") for s in sums}
    return {"target_modules": sorted(modules if unchanged else ends)}


def _end(module: str) -> str:
    return module.rpartition(".")[2]


def _modules_to_save(layout: AdapterPlan, configs: Sequence[Mapping[str, JsonValue]]) -> list[str]:
    """The modules that the adapters list and the result has whole, then those that none lists, by their names."""
    keys = [key.removeprefix(PREFIX) for key in layout.wholes]
    weights = {key.removesuffix(".weight") for key in keys if key.endswith(".weight")}
    listed = [name for config in configs for name in config.get("modules_to_save") or []]
    used = [name for name in dict.fromkeys(listed) if any(_is_part(name, module) for module in weights)]
    unlisted = [module for module in sorted(weights) if not any(_is_part(name, module) for name in used)]
    return [*used, *unlisted]


def _is_part(name: str, module: str) -> bool:
    """Return True for a module that modules_to_save lists, or that lies in one."""
    return bool(re.match(rf"(.*\.)?[^.]*{re.escape(name)}($|\.)", module))


def _bias(layout: AdapterPlan, configs: Sequence[Mapping[str, JsonValue]]) -> str:
    if not any(key.endswith(".bias") for key in layout.wholes):
        return "none"
    kinds = [str(config.get("bias") or "none") for config in configs]
    return next((kind for kind in ("all", "lora_only") if kind in kinds), "none")
