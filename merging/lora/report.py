"""Report of an adapter's plan for `--dry_run`, as data and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.files.json_values import JsonObject, JsonValue
from merging.lora.layout import AdapterPlan
from merging.lora.whole import adapted
from merging.plan.checks import free_space
from merging.plan.merge_plan import MergePlan
from merging.plan.report import size_of


def describe_adapter(
    plan: MergePlan,
    layout: AdapterPlan,
    config: Mapping[str, JsonValue],
    save_path: Path | None,
    tokenizer: str | None,
    license_name: str | None,
    notes: Sequence[str],
) -> JsonObject:
    """Return the plan of an adapter as data for JSON.

    Args:
        plan: of the run.
        layout: the tensors of the adapter.
        config: its adapter_config.json.
        save_path: the folder of the result, None for the current folder.
        tokenizer: the model whose tokenizer the adapter brings; None where the base has it.
        license_name: of the result; None where the inputs state none.
        notes: added to those of the plan.
    """
    return {
        "program": plan.program,
        "save_as": "adapter",
        "recipe": dict(plan.recipe),
        "sources": dict(plan.sources),
        "base": {"name": plan.base.name, "exact": plan.base.exact_name},
        "adapters": [
            {
                "name": model.name,
                "exact": model.exact_name,
                "factors": len(adapted(model).products),
                "whole": len(adapted(model).whole),
                "licenses": list(model.licenses),
            }
            for model in plan.inputs.models
        ],
        "result": {
            "factors": len(layout.sums),
            "ranks": dict(Counter(s.rank for s in layout.sums)),
            "whole": list(layout.wholes),
            "dtypes": sorted({entry.dtype for entry in layout.tensors}),
            "results": len(plan.variants),
            "tokenizer": tokenizer,
            "license": license_name,
        },
        "settings": dict(config),
        "bytes_to_write": plan.bytes,
        "bytes_free": free_space(save_path or Path()),
        "notes": [*plan.notes, *notes],
    }


def adapter_as_text(plan: Mapping[str, JsonValue]) -> str:
    """Return the description for people."""
    lines = ["Adapters", f"  base: {plan['base']['name']}"]
    for one in plan["adapters"]:
        whole = f", {one['whole']} whole tensors" if one["whole"] else ""
        license = f", license {', '.join(one['licenses'])}" if one["licenses"] else ""
        lines.append(f"  {one['name']}: {one['factors']} matrices{whole}{license}")
    lines.append("Recipe")
    for key, value in plan["recipe"].items():
        source = plan["sources"].get(key)
        lines.append(f"  {key}: {value}{f'  ({source})' if source else ''}")
    result = plan["result"]
    ranks = ", ".join(f"rank {rank} ({count})" for rank, count in sorted(result["ranks"].items()))
    lines.append("Result")
    lines.append(f"  an adapter of {result['factors']} matrices: {ranks}; {', '.join(result['dtypes'])}")
    if result["whole"]:
        lines.append(f"  stored whole: {', '.join(result['whole'][:3])} ({len(result['whole'])} tensors)")
    lines.append(
        f"  tokenizer: {result['tokenizer'] or 'none, the base has it'}, license: "
        f"{result['license'] or 'not stated by the inputs'}"
    )
    lines.append("Cost")
    lines.append(f"  writes {size_of(plan['bytes_to_write'])} ({size_of(plan['bytes_free'])} free)")
    if plan["notes"]:
        lines += ["Notes", *(f"  {note}" for note in plan["notes"])]
    return "\n".join(lines)
