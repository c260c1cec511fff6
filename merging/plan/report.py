"""Report of a plan for `--dry_run`, as text and as JSON: tensors, result, cost, notes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from common.files.json_values import JsonObject, JsonValue
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.storage import tensor_bytes
from merging.plan.checks import free_space
from merging.plan.merge_plan import MergePlan
from merging.plan.slices import Inputs
from merging.plan.types import Plan
from merging.recipe.method_registry import MergeMethod, find_method
from merging.tokenizers.choice import embedding_rows
from merging.tokenizers.token_ids import token_ids

INTERPRETER = 400 << 20
"""Bytes of the interpreter, torch and tokenizers on a CPU (scripts/benchmarks/bench_memory.py)."""
BLOCK = 4 << 20
"""Bytes of a block in fp32 (merging.ops.tensor_blocks.BLOCK_ELEMENTS of them)."""


def describe(
    plan: MergePlan, save_path: Path | None, license_name: str | None, notes: Sequence[str] = ()
) -> JsonObject:
    """Return the plan of a model as data for JSON.

    Args:
        plan: of a model.
        save_path: the folder of the result, None for the current folder.
        license_name: of the result; None where the inputs state none.
        notes: added to those of the plan.
    """
    model, inputs = plan.model, plan.inputs
    merged = [tensor for tensor in model.tensors if tensor.is_merged]
    method = plan.recipe.get("method") or plan.recipe.get("merge_method")
    return {
        "program": plan.program,
        "recipe": dict(plan.recipe),
        "sources": dict(plan.sources),
        "models": [_model(checkpoint, inputs) for checkpoint in inputs.all],
        "tensors": {
            "total": len(model.tensors),
            "merged": len(merged),
            "copied": len(model.tensors) - len(merged),
            "aligned": [t.name for t in model.tensors if any(source.alignment for source in t.sources)],
            "left_out": dict(model.left_out),
        },
        "result": {
            "parameters": sum(math.prod(tensor.shape) for tensor in model.tensors),
            "dtypes": sorted({tensor.dtype for tensor in model.tensors}),
            "tied": model.tied,
            "vocabulary": model.vocabulary.name,
            "tokens": None if model.vocabulary.tokens is None else len(model.vocabulary.tokens),
            "chat_template": plan.template.origin,
            "license": license_name,
        },
        "bytes_to_read": model.bytes_read,
        "bytes_to_write": plan.bytes,
        "bytes_free": free_space(save_path or Path()),
        "peak_memory_bytes": peak_memory(model, find_method(method) if method else None),
        "notes": [*plan.notes, *notes],
    }


def peak_memory(plan: Plan, method: MergeMethod | None) -> int:
    """Return an estimate of the anonymous memory in bytes: blocks of every model, and a method's whole matrices."""
    models = max((len(tensor.models) for tensor in plan.tensors), default=0)
    inputs = {id(source.checkpoint): source.checkpoint for tensor in plan.tensors for source in tensor.sources}
    gguf_bytes = sum(
        tensor_bytes(info.shape, info.dtype)
        for checkpoint in inputs.values()
        if any(file.suffix == ".gguf" for file in checkpoint.files)
        for info in checkpoint.tensors.values()
    )
    streaming = INTERPRETER + BLOCK * (4 * models + 8) + gguf_bytes
    if method is None or not any(method.whole_matrix):
        return streaming
    matrices, squares = method.whole_matrix
    shapes = [t.shape[-2:] for t in plan.tensors if len(t.shape) in (2, 3) and not t.is_embedding]
    return streaming + 4 * max((matrices * out * width + squares * width * width for out, width in shapes), default=0)


def _role(checkpoint: Checkpoint, inputs: Inputs) -> str:
    if checkpoint is inputs.base:
        return "base"
    return "model" if any(checkpoint is model for model in inputs.models) else "template model"


def _model(checkpoint: Checkpoint, inputs: Inputs) -> JsonObject:
    tokens = token_ids(checkpoint.folder)
    return {
        "name": checkpoint.name,
        "role": _role(checkpoint, inputs),
        "exact": checkpoint.exact_name,
        "commit": checkpoint.commit,
        "architecture": (checkpoint.config.get("architectures") or [None])[0],
        "tensors": len(checkpoint.tensors),
        "dtypes": dict(Counter(info.dtype for info in checkpoint.tensors.values())),
        "rows": embedding_rows(checkpoint),
        "tokens": None if tokens is None else len(tokens),
        "tied": checkpoint.ties_embeddings,
        "licenses": list(checkpoint.licenses),
    }


def as_text(plan: Mapping[str, JsonValue]) -> str:
    """Return the plan of `describe` as text."""
    lines = ["Models"]
    heads = ("", "role", "architecture", "tensors", "dtypes", "rows", "tokens", "tied", "license", "commit")
    table = [heads]
    for model in plan["models"]:
        table.append(
            (
                model["name"],
                model["role"],
                str(model["architecture"]),
                str(model["tensors"]),
                ", ".join(model["dtypes"]),
                str(model["rows"] or "-"),
                str(model["tokens"] or "-"),
                "yes" if model["tied"] else "no",
                ", ".join(model["licenses"]) or "-",
                (model["commit"] or "-")[:12],
            )
        )
    widths = [max(len(row[i]) for row in table) for i in range(len(heads))]
    lines += ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
    lines.append("Recipe")
    for key, value in plan["recipe"].items():
        source = plan["sources"].get(key)
        first, *rest = _as_yaml(key, value)
        lines += [f"  {first}{f'  ({source})' if source else ''}", *(f"  {line}" for line in rest)]
    tensors, result = plan["tensors"], plan["result"]
    lines.append("Result")
    lines.append(
        f"  {tensors['total']} tensors ({tensors['merged']} merged, {tensors['copied']} copied, "
        f"{len(tensors['aligned'])} aligned by token), {result['parameters']:,} parameters, "
        f"{', '.join(result['dtypes'])}, head {'tied' if result['tied'] else 'not tied'}"
    )
    lines.append(
        f"  tokenizer of {result['vocabulary']} ({result['tokens'] or 'no'} tokens), chat template: "
        f"{result['chat_template']}, license: {result['license'] or 'not stated by the inputs'}"
    )
    lines.append("Cost")
    lines.append(
        f"  reads {size_of(plan['bytes_to_read'])}, writes {size_of(plan['bytes_to_write'])} "
        f"({size_of(plan['bytes_free'])} free), peak memory about {size_of(plan['peak_memory_bytes'])}"
    )
    if plan["notes"]:
        lines += ["Notes", *(f"  {note}" for note in plan["notes"])]
    return "\n".join(lines)


def _as_yaml(key: str, value: JsonValue) -> list[str]:
    """Return a key of the recipe as YAML lines: one line, unless its value holds mappings."""
    nested = isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(v, Mapping) for v in value))
    text = yaml.safe_dump({key: value}, default_flow_style=not nested, sort_keys=False, width=10_000).strip()
    return (text if nested else text[1:-1]).splitlines()


def size_of(count: int) -> str:
    """Return a number of bytes with its unit (decimal)."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} TB"
