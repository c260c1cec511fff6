"""The flags of merge.py about merging, of which a method's come from its YAML; those about the output are shared."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common.cli import Parser, add_output_flags
from common.errors import UsageError
from common.files.json_values import JsonObject
from common.files.paths import user_path
from common.terminal_text import quoted
from merging.recipe.merge_recipe import EXTRA_TENSORS
from merging.recipe.method_registry import MergeMethod, Parameter, all_methods
from merging.recipe.schedules import DTYPES

RUN_KEYS = {
    "save_path": Path, "device": str, "max_shard_size": str, "overwrite": bool, "resume": bool,
    "allow_nonfinite": bool, "layer_stats": bool, "load_check": bool, "save_as": str,
}  # fmt: skip
"""Keys that flags and a YAML may give besides the recipe's own, and their types."""
OUTPUT_KEYS = tuple(RUN_KEYS)
SAVE_AS = ("model", "adapter")
NAMES = {Path: "path", str: "word", bool: "true or false"}
USAGE = (
    "merge.py --method NAME --base_model BASE --models_to_merge A,B,C --save_path OUT [flags]\n"
    "       merge.py RECIPE.yml OUT [flags, mergekit's too]"
)
ABOUT = "Merge fine-tuned models into one checkpoint; with --omega, relax it by AIM in the same pass."
EXAMPLE = (
    "example: python merge.py --method ties --base_model BASE --models_to_merge A,B,C --save_path OUT --density 0.2"
)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the output folder and of an upload; a default of None leaves the value to a YAML."""
    group = parser.add_argument_group("output")
    group.add_argument("--save_path", type=user_path, metavar="OUT", help="folder of the new checkpoint (required)")
    group.add_argument(
        "--save_as", choices=SAVE_AS, help="adapter: of adapters (BASE+ADAPTER) make one adapter, where that is exact "
        "(default: model)",
    )  # fmt: skip
    group.add_argument("--max_shard_size", metavar="SIZE", help="largest size of one weights file (default: 5GB)")
    group.add_argument("--overwrite", action="store_true", default=None, help="replace what is in --save_path")
    group.add_argument(
        "--resume", action="store_true", default=None, help="resume an interrupted run, to the same bytes"
    )
    group.add_argument(
        "--layer_stats", action="store_true", default=None, help="print norms, sign conflicts and drops per layer"
    )
    group.add_argument(
        "--allow_nonfinite", action="store_true", default=None, help="write NaN and infinity, and report the tensors"
    )
    group.add_argument(
        "--load_check", action=argparse.BooleanOptionalAction, default=None,
        help="load the planned result in transformers, on the meta device, before it is written (default: yes)",
    )  # fmt: skip
    group = parser.add_argument_group("upload")
    group.add_argument(
        "--push_to_hub",
        metavar="ORG/NAME",
        help="upload the result as this repository; of several omegas each as ORG/NAME-omega-X",
    )
    group.add_argument(
        "--private", action="store_true", default=None, help="with --push_to_hub: make new repositories private"
    )


def add_look_flags(parser: argparse.ArgumentParser, repeats: str) -> None:
    """Add --dry_run, --json and --from_lock. repeats: the help of the last."""
    group = parser.add_argument_group("dry run and repetition")
    group.add_argument(
        "--dry_run", action="store_true", help="print the plan, from headers and configs alone, and stop"
    )
    group.add_argument("--json", action="store_true", help="with --dry_run: the plan as JSON")
    group.add_argument("--from_lock", type=user_path, metavar="FILE", help=repeats)


def add_plan_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags about inputs that differ, and return their group; a default of None leaves them to a YAML."""
    group = parser.add_argument_group("inputs that differ")
    group.add_argument(
        "--allow_config_mismatch", action="store_true", default=None,
        help="merge models whose configs differ in keys that change the function of the weights (heads, rope, ...)",
    )  # fmt: skip
    group.add_argument(
        "--extra_tensors", choices=EXTRA_TENSORS,
        help="tensors that not every input has: keep the base's, drop them, or stop with an error (default: keep parts "
        "that predict further tokens, stop at others)",
    )  # fmt: skip
    return group


def make_parser() -> Parser:
    """Return the parser of merge.py without AIM's flags; the parameters of all methods are parsed, but not listed."""
    parser = Parser(prog="merge.py", usage=USAGE, description=ABOUT, epilog=EXAMPLE)
    group = parser.add_argument_group("models")
    group.add_argument(
        "--method", metavar="NAME", help="merge method, one of the list below (required, unless --config has it)"
    )
    group.add_argument(
        "--base_model", metavar="BASE", help="base model: a folder or hub id (default: none; most methods need one)"
    )
    group.add_argument(
        "--models_to_merge", metavar="A,B,C", help="fine-tuned models, by folder or hub id (required, unless --config "
        "has them)",
    )  # fmt: skip
    group.add_argument(
        "--config", type=user_path, metavar="FILE", help="YAML with the flags as keys, or mergekit's; flags win"
    )
    parser.add_argument_group(
        "methods (`python merge.py --method NAME --help` lists the parameters of one)",
        "\n".join(f"{m.name:18}{m.summary}" for m in all_methods().values()),
    )
    group = parser.add_argument_group("computation")
    group.add_argument(
        "--dtype",
        choices=(*DTYPES, "auto"),
        help="dtype of the output; auto: as the base, or the first model, stores it (default: bfloat16; of a recipe in "
        "mergekit's form auto)",
    )
    group.add_argument(
        "--numerics",
        choices=("float32", "reference"),
        help="float32: one rounding at the end; reference: the original's bf16 arithmetic, bit for bit "
        "(default: float32)",
    )
    group.add_argument("--seed", type=int, metavar="N", help="seed of random masks (DARE, DELLA) (default: 42)")
    group.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer", metavar="base|union|MODEL", help="vocabulary of the result (default: base)")
    group.add_argument(
        "--pad_to_multiple_of",
        type=int,
        metavar="N",
        help="round the rows of embedding and head up to a multiple of N, at least one row per token",
    )
    group.add_argument(
        "--chat_template",
        metavar="base|auto|NAME|MODEL|JINJA",
        help="the base's chat template, the commonest, one of alpaca, chatml, exaone, llama3 and mistral, a model's, "
        "or one written out (default: base)",
    )
    group = add_plan_flags(parser)
    group.add_argument(
        "--exclude",
        metavar="REGEX",
        help="tensors whose name matches are not merged but taken from --exclude_from (classifier heads and the like)",
    )
    group.add_argument(
        "--exclude_from",
        metavar="base|MODEL",
        help="source of the excluded tensors (default: base, else the first model)",
    )
    add_run_flags(parser)
    add_look_flags(parser, "repeat the merge of a merge.lock.json to the same bytes")
    add_output_flags(parser)
    for name, by_method in parameters_by_name().items():
        if {parameter.type for parameter in by_method.values()} == {"bool"}:
            parser.add_argument(
                f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=argparse.SUPPRESS
            )
        else:
            parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser


def make_method_parser(method: MergeMethod) -> Parser:
    """Return a parser whose help lists the parameters of one method, each with its default and source."""
    parser = Parser(
        prog="merge.py",
        usage=f"merge.py --method {method.name} --base_model BASE --models_to_merge A,B,C --save_path OUT [flags]",
        description=f"{method.title}: {method.summary} ({method.paper}).",
        epilog="`python merge.py --help` lists the other flags and the methods.",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    group = parser.add_argument_group(
        f"parameters of {method.name}", None if method.parameters else "This method has no parameters."
    )
    for parameter in method.parameters.values():
        text = f"{parameter.help} ({_default_of(parameter)}{parameter.source})".replace("%", "%%")
        if parameter.type == "bool":
            group.add_argument(f"--{parameter.name}", action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            group.add_argument(f"--{parameter.name}", metavar=_metavar(parameter), help=text)
    return parser


def _default_of(parameter: Parameter) -> str:
    """Return the default as the help prints it before the source; where there is none, the source says so."""
    if parameter.default is None:
        return ""
    value = ("no", "yes")[parameter.default] if parameter.type == "bool" else parameter.default
    return f"default: {value}; source: "


def _metavar(parameter: Parameter) -> str:
    """Return the values that a parameter takes, as the help prints them."""
    if parameter.per_model:
        return "X or X,Y,Z"
    return "|".join(parameter.choices) or {"float": "X", "int": "N"}.get(parameter.type, parameter.type.upper())


def parameters_by_name() -> dict[str, dict[str, Parameter]]:
    """Return {parameter name: {method name: parameter}} of all methods."""
    by_name: dict[str, dict[str, Parameter]] = {}
    for method in all_methods().values():
        for name, parameter in method.parameters.items():
            by_name.setdefault(name, {})[method.name] = parameter
    return by_name


def take(key: str, flags: JsonObject, config: JsonObject) -> Any:
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
