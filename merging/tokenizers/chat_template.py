"""Which chat template the result has: the base's, a named model's, the commonest, or one that was written out."""

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
"""Templates by name: this project's Jinja for the conversations that mergekit 0.1.5's templates render."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template (None: there is none) and, in words, whose it is."""

    text: str | None
    origin: str


def template_of(folder: Path) -> str | None:
    """Return the chat template in a model folder, from its own file or the tokenizer's config.

    Raises CheckpointError for a list of templates without a default, or files that cannot be read.
    """
    file = folder / FILE
    if file.is_file():
        try:
            return read_text(file)
        except (UnreadableError, OSError) as error:
            raise CheckpointError(f"The chat template cannot be read: {error}") from error
    config = folder / "tokenizer_config.json"
    found = read_json(config, "").get("chat_template") if config.is_file() else None
    if isinstance(found, list):  # several by name
        if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in found):
            raise CheckpointError(f"{config}: a list of chat templates should hold objects with name and template.")
        found = {entry["name"]: entry.get("template") for entry in found}.get("default")
    if found is not None and not isinstance(found, str):
        raise CheckpointError(f"{config}: chat_template should be text.")
    return found


def choose_template(
    policy: str, tokenizer: Path, template_model: Checkpoint, others: Sequence[Checkpoint]
) -> ChatTemplate:
    """Return the template by policy: "base", "auto" (the commonest, the earlier where equal), a name of a model or in
    configs/chat_templates (alpaca, chatml, exaone, llama3, mistral), or Jinja.

    tokenizer: the folder that the tokenizer files come from; "base" keeps what it has. Raises UsageError for a model
    that is not among the inputs or has no template.
    """
    if "{{" in policy or "{%" in policy:
        return ChatTemplate(policy, "as given")
    if policy == "base":
        owner = next((m.name for m in (template_model, *others) if m.folder == tokenizer), str(tokenizer))
        text = template_of(tokenizer)
        return ChatTemplate(text, f"none ({owner} has none)" if text is None else f"that of {owner}")
    models = list({model.folder: model for model in (template_model, *others)}.values())
    if policy == "auto":
        templates = [(model, text) for model in models if (text := template_of(model.folder)) is not None]
        if not templates:
            return ChatTemplate(None, "none (none of the models has one)")
        commonest, count = Counter(text for _, text in templates).most_common(1)[0]
        first = next(model for model, text in templates if text == commonest)
        return ChatTemplate(commonest, f"that of {first.name} ({count} of {len(models)} models have it)")
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
        raise UsageError(f"--chat_template {policy}: that model has no chat template.")
    return ChatTemplate(text, f"that of {named.name}")


def write_template(template: ChatTemplate, folder: Path) -> None:
    """Make `folder` (with its tokenizer files copied) have this template; files that have it already stay as they are.

    A template is written to its own file, as transformers saves it, and taken out of the tokenizer's config.
    """
    if template.text == template_of(folder) or template.text is None:
        return
    config = folder / "tokenizer_config.json"
    if config.is_file():
        settings = read_json(config, "")
        if settings.pop("chat_template", None) is not None:
            config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / FILE).write_text(template.text, encoding="utf-8")
