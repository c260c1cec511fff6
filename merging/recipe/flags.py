"""The flags of merge.py about merging, of which a method's come from its YAML; those about the output are shared."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser, add_output_flags
from common.errors import UsageError
from common.files.paths import user_path
from common.terminal_text import quoted
from merging.recipe import DTYPES
from merging.recipe.method_registry import MergeMethod, all_methods
from merging.recipe.options import EXTRA_TENSORS

if TYPE_CHECKING:
    from merging.output.hub_upload import Push

RUN_KEYS = {
    "save_path": Path, "device": str, "max_shard_size": str, "overwrite": bool, "resume": bool,
    "allow_nonfinite": bool, "layer_stats": bool, "load_check": bool, "save_as": str,
}  # fmt: skip
"""Keys that flags and a YAML may give besides the recipe's own, and their types."""
OUTPUT_KEYS = tuple(RUN_KEYS)
SAVE_AS = ("model", "adapter")
NAMES = {Path: "path", str: "word", bool: "true or false"}
ABOUT = "Merge fine-tuned models into one checkpoint, and perhaps relax it by AIM in the same pass."
EXAMPLE = (
    "example: python merge.py --method ties --base_model BASE --models_to_merge A,B,C --save_path OUT --density 0.2"
)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags about the output folder; a default of None means that a YAML may say it."""
    parser.add_argument(
        "--save_as", choices=SAVE_AS, help="adapter: of adapters (BASE+ADAPTER) make one adapter, where that is exact "
        "(default: model)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", default=None, help="replace what is in --save_path")
    parser.add_argument(
        "--resume", action="store_true", default=None, help="resume an interrupted run, to the same bytes"
    )
    parser.add_argument(
        "--layer_stats", action="store_true", default=None, help="print norms, sign conflicts and drops per layer"
    )
    parser.add_argument(
        "--allow_nonfinite", action="store_true", default=None, help="write NaN and infinity, and report the tensors"
    )
    parser.add_argument(
        "--push_to_hub",
        metavar="ORG/NAME",
        help="upload the result as this repository; of several omegas each as ORG/NAME-omega-X",
    )
    parser.add_argument(
        "--private", action="store_true", default=None, help="with --push_to_hub: make new repositories private"
    )
    parser.add_argument(
        "--load_check", action=argparse.BooleanOptionalAction, default=None,
        help="load the planned result in transformers, on the meta device, before it is written (default: yes)",
    )  # fmt: skip


def add_look_flags(parser: argparse.ArgumentParser, repeats: str) -> None:
    """Add --dry_run, --json and --from_lock. repeats: what the help says of the last."""
    parser.add_argument(
        "--dry_run", action="store_true", help="print the plan, from headers and configs alone, and stop"
    )
    parser.add_argument("--json", action="store_true", help="with --dry_run: the plan as JSON")
    parser.add_argument("--from_lock", type=user_path, metavar="FILE", help=repeats)


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """The flags about inputs that differ; a default of None means that a YAML may say it."""
    parser.add_argument(
        "--allow_config_mismatch", action="store_true", default=None,
        help="merge models whose configs give equal weights another meaning (heads, activation, rope, window, ...)",
    )  # fmt: skip
    parser.add_argument(
        "--extra_tensors", choices=EXTRA_TENSORS,
        help="tensors that not every input has: keep the base's, drop them, or stop with an error (default: keep parts "
        "that predict further tokens, stop at others)",
    )  # fmt: skip


def make_parser(method: MergeMethod | None) -> Parser:
    """Return the parser with the flags of one method (or of every method, where none is chosen yet)."""
    parser = Parser(
        prog="merge.py",
        usage="merge.py --method METHOD --base_model BASE --models_to_merge A,B,C --save_path OUT [flags]\n"
        "       merge.py RECIPE.yml OUT [flags, mergekit's too]",
        description=f"{method.title}: {method.summary} ({method.paper})." if method else ABOUT,
        epilog=EXAMPLE,
    )
    parser.add_argument("--method", help="how to merge; with --help: that method's parameters")
    parser.add_argument("--base_model", help="the base: a folder or hub id (optional where a method needs none)")
    parser.add_argument("--models_to_merge", metavar="A,B,C", help="the fine-tuned models, by folder or hub id")
    parser.add_argument("--save_path", type=user_path, help="folder for the merged checkpoint")
    parser.add_argument(
        "--config", type=user_path, metavar="FILE", help="YAML with the same keys, or mergekit's; flags win"
    )
    parser.add_argument(
        "--dtype",
        choices=(*DTYPES, "auto"),
        help="dtype of the output; auto: as the base, or the first model, stores it (default: bfloat16; of a recipe in "
        "mergekit's form auto)",
    )
    parser.add_argument(
        "--numerics",
        choices=("float32", "reference"),
        help="float32: one rounding at the end (default); reference: the original's bf16 arithmetic, bit for bit",
    )
    parser.add_argument("--seed", type=int, help="seed of random masks (DARE, DELLA) (default: 42)")
    parser.add_argument("--tokenizer", metavar="base|union|MODEL", help="vocabulary of the result (default: base)")
    parser.add_argument(
        "--pad_to_multiple_of",
        type=int,
        metavar="N",
        help="round the rows of embedding and head up to a multiple of N, at least one row per token",
    )
    parser.add_argument(
        "--chat_template",
        metavar="base|auto|NAME|MODEL|JINJA",
        help="the base's chat template, the commonest, one of alpaca, chatml, exaone, llama3 and mistral, a model's, "
        "or one written out (default: base)",
    )
    parser.add_argument(
        "--exclude",
        metavar="REGEX",
        help="tensors whose name matches are not merged but taken from --exclude_from (classifier heads and the like)",
    )
    parser.add_argument(
        "--exclude_from",
        metavar="base|MODEL",
        help="source of the excluded tensors (default: base, else the first model)",
    )
    add_plan_flags(parser)
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--max_shard_size", help="largest size of one weights file (default: 5GB)")
    add_run_flags(parser)
    add_look_flags(parser, "repeat the merge of a merge.lock.json to the same bytes")
    add_output_flags(parser)
    if method is None:
        parser.add_argument_group("methods", "\n".join(f"{m.name:18}{m.summary}" for m in all_methods().values()))
    group = parser.add_argument_group(f"parameters of {method.name}" if method else "parameters of the methods")
    for name, by_method in method_flags(method).items():
        parameter = next(iter(by_method.values()))
        given = f"default: {parameter.default}; " if parameter.default is not None else ""
        text = f"{parameter.help} ({given}{parameter.source})" if method else _help_of_all(by_method)
        text = text.replace("%", "%%")
        if parameter.type == "bool":
            group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            choices = dict.fromkeys(choice for p in by_method.values() for choice in p.choices or ())
            plain = f"{{{','.join(choices)}}}" if choices else parameter.type.upper()
            metavar = "X or X,Y,Z" if parameter.per_model else plain
            group.add_argument(f"--{name}", metavar=metavar, help=text)
    return parser


def method_flags(method: MergeMethod | None) -> dict[str, dict[str, Any]]:
    """Return {parameter name: {method name: parameter}} of the chosen method, or of all."""
    flags: dict[str, dict[str, Any]] = {}
    for m in [method] if method else all_methods().values():
        for name, parameter in m.parameters.items():
            flags.setdefault(name, {})[m.name] = parameter
    return flags


def _help_of_all(by_method: Mapping[str, Any]) -> str:
    """Each distinct help of a parameter with the methods that it is for."""
    methods: dict[str, list[str]] = {}
    for name, parameter in by_method.items():
        methods.setdefault(parameter.help, []).append(name)
    return "; ".join(f"{text} [{', '.join(names)}]" for text, names in methods.items())


def take_push(flags: dict[str, Any], config: dict[str, Any], dry_run: bool) -> Push | None:
    """Remove --push_to_hub and --private from the flags and the YAML and return what they ask for, the flag winning.

    Raises UsageError as `Push.of` does.
    """
    repo, private = (flags.pop(key, config.pop(key, None)) for key in ("push_to_hub", "private"))
    if repo is None and not private:
        return None
    from merging.output.hub_upload import Push  # loads the hub's client

    return Push.of(repo, private, dry_run)


def take(key: str, flags: dict[str, Any], config: dict[str, Any]) -> Any:
    """Remove a key from the flags and the YAML and return it in its type, the flag winning; None where neither has it.

    Raises UsageError for a value of another type.
    """
    from_config = config.pop(key, None)
    value = flags.pop(key, from_config)
    kind = RUN_KEYS[key]
    if key == "save_as" and value not in (None, *SAVE_AS):
        raise UsageError(f"save_as must be one of {', '.join(SAVE_AS)}, found {quoted(value)}.")
    if value is None or isinstance(value, kind):
        return value
    if kind is Path and isinstance(value, str):
        return user_path(value)
    raise UsageError(f"{key} must be a {NAMES[kind]}, found {quoted(value)}.")
