"""Merge fine-tuned models into one checkpoint: `python merge.py --method ties --help` shows a method's parameters."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aim.config import KEYS as AIM_KEYS
from aim.config import SEED, Aim, add_aim_flags, add_scaling_flags, aim_of
from aim.omegas import parse_omegas
from common.cli import Parser, run, value_flags
from common.distributed import ProcessGroup, init_distributed
from common.errors import UsageError
from common.logging import logger
from merging.recipe import make_recipe, read_config
from merging.recipe.flags import OUTPUT_KEYS, make_method_parser, make_parser, take
from merging.recipe.mergekit.command_line import translate
from merging.recipe.method_registry import find_method


def main(argv: Sequence[str]) -> int:
    """Parse, merge (or only plan), say where; on all ranks that a launcher started."""
    with init_distributed() as process_group:
        return merge_or_plan(argv, process_group)


def merge_or_plan(argv: Sequence[str], process_group: ProcessGroup) -> int:
    """Do this process's part of it."""
    early = Parser(add_help=False)
    early.add_argument("--method")
    chosen, _ = early.parse_known_args(argv)
    if chosen.method and {"-h", "--help"} & set(argv):
        make_method_parser(find_method(chosen.method)).parse_args(["--help"])
    parser = make_parser()
    add_aim_flags(parser, SEED, prefix="relax_", omega="none: no relaxation")
    add_scaling_flags(parser)
    argv, answers = translate(argv, value_flags(parser))
    flags = {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}
    flags.pop("quiet")  # read by `common.cli.run`
    dry_run, as_json = flags.pop("dry_run"), flags.pop("json")
    flags.pop("debug")
    if as_json and not dry_run:
        parser.error("--json goes with --dry_run")
    config = read_config(flags.pop("config")) if "config" in flags and "from_lock" not in flags else {}
    from merging.output.hub_upload import take_push

    push = take_push(flags, config, dry_run)
    if "from_lock" in flags:
        from aim.replay import repeat

        return repeat(flags, dry_run, as_json, process_group, push=push)
    asked = {key: take(key, flags, config) for key in OUTPUT_KEYS}
    aim = aim_asked({key: flags.pop(key, config.pop(key, None)) for key in AIM_KEYS}, bool(asked["resume"]))
    recipe = make_recipe(flags, config)
    recipe = replace(recipe, notes=(*answers, *recipe.notes))
    if asked["save_path"] is None and not dry_run:
        parser.error("--save_path is missing: the folder for the merged checkpoint")
    from merging.lora.either import merge, planned, shown
    from merging.output.records.next_steps import finish
    from merging.plan.merge_plan import Output

    given = {key: asked[key] for key in OUTPUT_KEYS if asked[key] is not None}
    output = Output(**{"save_path": Path(), **given}, process_group=process_group)
    relaxing = None
    if aim is not None:
        from aim.pipeline import relaxing_of

        relaxing = relaxing_of(recipe, aim, output)
    if dry_run:
        print(shown(planned(recipe, output, relaxing, headers_only=True), output, as_json))
        return 0
    folder = merge(recipe, output, relaxing)
    count = len(recipe.models)
    logger.info(f"Merged {count} {output.save_as}{'s' if count > 1 else ''} with {recipe.method} into {folder}.")
    finish(folder, output, push)
    return 0


def aim_asked(given: dict[str, Any], resume: bool) -> Aim | None:
    """Return what is asked of AIM, None where nothing is. Raises UsageError for settings of it without an omega."""
    named = [key for key, value in given.items() if value is not None]
    if not named:
        return None
    if given["omega"] is None:
        raise UsageError(f"--{named[0]} belongs to AIM in the same pass: give --omega too.")
    parse_omegas(given["omega"])
    if given["importance"] is None and given["calibration"] is None:
        raise UsageError("--omega needs the base's importance: --importance FILE, or --calibration and its text.")
    return aim_of(given, resume=resume)


if __name__ == "__main__":
    sys.exit(run(main))
