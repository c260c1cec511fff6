"""The model card: front matter for the hub's model tree, licenses, method, recipe and layer statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from common.versions import project_line
from merging.checkpoints.hub import CheckpointRef
from merging.checkpoints.licenses import Licenses
from merging.recipe.method_registry import all_methods

TAGS = ("merge",)
AIM_TAG = "activation-informed-merging"
AIM_PAPER = "arXiv:2502.02421"


def write_card(
    folder: Path,
    title: str,
    lineage: Mapping[str, Any],
    recipe: Mapping[str, Any],
    licenses: Licenses,
    pipeline_tag: str | None,
    layer_statistics: str | None = None,
    reading: Sequence[str] = (),
    merge_recipe: Mapping[str, Any] | None = None,
) -> None:
    """Write README.md.

    layer_statistics: their table as Markdown, where they were computed; reading: sentences on how the inputs' weights
    were read; merge_recipe: of the merged model that was relaxed, where its run record has it.
    """
    named = [CheckpointRef.parse(model) for model in (lineage["base_model"], *lineage["models"]) if model]
    parents = [part.repo for ref in named for part in (ref.alone, ref.adapter) if part and part.is_hub_id]
    parts = [
        _front(licenses, parents, "transformers", pipeline_tag, _tags(lineage)),
        f"# {title}",
        _method(lineage),
        f"Base model: {public_name(lineage['base_model']) if lineage['base_model'] else 'none'}",
        "Merged models:",
        "\n".join(f"- {public_name(model)}" for model in lineage["models"]),
        *reading,
        *([licenses.warning] if licenses.warning else []),
        *_recipes(recipe, merge_recipe),
        f"Made by {project_line()}.",
        *([f"## Layer statistics\n\n{layer_statistics}"] if layer_statistics else []),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def write_adapter_card(
    folder: Path,
    title: str,
    lineage: Mapping[str, Any],
    recipe: Mapping[str, Any],
    licenses: Licenses,
    pipeline_tag: str | None,
    base: str,
    remarks: Sequence[str],
    merge_recipe: Mapping[str, Any] | None = None,
) -> None:
    """Write README.md of an adapter.

    base: the base's name in its config; remarks: what its user has to know; merge_recipe: as in `write_card`.
    """
    parents = [base] if CheckpointRef(base).is_hub_id else []
    parts = [
        _front(licenses, parents, "peft", pipeline_tag, ("lora", *_tags(lineage))),
        f"# {title}",
        f"A LoRA adapter for {public_name(base)}: PEFT adds it to that model "
        "(`PeftModel.from_pretrained(base, folder)`).",
        _method(lineage),
        "Adapters:",
        "\n".join(f"- {public_name(model)}" for model in lineage["models"]),
        *remarks,
        *([licenses.warning] if licenses.warning else []),
        *_recipes(recipe, merge_recipe),
        f"Made by {project_line()}.",
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _front(
    licenses: Licenses, parents: Sequence[str], library: str, pipeline_tag: str | None, tags: Sequence[str]
) -> str:
    """The front matter, which the hub reads."""
    front = {
        **licenses.details,
        **({"base_model": list(parents)} if parents else {}),
        "library_name": library,
        **({"pipeline_tag": pipeline_tag} if pipeline_tag else {}),
        "tags": list(tags),
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---"


def _tags(lineage: Mapping[str, Any]) -> tuple[str, ...]:
    """The tags: AIM's only where AIM was applied."""
    return TAGS if lineage["omega"] is None or lineage.get("control") else (*TAGS, AIM_TAG)


def _method(lineage: Mapping[str, Any]) -> str:
    """The sentence on the method of the merge, with its own paper, and on AIM where it was applied."""
    name, omega = lineage["method"], lineage["omega"]
    known = next((m for m in all_methods().values() if name in (m.name, *m.aliases)), None)
    merged = f"Merged with {name}{f' ({known.paper})' if known else ''}" if name else ""
    if omega is None:
        return f"{merged or 'Merged with an unknown method'}."
    digits = f"{omega:g}" if float(f"{omega:g}") == omega else repr(omega)
    with_ = "".join(f", {key} {lineage[key]}" for key in ("statistic", "normalization") if key in lineage)
    by = f"by AIM ({AIM_PAPER})"
    if lineage.get("control"):
        by = f"by the control {lineage['control']} of an experiment, not by AIM,"
    relaxed = f"elaxed {by} with omega {digits}{with_}."
    return f"{merged}, r{relaxed}" if merged else f"R{relaxed}"


def _recipes(recipe: Mapping[str, Any], merge_recipe: Mapping[str, Any] | None) -> list[str]:
    """The sections with the recipe: of the merge, and of its relaxation where that is another run."""
    sections = {"Recipe": recipe} if merge_recipe is None else {"Recipe": merge_recipe, "Relaxation": recipe}
    return [
        f"## {title}\n\n```yaml\n{yaml.safe_dump(_without_places(content), sort_keys=False)}```"
        for title, content in sections.items()
    ]


def public_name(name: str) -> str:
    """A hub id as it is, a local folder by its last name: a card is read where the path means nothing."""
    return name if CheckpointRef.parse(name).is_hub_id else "+".join(Path(part).name for part in name.split("+"))


def _without_places(value: Any) -> Any:
    """A recipe with the folders in it by their last names."""
    if isinstance(value, Mapping):
        return {key: _without_places(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_places(entry) for entry in value]
    is_path = isinstance(value, str) and "/" in value and "{" not in value
    return public_name(value) if is_path else value


def pipeline_tag_of(config: Mapping[str, Any]) -> str | None:
    """Return the hub's task for the architecture that a config names, or None where its name does not tell."""
    names = " ".join(config.get("architectures") or [])
    endings = {
        "ForConditionalGeneration": "image-text-to-text" if "vision_config" in config else "text2text-generation",
        "ForMaskedLM": "fill-mask",
        "ForSequenceClassification": "text-classification",
        "ForTokenClassification": "token-classification",
        "ForQuestionAnswering": "question-answering",
        "ForCausalLM": "text-generation",
        "LMHeadModel": "text-generation",
    }
    return next((tag for ending, tag in endings.items() if ending in names), None)
