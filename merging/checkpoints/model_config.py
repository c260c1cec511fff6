"""Facts from a model's config.json and model card: tied embeddings, licenses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from common.errors import CheckpointError
from common.files.bounded_reading import MAX_YAML, LimitError, parse_yaml, read_text
from common.files.json_values import JsonObject, JsonValue
from common.terminal_text import foreign
from merging.checkpoints.hub import CheckpointRef
from merging.checkpoints.tensor_names import role_of

LICENSE_KEYS = ("license", "license_name", "license_link")
"""License keys in the front matter of a model card."""


def text_config_of(config: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
    """Return the language model's part of a config (a vision-language model nests it)."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def ties_embeddings(config: Mapping[str, JsonValue], names: Iterable[str]) -> bool:
    """Return True where the output head shares the input embedding, by the config or else by the stored names."""
    ties, has_head = stated_tie(config), any(role_of(name) == "head" for name in names)
    return not has_head if ties is None or is_tied_within(config) else ties


def stated_tie(config: Mapping[str, JsonValue]) -> bool | None:
    """Return tie_word_embeddings of a config; None where it is absent (transformers 4 did not write defaults).

    The top level overrides the language model's part, as in transformers 5.
    """
    ties = config.get("tie_word_embeddings", text_config_of(config).get("tie_word_embeddings"))
    return None if ties is None else bool(ties)


def is_tied_within(config: Mapping[str, JsonValue]) -> bool:
    """Return True where the top level is untied and the language model's part tied; the tensors decide then."""
    inner = text_config_of(config)
    return config.get("tie_word_embeddings") is False and inner is not config and bool(inner.get("tie_word_embeddings"))


def with_changes(config: Mapping[str, JsonValue], changes: Mapping[str, JsonValue]) -> JsonObject:
    """Return a config with changed keys, at the top level, in the language model's part, or in both, as it has them.

    A key that the config lacks is added to the language model's part.
    """
    nested = config.get("text_config")
    if not isinstance(nested, Mapping):
        return {**config, **changes}
    inner = {key: value for key, value in changes.items() if key in nested or key not in config}
    outer = {key: value for key, value in changes.items() if key in config}
    return {**config, **outer, "text_config": {**nested, **inner}}


def stated_licenses(card: Path) -> tuple[str, ...]:
    """Return the licenses in a model card's front matter; none where there is no card or it cannot be parsed.

    `other` is replaced by `license_name`.

    Raises:
        CheckpointError: The front matter exceeds the limits of `common.files.bounded_reading`.
    """
    front = _front_matter(card)
    license_value = front.get("license")
    if license_value == "other":
        license_value = front.get("license_name", license_value)
    listed = license_value if isinstance(license_value, list) else [license_value]
    return tuple(foreign(license) for license in listed if isinstance(license, str) and license.strip())


def license_details(card: Path, ref: CheckpointRef) -> JsonObject:
    """Return `license`, `license_name` and `license_link` of a model card, as far as it states them.

    A relative link of a hub model becomes a URL. Raises CheckpointError as `stated_licenses` does.
    """
    front = _front_matter(card)
    if not stated_licenses(card):
        return {}
    listed = {"license": front["license"]} if isinstance(front["license"], list) else {}
    texts = {key: front[key] for key in LICENSE_KEYS if isinstance(front.get(key), str) and front[key].strip()}
    link = texts.get("license_link", "")
    if link and "://" not in link and ref.is_hub_id:
        texts["license_link"] = f"https://huggingface.co/{ref.repo}/blob/main/{link}"
    return {**listed, **{key: foreign(text) for key, text in texts.items()}}


def _front_matter(card: Path) -> Mapping[str, JsonValue]:
    """Return the front matter of a model card; empty where there is none."""
    try:
        lines = read_text(card, MAX_YAML, cut=True).splitlines()
        yaml_text = "\n".join(lines[1 : lines.index("---", 1)]) if lines[:1] == ["---"] else ""
        front = next(iter(parse_yaml(yaml_text, f"The front matter of {card}")), None)
    except LimitError as error:
        raise CheckpointError(str(error)) from error
    except (OSError, ValueError):
        return {}
    return front if isinstance(front, Mapping) else {}
