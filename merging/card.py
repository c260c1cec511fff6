"""The model card: front matter for the hub's model tree, licences of the inputs, method, recipe and health figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from merging.checkpoint import Checkpoint
from merging.hub import CheckpointRef

TAGS = ("merge", "activation-informed-merging")


@dataclass(frozen=True)
class Licences:
    """The licences of the inputs by model (those that state one), and the one that the result carries."""

    by_model: Mapping[str, tuple[str, ...]]
    result: str | None
    warning: str | None


def licences_of(checkpoints: Sequence[Checkpoint]) -> Licences:
    """Read what the inputs' model cards say. The result has a licence only where all that state one agree."""
    by_model = {checkpoint.name: checkpoint.licenses for checkpoint in checkpoints if checkpoint.licenses}
    found = list(dict.fromkeys(licence for licences in by_model.values() for licence in licences))
    if len(found) > 1:
        told = "; ".join(f"{name}: {', '.join(licences)}" for name, licences in by_model.items())
        return Licences(
            by_model, None, f"The inputs have different licences ({told}); the result's must satisfy them all."
        )
    return Licences(by_model, found[0] if found else None, None)


def write_card(
    folder: Path,
    title: str,
    lineage: Mapping[str, Any],
    recipe: Mapping[str, Any],
    paper: str,
    licences: Licences,
    pipeline_tag: str | None,
    health: str | None = None,
    reading: Sequence[str] = (),
) -> None:
    """Write README.md. health: the figures as Markdown, where they were taken; reading: sentences on how the inputs'
    weights were read.
    """
    named = [CheckpointRef.parse(model) for model in (lineage["base_model"], *lineage["models"]) if model]
    parents = [part.repo for ref in named for part in (ref.alone, ref.adapter) if part and part.is_hub_id]
    parts = [
        _front(licences, parents, "transformers", pipeline_tag, TAGS),
        f"# {title}",
        f"Merged with {lineage['method'] or 'an unknown method'} ({paper}){_relaxed(lineage, ', relaxed')}.",
        f"Base model: {public_name(lineage['base_model']) if lineage['base_model'] else 'none'}",
        "Merged models:",
        "\n".join(f"- {public_name(model)}" for model in lineage["models"]),
        *reading,
        *([licences.warning] if licences.warning else []),
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(_without_places(recipe), sort_keys=False)}```",
        *([f"## Health\n\n{health}"] if health else []),
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def write_adapter_card(
    folder: Path,
    title: str,
    lineage: Mapping[str, Any],
    recipe: Mapping[str, Any],
    paper: str,
    licences: Licences,
    pipeline_tag: str | None,
    base: str,
    remarks: Sequence[str],
) -> None:
    """Write README.md of an adapter. base: what its config calls the base; remarks: what its user has to know."""
    parents = [base] if CheckpointRef(base).is_hub_id else []
    merged = f"Merged with {lineage['method']} ({paper}){_relaxed(lineage, ', relaxed')}."
    parts = [
        _front(licences, parents, "peft", pipeline_tag, ("lora", *TAGS)),
        f"# {title}",
        f"A LoRA adapter for {public_name(base)}: PEFT adds it to that model "
        "(`PeftModel.from_pretrained(base, folder)`).",
        merged if lineage["method"] else f"{_relaxed(lineage, 'Relaxed')}.",
        "Adapters:",
        "\n".join(f"- {public_name(model)}" for model in lineage["models"]),
        *remarks,
        *([licences.warning] if licences.warning else []),
        f"## Recipe\n\n```yaml\n{yaml.safe_dump(_without_places(recipe), sort_keys=False)}```",
    ]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _front(
    licences: Licences, parents: Sequence[str], library: str, pipeline_tag: str | None, tags: Sequence[str]
) -> str:
    """The front matter, which the hub reads."""
    front = {
        **({"license": licences.result} if licences.result else {"license": "other"} if licences.warning else {}),
        **({"base_model": list(parents)} if parents else {}),
        "library_name": library,
        **({"pipeline_tag": pipeline_tag} if pipeline_tag else {}),
        "tags": list(tags),
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---"


def _relaxed(lineage: Mapping[str, Any], words: str) -> str:
    """The words that say that AIM was applied, with its omega; nothing where it was not."""
    omega = lineage["omega"]
    return f"{words} by AIM (arXiv:2502.02421) with omega {omega:g}" if omega is not None else ""


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
