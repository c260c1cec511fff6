"""Translation of mergekit's command line, `RECIPE.yml OUT [options]`, into this program's flags."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import UsageError
from common.terminal_text import quoted

ALWAYS = "always enabled"


@dataclass(frozen=True)
class Option:
    """One option of `mergekit-yaml` 0.1.5.

    Attributes:
        takes_value: The option takes a value.
        mapped: Function from its value to this program's flags; None where it has no counterpart.
        answer: Reason for which the option has no effect.
        off: The same for its `--no-` form.
    """

    takes_value: bool = False
    mapped: Callable[[str], list[str]] | None = None
    answer: str = ""
    off: str = ""


def _shard_size(value: str) -> list[str]:
    """mergekit's 5B, 500M or a plain number of bytes as `--max_shard_size`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb]?)", value.strip().lower())
    if not match:
        raise UsageError(f"--out-shard-size {quoted(value)} should be a number of bytes such as 5B or 500M.")
    unit = {"k": "KB", "m": "MB", "b": "GB", "": "B"}[match[2]]
    return ["--max_shard_size", match[1] + unit]


def _cache(value: str) -> list[str]:
    """Set the hub's cache for this process, as `HF_HUB_CACHE` does."""
    os.environ["HF_HUB_CACHE"] = value
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        constants.HF_HUB_CACHE = value  # type: ignore[attr-defined]
    return []


OPTIONS = {
    "--cuda": Option(mapped=lambda _: ["--device", "cuda"], off="--device"),
    "--gpu-rich": Option(mapped=lambda _: ["--device", "cuda"]),
    "--random-seed": Option(takes_value=True, mapped=lambda value: ["--seed", value]),
    "--out-shard-size": Option(takes_value=True, mapped=_shard_size),
    "--transformers-cache": Option(takes_value=True, mapped=_cache),
    "--allow-crimes": Option(
        answer="tensors are matched by name whatever the architecture; configs that differ in what changes the "
        "function of a weight are refused"
    ),
    "--unsafe-truncate-embeddings": Option(
        answer="rows are matched by token string (--tokenizer chooses the vocabulary)"
    ),
    "--lora-merge-cache": Option(takes_value=True, answer="adapters are added while tensors are read, without a cache"),
    "--lora-merge-dtype": Option(takes_value=True, answer="adapters are added in float32"),
    "--low-cpu-memory": Option(answer="tensors are streamed in blocks, so that memory does not grow with the model"),
    "--read-to-gpu": Option(answer="blocks are read on the CPU and copied while the last ones are merged"),
    "--multi-gpu": Option(answer="start several processes with `accelerate launch merge.py ...`, one for each GPU"),
    "--lazy-unpickle": Option(answer=ALWAYS, off="tensors are always read when they are needed"),
    "--clone-tensors": Option(answer=ALWAYS + ": a layer that occurs several times is written each time"),
    "--async-write": Option(answer=ALWAYS),
    "--write-threads": Option(takes_value=True, answer="one thread writes while others merge"),
    "--num-threads": Option(takes_value=True, answer="set OMP_NUM_THREADS; results do not depend on it"),
    "--copy-tokenizer": Option(answer=ALWAYS, off="the tokenizer is always written, since rows go with its tokens"),
    "--write-model-card": Option(answer=ALWAYS, off="the model card is always written"),
    "--safe-serialization": Option(answer=ALWAYS, off="results are always safetensors"),
    "--trust-remote-code": Option(answer="code in model repositories is never run: tensors are matched by name"),
    "--verbose": Option(answer="--debug shows the traceback of an error"),
    "-v": Option(answer="--debug shows the traceback of an error"),
    "-j": Option(takes_value=True, answer="set OMP_NUM_THREADS; results do not depend on it"),
}
"""Every option of mergekit-yaml 0.1.5 besides --device, --quiet and --help, which have the same meaning here."""
RECIPE_SUFFIXES = (".yml", ".yaml", ".json")


def translate(argv: Sequence[str], value_flags: Collection[str]) -> tuple[list[str], list[str]]:
    """Return a command line in this program's flags.

    Args:
        argv: Arguments in mergekit's form, this program's, or both.
        value_flags: Flags of this program that take a value, spelled with underscores.

    Returns:
        The arguments with mergekit's options mapped and `RECIPE OUT` as `--config RECIPE --save_path OUT`, and a
        note for each option without effect.

    Raises:
        UsageError: An option has no value.
    """
    translated: list[str] = []
    words: list[str] = []
    notes: list[str] = []
    remaining = list(argv)
    while remaining:
        argument = remaining.pop(0)
        flag, equals, value = argument.partition("=")
        name = _option_name(flag)
        negated = name.startswith("--no-") and "--" + name[5:] in OPTIONS
        if name in OPTIONS and not negated:
            option = OPTIONS[name]
            if option.takes_value and not equals:
                if not remaining:
                    raise UsageError(f"{flag} needs a value.")
                value = remaining.pop(0)
            if option.mapped is not None:
                translated += option.mapped(value)
            elif option.answer != ALWAYS:
                notes.append(f"{flag} has no effect: {option.answer}.")
        elif negated:
            option = OPTIONS["--" + name[5:]]
            if option.off == "--device":
                translated += ["--device", "cpu"]
            elif option.off:
                notes.append(f"{flag} has no effect: {option.off}.")
        elif argument.startswith("-") and argument != "-":
            translated.append(argument)
            if _underscored(flag) in value_flags and not equals and remaining:
                translated.append(remaining.pop(0))
        else:
            words.append(argument)
    return [*_recipe_and_output(words, translated), *translated], notes


def _option_name(flag: str) -> str:
    """Return an option in mergekit's spelling: `--out_shard_size` -> `--out-shard-size`, `-vv` -> `-v`."""
    if re.fullmatch(r"-v+", flag):
        return "-v"
    return flag.replace("_", "-") if flag.startswith("--") else flag


def _underscored(flag: str) -> str:
    return "--" + flag[2:].replace("-", "_") if flag.startswith("--") else flag


def _recipe_and_output(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Return `RECIPE [OUT]` as flags; other words unchanged, for the parser to refuse."""
    names = {_underscored(flag.partition("=")[0]) for flag in flags}
    is_recipe = bool(words) and len(words) <= 2 and words[0].lower().endswith(RECIPE_SUFFIXES)
    if not is_recipe or names & {"--config", "--from_lock"}:
        return list(words)
    if len(words) == 2 and "--save_path" in names:
        raise UsageError(f"The output is given twice: {words[1]} and --save_path.")
    output = ["--save_path", words[1]] if len(words) == 2 else []
    return ["--config", str(Path(words[0])), *output]
