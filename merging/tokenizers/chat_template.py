"""Chat template of the result: the base's, a named model's, the most common one, or Jinja text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import CheckpointError, UsageError
from common.files.bounded_reading import UnreadableError, read_text
from common.files.paths import read_json
from common.terminal_text import quoted
from merging.checkpoints.checkpoint import Checkpoint

FILE = "chat_template.jinja"
BUILT_IN = Path(__file__).resolve().parents[2] / "configs" / "chat_templates"
"""Folder of named templates, which render conversations as mergekit 0.1.5's templates do."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template (None where there is none) and a description of its origin."""

    text: str | None
    origin: str


def template_of(folder: Path) -> str | None:
    """Return the chat template of a model folder, from chat_template.jinja or tokenizer_config.json; None if absent.

    Raises:
        CheckpointError: A list of templates has no default, or a file cannot be read.
    """
    file = folder / FILE
    if file.is_file():
        try:
            return read_text(file)
        except (UnreadableError, OSError) as error:
            raise CheckpointError(f"The chat template cannot be read: {error}") from error
    config = folder / "tokenizer_config.json"
    template = read_json(config, "").get("chat_template") if config.is_file() else None
    if isinstance(template, list):  # several by name
        if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in template):
            raise CheckpointError(f"{config}: a list of chat templates should hold objects with name and template.")
        template = {entry["name"]: entry.get("template") for entry in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{config}: chat_template should be text.")
    return template


def choose_template(
    policy: str, tokenizer: Path, template_model: Checkpoint, other_models: Sequence[Checkpoint]
) -> ChatTemplate:
    """Return the chat template of the result.

    Args:
        policy: "base" (the template of the tokenizer's folder), "auto" (the most common one, the first of equals), a
            model's name, a name in configs/chat_templates (alpaca, chatml, exaone, llama3, mistral), or Jinja text.
        tokenizer: Folder of the result's tokenizer.
        template_model: The base or the first model.
        other_models: The other inputs.

    Raises:
        UsageError: A named model is not among the inputs or has no template.
    """
    if "{{" in policy or "{%" in policy:
        return ChatTemplate(policy, "given as Jinja")
    if policy == "base":
        owner = next((m.name for m in (template_model, *other_models) if m.folder == tokenizer), str(tokenizer))
        text = template_of(tokenizer)
        return ChatTemplate(text, f"none ({owner} has none)" if text is None else f"that of {owner}")
    models = list({model.folder: model for model in (template_model, *other_models)}.values())
    if policy == "auto":
        templates = [(model, text) for model in models if (text := template_of(model.folder)) is not None]
        if not templates:
            return ChatTemplate(None, "none (none of the models has one)")
        most_common, count = Counter(text for _, text in templates).most_common(1)[0]
        first = next(model for model, text in templates if text == most_common)
        return ChatTemplate(most_common, f"that of {first.name} ({count} of {len(models)} models have it)")
    named = next((model for model in models if policy in (model.name, model.ref.path)), None)
    built_in = BUILT_IN / f"{policy}.jinja"
    if named is None and built_in.is_file():
        return ChatTemplate(built_in.read_text(encoding="utf-8"), f"{policy}, as mergekit 0.1.5 renders it")
    if named is None:
        names = ", ".join(m.name for m in models)
        raise UsageError(
            f"--chat_template {quoted(policy)} must be base, auto, one of the models ({names}) or a Jinja template."
        )
    text = template_of(named.folder)
    if text is None:
        raise UsageError(f"--chat_template {policy}: the model has no chat template.")
    return ChatTemplate(text, f"that of {named.name}")


def write_template(template: ChatTemplate, folder: Path) -> None:
    """Write a chat template into a folder with the result's tokenizer; unchanged where it has the same template.

    The template is written to chat_template.jinja, as transformers saves it, and removed from tokenizer_config.json.
    """
    if template.text == template_of(folder) or template.text is None:
        return
    config = folder / "tokenizer_config.json"
    if config.is_file():
        settings = read_json(config, "")
        if settings.pop("chat_template", None) is not None:
            config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / FILE).write_text(template.text, encoding="utf-8")
