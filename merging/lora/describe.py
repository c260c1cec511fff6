"""A planned adapter in words and as data, for `--dry_run`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merging.checkpoints.licenses import licenses_of
from merging.lora.whole import adapted
from merging.lora.work import AdapterWork
from merging.plan.checks import free_space
from merging.plan.report import size_of


def describe_adapter(work: AdapterWork, save_path: Path | None) -> dict[str, Any]:
    """Return the plan as data for JSON."""
    planned, licenses = work.plan, licenses_of(work.inputs.all)
    return {
        "program": work.program,
        "save_as": "adapter",
        "recipe": dict(work.recipe),
        "sources": dict(work.sources),
        "base": {"name": work.base.name, "exact": work.base.exact_name},
        "adapters": [
            {
                "name": model.name,
                "exact": model.exact_name,
                "factors": len(adapted(model).products),
                "whole": len(adapted(model).whole),
                "licenses": list(model.licenses),
            }
            for model in work.inputs.models
        ],
        "result": {
            "factors": len(planned.sums),
            "ranks": dict(Counter(s.rank for s in planned.sums)),
            "whole": list(planned.wholes),
            "dtypes": sorted({entry.dtype for entry in planned.tensors}),
            "results": len(work.variants),
            "tokenizer": planned.of_model.vocabulary.name if work.has_tokenizer else None,
            "license": licenses.result,
        },
        "settings": dict(work.settings),
        "bytes_to_write": work.bytes,
        "bytes_free": free_space(save_path or Path()),
        "notes": [*work.notes, *work.remarks, *([licenses.warning] if licenses.warning else [])],
    }


def adapter_as_text(plan: Mapping[str, Any]) -> str:
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
