"""Merge fine-tuned models into one checkpoint: `python merge.py --method ties --help` shows a method's parameters."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from console.cli import Parser, add_output_flags, run, say
from console.errors import UsageError
from console.files import user_path
from merging.recipe import DTYPES, make_recipe, read_config
from merging.registry import MergeMethod, all_methods, find_method

OUTPUT_KEYS = ("save_path", "device", "max_shard_size", "overwrite")
RUN_KEYS = {
    "save_path": Path, "device": str, "max_shard_size": str, "overwrite": bool, "omega": float, "importance": Path,
}  # fmt: skip
NAMES = {Path: "path", str: "word", bool: "true or false", float: "number"}
EXAMPLE = (
    "example: python merge.py --method ties --base_model BASE --models_to_merge A,B,C --save_path OUT --density 0.2"
)


def make_parser(method: MergeMethod | None) -> Parser:
    """Return the parser with the flags of one method (or of every method, where none is chosen yet)."""
    parser = Parser(
        prog="merge.py",
        description=f"{method.title}: {method.summary} ({method.paper})." if method else __doc__,
        epilog=EXAMPLE,
    )
    listed = "; ".join(f"{m.name}: {m.summary}" for m in all_methods().values())
    parser.add_argument("--method", help=f"how to merge. {listed}")
    parser.add_argument("--base_model", help="the base: a folder or hub id (optional where a method needs none)")
    parser.add_argument("--models_to_merge", metavar="A,B,C", help="the fine-tuned models, by folder or hub id")
    parser.add_argument("--save_path", type=user_path, help="folder for the merged checkpoint")
    parser.add_argument("--config", type=user_path, metavar="FILE", help="YAML with the same keys; flags win over it")
    parser.add_argument("--dtype", choices=DTYPES, help="of the output (default: bfloat16)")
    parser.add_argument(
        "--numerics",
        choices=("float32", "reference"),
        help="float32: one rounding at the end (default); reference: the original's bf16 arithmetic, bit for bit",
    )
    parser.add_argument("--seed", type=int, help="of DARE's masks (default: 42)")
    parser.add_argument("--omega", type=float, help="relax the merge by AIM in the same pass, with this omega")
    parser.add_argument("--importance", type=user_path, metavar="FILE", help="the base's importance file, for --omega")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--max_shard_size", help="of one weights file (default: 5GB)")
    parser.add_argument("--overwrite", action="store_true", default=None, help="replace what is in --save_path")
    add_output_flags(parser)
    group = parser.add_argument_group(f"parameters of {method.name}" if method else "parameters of the methods")
    for name, parameter, users in method_flags(method):
        given = f"default: {parameter.default}; " if parameter.default is not None else ""
        default = "" if method is None else f" ({given}{parameter.source})"
        whose = "" if method else f" [{', '.join(users)}]"
        text = (parameter.help + default + whose).replace("%", "%%")
        if parameter.type == "bool":
            group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            plain = f"{{{','.join(parameter.choices)}}}" if parameter.choices else parameter.type.upper()
            metavar = "X or X,Y,Z" if parameter.per_model else plain
            group.add_argument(f"--{name}", metavar=metavar, help=text)
    return parser


def method_flags(method: MergeMethod | None) -> list[tuple[str, Any, list[str]]]:
    """Return (name, parameter, methods that have it) for the chosen method, or for all."""
    flags: dict[str, tuple[str, Any, list[str]]] = {}
    for m in [method] if method else all_methods().values():
        for name, parameter in m.parameters.items():
            flags.setdefault(name, (name, parameter, []))[2].append(m.name)
    return list(flags.values())


def take(key: str, flags: dict[str, Any], config: dict[str, Any]) -> Any:
    """Remove a key from the flags and the YAML and return it in its type, the flag winning; None where neither has it.

    Raises UsageError for a value of another type.
    """
    from_config = config.pop(key, None)
    value = flags.pop(key, from_config)
    kind = RUN_KEYS[key]
    if value is None or isinstance(value, kind):
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return user_path(value)
    raise UsageError(f"{key} must be a {NAMES[kind]}, found {value!r}.")


def main(argv: Sequence[str]) -> int:
    """Parse, merge, say where."""
    early = Parser(add_help=False)
    early.add_argument("--method")
    chosen, _ = early.parse_known_args(argv)
    asks_help = bool({"-h", "--help"} & set(argv))
    parser = make_parser(find_method(chosen.method) if chosen.method and asks_help else None)
    flags = {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}
    quiet = flags.pop("quiet")
    flags.pop("debug")
    config = read_config(flags.pop("config")) if "config" in flags else {}
    asked = {key: take(key, flags, config) for key in RUN_KEYS}
    recipe = make_recipe(flags, config)
    if asked["save_path"] is None:
        parser.error("--save_path is missing: the folder for the merged checkpoint")
    output = {key: asked[key] for key in OUTPUT_KEYS if asked[key] is not None}
    from merging.run import Output, merge

    relaxing = None
    if asked["omega"] is not None or asked["importance"] is not None:
        from aim.run import relaxing_of

        relaxing = relaxing_of(recipe, asked["omega"], asked["importance"], quiet)
    folder = merge(recipe, Output(**output, quiet=quiet), relaxing)
    say(f"Merged {len(recipe.models)} models with {recipe.method} into {folder}.", quiet)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
