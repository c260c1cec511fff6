"""Types of parsed JSON and YAML, for documents whose keys are checked where they are used."""

from typing import Any, TypeAlias

JsonValue: TypeAlias = Any
"""A value of a parsed JSON or YAML document: None, bool, int, float, str, list, or JsonObject.

Only for a value of such a document that is used by its key's meaning, after a check or by a program that wrote the
document itself. A value that is only compared, printed, or tested with isinstance is an `object`; anything that does
not come from a document or go into one has a type of its own.
"""

JsonObject: TypeAlias = dict[str, Any]
"""An object of a parsed JSON or YAML document, or one that is about to be written: config, lock, record, recipe.

The keys of a recipe count as such where flags give them, too.

A reader that does not change it takes `Mapping[str, JsonValue]`.
"""
