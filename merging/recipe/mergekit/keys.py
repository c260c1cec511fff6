"""Keys of mergekit recipes: supported, without effect, misspelled, or at the wrong level."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import cache

from common.errors import UsageError
from common.files.json_values import JsonValue
from common.terminal_text import foreign
from merging.recipe.method_registry import all_methods

LABELS = (
    "name", "description", "desc", "comment", "comments", "note", "notes", "author", "authors", "version", "license",
    "tags", "label", "title", "id", "url", "date", "language", "pipeline_tag", "library_name", "metadata", "alias",
)  # fmt: skip
"""Descriptive keys, which mergekit 0.1.5 ignores (only mergekit-multi reads `name`)."""
LEGACY = ("embed_slerp", "t", "scale", "consensus_method", "majority_sign_method")
"""Parameters of earlier mergekit versions, and leftovers from other methods."""
COMMAND_LINE = (
    "allow_crimes", "unsafe_truncate_embeddings", "transformers_cache", "lora_merge_cache", "lora_merge_dtype", "cuda",
    "device", "low_cpu_memory", "out_shard_size", "copy_tokenizer", "clone_tensors", "trust_remote_code",
    "lazy_unpickle", "write_model_card", "safe_serialization", "verbosity", "verbose", "quiet", "read_to_gpu",
    "multi_gpu", "num_threads", "gpu_rich", "async_write", "write_threads",
)  # fmt: skip
"""Options of mergekit's command line, which it does not read from a recipe."""
GENERAL = (
    "merge_method", "base_model", "dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template", "slices",
    "models", "modules",
)  # fmt: skip
"""Keys of mergekit at the top level of a recipe."""
LIKENESS = 0.66
"""difflib ratio above which an unknown key counts as misspelled."""


@cache
def parameter_names() -> frozenset[str]:
    """Return the names of all methods' parameters in mergekit's form."""
    names = set(LEGACY)
    for method in all_methods().values():
        names |= {parameter.mergekit.name or parameter.name for parameter in method.parameters.values()}
        names |= set(method.mergekit_idle)
    return frozenset(names)


def inside(where: str, key: object) -> str:
    """Return the path of a key for messages: "models[1].parameters.density"."""
    name = foreign(str(key), 60)
    return f"{where}.{name}" if where else name


def check_keys(
    content: Mapping[str, JsonValue],
    valid: Sequence[str],
    where: str,
    notes: list[str],
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """Check the keys of one mapping of a recipe; keys without effect give a note.

    Args:
        content: The mapping.
        valid: Keys that are read at this level.
        where: Path of the mapping, for messages.
        notes: Receives a note for each key without effect.
        elsewhere: {key: its right place} for keys of other levels.

    Raises:
        UsageError: A key is misspelled, or belongs to another level.
    """
    for key in content:
        at = inside(where, key)
        if key in valid:
            continue
        if elsewhere and key in elsewhere:
            raise UsageError(f"{at}: mergekit does not read {key} there; write it {elsewhere[key]}.")
        if is_label(key):
            notes.append(f"{at} has no effect: it is a label.")
        elif key in COMMAND_LINE:
            notes.append(f"{at} has no effect: it is an option of mergekit's command line, no key of a recipe.")
        elif hint := spelling_hint(str(key), valid):
            raise UsageError(f"{at} is no key of a recipe.{hint}")
        else:
            notes.append(f"{at} has no effect: neither mergekit 0.1.5 nor this project knows the key.")


def is_label(key: object) -> bool:
    """Return True for a descriptive key, or a holder of YAML anchors (`x-...`, `_...`, `....`)."""
    word = str(key)
    return word.lower() in LABELS or word.startswith(("x-", "x_", "_", "."))


def spelling_hint(word: str, valid: Sequence[str]) -> str:
    """Return " Did you mean 'x'?" where a word is close to a valid one, else an empty string."""
    match = difflib.get_close_matches(word.lower(), valid, n=1, cutoff=LIKENESS)
    return f" Did you mean {match[0]!r}?" if match else ""


def places_of_parameters(where: str) -> dict[str, str]:
    """Return {parameter: "under `WHERE.parameters`"} for every method's parameters."""
    place = f"under `{inside(where, 'parameters')}`"
    return dict.fromkeys(parameter_names(), place)


def places_of_general(valid: Sequence[str] = ()) -> dict[str, str]:
    """Return {key: "at the top level of the recipe"} for the general keys except `valid`."""
    return {key: "at the top level of the recipe" for key in GENERAL if key not in valid}
