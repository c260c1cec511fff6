"""Configs with transformers' defaults filled in, so that an absent key equals its default."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.files.json_values import JsonValue

if TYPE_CHECKING:
    from transformers import PretrainedConfig

QUANTIZATION = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class ParsedConfig:
    """A config with defaults, and the keys that its class in transformers defines.

    Attributes:
        values: The config with defaults, parts as nested mappings.
        class_keys: {path of a part ("" for the top level): keys that the config class of that part defines}; empty
            where transformers has no class for the model type or cannot read the config.
        source: transformers' config object; None where there is none.
    """

    values: Mapping[str, JsonValue]
    class_keys: Mapping[str, frozenset[str]] = field(default_factory=dict)
    source: PretrainedConfig | None = None

    @property
    def is_known(self) -> bool:
        """True where transformers read the config."""
        return self.source is not None

    @property
    def text(self) -> Mapping[str, JsonValue]:
        """The language model's part."""
        nested = self.values.get("text_config")
        return nested if isinstance(nested, Mapping) else self.values

    @property
    def text_source(self) -> PretrainedConfig | None:
        """transformers' config object of the language model's part."""
        return getattr(self.source, "text_config", None) or self.source


def parse_config(config: Mapping[str, JsonValue]) -> ParsedConfig:
    """Return a config with transformers' defaults filled in; the config itself where transformers cannot read it.

    Code that a config names is not run.
    """
    plain = {key: value for key, value in config.items() if key not in QUANTIZATION}
    model_type = config.get("model_type")
    try:
        from transformers import CONFIG_MAPPING

        from common.quiet_transformers import quiet_transformers

        with quiet_transformers():
            source = CONFIG_MAPPING[str(model_type)].from_dict(deepcopy(plain))
            return ParsedConfig(source.to_dict(), _class_keys(source), source)
    except Exception:  # an unknown model type, or values that its class refuses: the config is compared as written
        return ParsedConfig(plain)


def _class_keys(source: PretrainedConfig, path: str = "") -> dict[str, frozenset[str]]:
    """Return {path of a part: keys that its config class defines}."""
    from transformers import PretrainedConfig

    try:
        keys = set(type(source)().to_dict())
    except Exception:  # a class whose constructor needs arguments
        keys = set(getattr(type(source), "__dataclass_fields__", vars(source)))
    keys_by_part = {path: frozenset(keys)}
    for key, value in vars(source).items():
        if isinstance(value, PretrainedConfig):
            keys_by_part |= _class_keys(value, f"{path}{key}.")
    return keys_by_part
