"""The model card: front matter for the hub's model tree, licenses, method, recipe and layer statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from common.files.json_values import JsonValue
from common.versions import project_line
from merging.checkpoints.hub import CheckpointRef
from merging.checkpoints.licenses import Licenses
from merging.plan.merge_plan import Lineage
from merging.recipe.method_registry import all_methods

TAGS = ("merge",)
AIM_TAG = "activation-informed-merging"
AIM_PAPER = "arXiv:2502.02421"


def write_card(
    folder: Path,
    title: str,
    lineage: Lineage,
    front: Mapping[str, JsonValue],
    text: Sequence[str],
    recipe: Mapping[str, JsonValue],
    licenses: Licenses,
    pipeline_tag: str | None,
    layer_table: str | None = None,
    merge_recipe: Mapping[str, JsonValue] | None = None,
) -> None:
    """Write README.md.

    Args:
        folder: of the result.
        title: its heading.
        lineage: method, base, models and omega.
        front: front matter of this kind of result: its parents on the hub, library and first tags.
        text: paragraphs on method and inputs.
        recipe: of the run.
        licenses: of the inputs and the result.
        pipeline_tag: the hub's task; None where it is not known.
        layer_table: statistics per layer as Markdown, where they were computed.
        merge_recipe: of the merged model that was relaxed, where its run record has it.
    """
    matter = {
        **licenses.details,
        **({"base_model": list(front["base_model"])} if front["base_model"] else {}),
        "library_name": front["library_name"],
        **({"pipeline_tag": pipeline_tag} if pipeline_tag else {}),
        "tags": [*front["tags"], *_tags(lineage)],
    }
    parts = [
        f"---\n{yaml.safe_dump(matter, sort_keys=False)}---",
        f"# {title}",
        *text,
        *([licenses.warning] if licenses.warning else []),
        *_recipes(recipe, merge_recipe),
        f"Made by {project_line()}.",
        *([f"## Layer statistics\n\n{layer_table}"] if layer_table else []),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _tags(lineage: Lineage) -> tuple[str, ...]:
    """The tags: AIM's only where AIM was applied."""
    return TAGS if lineage["omega"] is None or lineage.get("control") else (*TAGS, AIM_TAG)


def describe_method(lineage: Lineage) -> str:
    """Return the sentence on the method of the merge, with its own paper, and on AIM where it was applied."""
    name, omega = lineage["method"], lineage["omega"]
    spec = next((m for m in all_methods().values() if name in (m.name, *m.aliases)), None)
    merged = f"Merged with {name}{f' ({spec.paper})' if spec else ''}" if name else ""
    if omega is None:
        return f"{merged or 'Merged with an unknown method'}."
    digits = f"{omega:g}" if float(f"{omega:g}") == omega else repr(omega)
    with_ = "".join(f", {key} {value}" for key, value in lineage.items() if key in ("statistic", "normalization"))
    by = f"by AIM ({AIM_PAPER})"
    if lineage.get("control"):
        by = f"by the control {lineage['control']} of an experiment, not by AIM,"
    relaxed = f"elaxed {by} with omega {digits}{with_}."
    return f"{merged}, r{relaxed}" if merged else f"R{relaxed}"


def _recipes(recipe: Mapping[str, JsonValue], merge_recipe: Mapping[str, JsonValue] | None) -> list[str]:
    """The sections with the recipe: of the merge, and of its relaxation where that is another run."""
    sections = {"Recipe": recipe} if merge_recipe is None else {"Recipe": merge_recipe, "Relaxation": recipe}
    return [
        f"## {title}\n\n```yaml\n{yaml.safe_dump(_without_places(content), sort_keys=False)}```"
        for title, content in sections.items()
    ]


def public_name(name: str) -> str:
    """A hub id as it is, a local folder by its last name: a card is read where the path means nothing."""
    return name if CheckpointRef.parse(name).is_hub_id else "+".join(Path(part).name for part in name.split("+"))


def _without_places(value: JsonValue) -> JsonValue:
    """A recipe with the folders in it by their last names."""
    if isinstance(value, Mapping):
        return {key: _without_places(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_places(entry) for entry in value]
    is_path = isinstance(value, str) and "/" in value and "{" not in value
    return public_name(value) if is_path else value


def pipeline_tag_of(config: Mapping[str, JsonValue]) -> str | None:
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
