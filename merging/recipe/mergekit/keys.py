"""Keys of a mergekit recipe: those that are read, those without effect, and those that stand at the wrong level."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from common.errors import UsageError
from common.terminal_text import foreign
from merging.recipe.method_registry import all_methods

LABELS = (
    "name", "description", "desc", "comment", "comments", "note", "notes", "author", "authors", "version", "license",
    "tags", "label", "title", "id", "url", "date", "language", "pipeline_tag", "library_name", "metadata", "alias",
)  # fmt: skip
"""Keys that people add for the reader; mergekit 0.1.5 ignores each of them (`name` is read by mergekit-multi alone)."""
LEGACY = ("embed_slerp", "t", "scale", "consensus_method", "majority_sign_method")
"""Parameters of earlier versions of mergekit, and those that are often left over from another method."""
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
"""Keys of mergekit that stand at the top level of a recipe."""
LIKENESS = 0.66
"""Ratio of difflib above which an unknown key counts as a misspelt one."""


@cache
def parameter_names() -> frozenset[str]:
    """Names that any method's parameters have in mergekit's form."""
    names = set(LEGACY)
    for method in all_methods().values():
        names |= {parameter.mergekit.name or parameter.name for parameter in method.parameters.values()}
        names |= set(method.mergekit.idle) if method.mergekit else set()
    return frozenset(names)


def inside(where: str, key: object) -> str:
    """Return how messages call a key: "models[1].parameters.density"."""
    name = foreign(str(key), 60)
    return f"{where}.{name}" if where else name


def check_keys(
    content: Mapping[str, Any],
    known: Sequence[str],
    where: str,
    notes: list[str],
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """Sort the keys of one mapping of a recipe: read, without effect (a note), misspelt or misplaced (an error).

    Args:
        content: the mapping.
        known: keys that are read there.
        where: where it stands, for messages.
        notes: receives a sentence for each key without effect.
        elsewhere: {key: the place where it belongs} for keys that are read at another level.

    Raises:
        UsageError: for a key that is misspelt, or belongs at another level.
    """
    for key in content:
        at = inside(where, key)
        if key in known:
            continue
        if elsewhere and key in elsewhere:
            raise UsageError(f"{at}: mergekit does not read {key} there; write it {elsewhere[key]}.")
        if is_label(key):
            notes.append(f"{at} has no effect: it is a label.")
        elif key in COMMAND_LINE:
            notes.append(f"{at} has no effect: it is an option of mergekit's command line, no key of a recipe.")
        elif hint := misspelt(str(key), known):
            raise UsageError(f"{at} is no key of a recipe.{hint}")
        else:
            notes.append(f"{at} has no effect: neither mergekit 0.1.5 nor this project knows the key.")


def is_label(key: object) -> bool:
    """Return whether a key is a label, or holds YAML anchors (`x-...`, `_...`, `....`)."""
    word = str(key)
    return word.lower() in LABELS or word.startswith(("x-", "x_", "_", "."))


def misspelt(word: str, known: Sequence[str]) -> str:
    """Return " Did you mean 'x'?" where a word is close to a known one, else an empty string."""
    match = difflib.get_close_matches(word.lower(), known, n=1, cutoff=LIKENESS)
    return f" Did you mean {match[0]!r}?" if match else ""


def places_of_parameters(where: str) -> dict[str, str]:
    """Return {parameter: "under `WHERE.parameters`"} for every method's parameters."""
    place = f"under `{inside(where, 'parameters')}`"
    return dict.fromkeys(parameter_names(), place)


def places_of_general(known: Sequence[str] = ()) -> dict[str, str]:
    """Return {key: "at the top level of the recipe"} for the general keys that are not `known`."""
    return {key: "at the top level of the recipe" for key in GENERAL if key not in known}
