"""The lock of an output: its inputs by commit and digest, every effective parameter, and the digest of every tensor.

It holds nothing that differs between two runs of one merge, no time and no place of the output.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from common.errors import CheckpointError, UsageError
from common.files.bounded_reading import UnreadableError
from common.files.json_types import Between, Each, Fields, ListOf, Matching, Maybe, OneOf, check_shape
from common.files.json_values import JsonObject, JsonValue
from common.files.paths import read_json
from common.terminal_text import foreign, quoted
from merging.checkpoints.checkpoint import Checkpoint
from merging.checkpoints.model_folder import tokenizer_files
from merging.checkpoints.storage import CODES
from merging.output.digests import digest_of
from merging.output.staging.output_path import RECORD
from merging.plan.types import Listing, Named
from merging.recipe import DTYPES, MergeRecipe

LOCK_FILE = "merge.lock.json"
FORMAT = "merge-lock-2"
DIGEST = Matching("blake3:[0-9a-f]{64}", "a digest (blake3: and 64 digits)")
_TEXT = Matching(r"[\s\S]{1,4096}", "text of 1 to 4096 characters")
SHAPE = Fields(
    {
        "format": str,
        "program": OneOf(("merge.py", "performAIM.py")),
        "recipe": dict,
        "sources": Each(str),
        "device": OneOf(("cpu", "cuda")),
        "max_shard_size": Matching(r"\s*\d{1,15}(\.\d{1,15})?\s*([KMGkmg][iI]?[bB]|)\s*", "a size such as 5GB"),
        "versions": Each(str),
        "inputs": ListOf(
            Fields(
                {"name": _TEXT, "exact": _TEXT, "commit": Maybe(str)}
                | {"files": Each(Fields({"bytes": Between(0), "digest": Maybe(DIGEST)}))}
            )
        ),
        "other_inputs": Each(Maybe(DIGEST)),
        "files": Each(Maybe(DIGEST)),
        "tensors": Each(Fields({"shape": ListOf(Between(0)), "dtype": OneOf(tuple(CODES)), "digest": DIGEST})),
    },
    {"threads": Between(1, 4096), "base_weights": Fields({"headers": str, "tensors": Each(DIGEST)})},
)
"""Types of everything in a lock that is read."""
RELAXATION = Fields(
    {
        "merged_model": _TEXT, "pretrained_model_name": _TEXT, "numerics": OneOf(("float32", "reference")),
        "dtype": Maybe(OneOf(DTYPES)), "omega": OneOf((float, str, list)),
    },
    {"save_as": OneOf(("model", "adapter"))},
)  # fmt: skip
MERGE = Fields(
    {"method": str, "models_to_merge": ListOf(_TEXT)},
    {"base_model": Maybe(_TEXT), "save_as": OneOf(("model", "adapter"))},
)
VARYING_FILES = (RECORD, "README.md", LOCK_FILE)
"""Files of an output that are not under its lock: they differ from run to run, are edited, or are the lock."""
CONFIG_FILES = ("config.json", "generation_config.json")
"""Files of an input besides its weights and its tokenizer that the result depends on."""


def files_of(checkpoint: Checkpoint) -> list[Path]:
    """Return every file of an input that the result depends on."""
    configs = [checkpoint.folder / name for name in CONFIG_FILES]
    return [*checkpoint.files, *(file for file in configs if file.is_file()), *tokenizer_files(checkpoint.folder)]


class FileRecord(TypedDict):
    """Size and digest of an input's file; the digest is None where it was not computed."""

    bytes: int
    digest: str | None


class InputRecord(TypedDict):
    """An input in a lock: name, exact name (absolute folder or id with commit), commit of the hub, and its files."""

    name: str
    exact: str
    commit: str | None
    files: dict[str, FileRecord]


class TensorRecord(TypedDict):
    """A finished tensor in a lock."""

    shape: list[int]
    dtype: str
    digest: str


def describe_input(
    checkpoint: Checkpoint, digests: Mapping[Path, str | None], among: Sequence[Path] | None = None
) -> InputRecord:
    """Return name, exact name (absolute folder or id with commit), commit, and {file: size and digest} of an input.

    among: the files that count; None for all that the result depends on.
    """
    files: dict[str, FileRecord] = {
        file.name: {"bytes": file.stat().st_size, "digest": digests.get(file)}
        for file in (files_of(checkpoint) if among is None else among)
    }
    return {"name": checkpoint.name, "exact": checkpoint.exact_name, "commit": checkpoint.commit, "files": files}


def tensors_of(plan: Listing, journal: Sequence[Mapping[str, JsonValue]]) -> dict[str, TensorRecord]:
    """Return {name: shape, dtype, digest} of the finished tensors of a plan."""
    return {
        tensor.name: {"shape": list(tensor.shape), "dtype": tensor.dtype, "digest": entry["digest"]}
        for tensor, entry in zip(plan.tensors, journal, strict=True)
    }


def write_lock(folder: Path, lock: Mapping[str, JsonValue]) -> None:
    """Write merge.lock.json."""
    (folder / LOCK_FILE).write_text(json.dumps(lock, indent=2) + "\n", encoding="utf-8")


def read_lock(file: Path) -> JsonObject:
    """Read a lock, given as the file or the folder it is in. Raises UsageError where it is none."""
    if file.is_dir():
        file = file / LOCK_FILE
    if not file.is_file():
        raise UsageError(f"{file} does not exist; a lock is the {LOCK_FILE} of a finished output.")
    try:
        lock = read_json(file, "")
        if lock.get("format") == FORMAT:
            check_shape(lock, SHAPE, str(file))
            _check_recipe(lock, str(file))
    except (UnreadableError, CheckpointError) as error:
        raise UsageError(str(error)) from error
    if lock.get("format") != FORMAT:
        actual = quoted(lock.get("format"))
        raise UsageError(f"{file} is no lock of this program (format {actual}, expected {FORMAT!r}).")
    return lock


def _check_recipe(lock: Mapping[str, JsonValue], source: str) -> None:
    """Raise UnreadableError where the recipe of a lock cannot be one of its program's."""
    recipe = lock["recipe"]
    if lock["program"] == "performAIM.py":
        check_shape(recipe, RELAXATION, source, "recipe")
    elif "merge_method" not in recipe:
        check_shape(recipe, MERGE, source, "recipe")
    if recipe.get("save_as") == "adapter" and "base_weights" not in lock:
        raise UnreadableError(f"{source} has no base_weights, which the lock of an adapter has.")
    if len({entry["name"] for entry in lock["inputs"]}) < len(lock["inputs"]):
        raise UnreadableError(f"{source}: two of its inputs have one name.")


def check_planned(
    lock: Mapping[str, JsonValue],
    tensors: Sequence[Named],
    inputs: Sequence[InputRecord],
    other_inputs: Iterable[str],
) -> None:
    """Compare a plan with the lock that it should repeat, before anything is computed.

    Args:
        lock: as `read_lock` returns it.
        tensors: of the plan.
        inputs: as `describe_input` describes them, with or without digests.
        other_inputs: names of the files besides the checkpoints.

    Raises:
        CheckpointError: naming the first tensor, input or file that differs.
    """
    _check_names("input", [entry["name"] for entry in lock["inputs"]], range(len(inputs)), count=True)
    for expected, now in zip(lock["inputs"], inputs, strict=True):
        _check_names(f"file of {now['name']}", expected["files"], now["files"])
        for name, file in expected["files"].items():
            size = now["files"][name]["bytes"]
            if size != file["bytes"]:
                raise CheckpointError(
                    f"{now['name']}: {name} is not the file of the lock ({size} bytes, expected {file['bytes']}); get "
                    "the version that the lock names."
                )
    _check_names("other input", lock["other_inputs"], other_inputs)
    plans = {tensor.name: tensor for tensor in tensors}
    _check_names("tensor", lock["tensors"], plans)
    for name, entry in lock["tensors"].items():
        actual = f"{plans[name].dtype} {list(plans[name].shape)}"
        if actual != f"{entry['dtype']} {entry['shape']}":
            raise CheckpointError(
                f"Tensor {name} does not repeat the lock's ({actual}, expected {entry['dtype']} {entry['shape']})."
            )


def _check_names(what: str, expected: Iterable[str], actual: Iterable[object], count: bool = False) -> None:
    """Raise CheckpointError where two sets of names (or their numbers) differ."""
    lock_names, plan_names = list(expected), list(actual)
    if count:
        if len(lock_names) != len(plan_names):
            raise CheckpointError(f"The lock has {len(lock_names)} {what}s, and the recipe in it {len(plan_names)}.")
        return
    missing = [name for name in lock_names if name not in set(plan_names)]
    surplus = [name for name in plan_names if name not in set(lock_names)]
    if missing or surplus:
        name, side = (missing[0], "the plan") if missing else (surplus[0], "the lock")
        raise CheckpointError(f"The lock is not of this merge: {what} {foreign(str(name))} is one that {side} has not.")


def pinned(recipe: MergeRecipe, lock: Mapping[str, JsonValue]) -> MergeRecipe:
    """Return the recipe with each model by its exact name in the lock."""
    exact = {entry["name"]: entry["exact"] for entry in lock["inputs"]}

    def whose(word: str) -> str:
        return word if word in ("base", "union", "auto") else exact.get(word, word)

    return replace(
        recipe,
        models=tuple(exact.get(name, name) for name in recipe.models),
        base_model=None if recipe.base_model is None else exact.get(recipe.base_model, recipe.base_model),
        tokenizer=whose(recipe.tokenizer),
        chat_template=whose(recipe.chat_template),
        exclude_from=whose(recipe.exclude_from),
        tokens=tuple(request.renamed(lambda name: exact.get(name, name)) for request in recipe.tokens),
    )


def check_inputs(lock: Mapping[str, JsonValue], actual: Sequence[InputRecord]) -> None:
    """Raise CheckpointError naming the first input file that is not the lock's."""
    _check_names("input", [entry["name"] for entry in lock["inputs"]], range(len(actual)), count=True)
    for entry, now in zip(lock["inputs"], actual, strict=True):
        for name, file in entry["files"].items():
            digest = now["files"][name]["digest"] if name in now["files"] else None
            if digest != file["digest"]:
                raise CheckpointError(
                    f"{now['name']}: {name} is not the file of the lock ({_start(digest)}, expected "
                    f"{_start(file['digest'])}); get the version that the lock names."
                )


def check_others(lock: Mapping[str, JsonValue], actual: Mapping[str, str | None]) -> None:
    """Raise CheckpointError where a file besides the checkpoints (an importance file) is not the lock's."""
    for name, digest in lock["other_inputs"].items():
        if actual.get(name) != digest:
            raise CheckpointError(f"The {name} file is not that of the lock (its digest differs); get that one.")


def check_tensors(lock: Mapping[str, JsonValue], actual: Mapping[str, TensorRecord]) -> None:
    """Raise CheckpointError naming the first tensor that is not the lock's."""
    for name in {**lock["tensors"], **actual}:
        expected, now = lock["tensors"].get(name), actual.get(name)
        if expected != now:
            raise CheckpointError(
                f"Tensor {name} does not repeat the lock's ({_describe(now)}, expected {_describe(expected)}); the "
                f"lock was made on {lock['device']} with {', '.join(f'{k} {v}' for k, v in lock['versions'].items())}."
            )


def _describe(tensor: TensorRecord | None) -> str:
    return "none" if tensor is None else f"{tensor['dtype']} {tensor['shape']} {_start(tensor['digest'])}"


def _start(digest: str | None) -> str:
    """The beginning of a digest, for a sentence."""
    return "no such file" if digest is None else f"{digest[:19]}..."


def small_files(folder: Path) -> dict[str, str | None]:
    """Return {name: digest} of the files next to the weights that do not change from run to run."""
    files = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
    return {
        file.as_posix(): digest_of(folder / file)
        for file in files
        if not file.name.startswith(".")
        and not (len(file.parts) == 1 and (file.suffix == ".safetensors" or file.name in VARYING_FILES))
    }
