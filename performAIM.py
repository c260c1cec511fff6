"""Relax a merged checkpoint towards its base where the base's activations are large (AIM, arXiv:2502.02421)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aim.config import add_aim_flags, add_scaling_flags, aim_of
from common.cli import Parser, add_output_flags, config_values, run
from common.distributed import ProcessGroup, init_distributed
from common.files.paths import user_path
from common.logging import logger
from merging.plan.merge_plan import Output
from merging.recipe import DTYPES, read_config
from merging.recipe.flags import OUTPUT_KEYS, add_look_flags, add_plan_flags, add_run_flags, take
from merging.recipe.options import PLAN_KEYS, PlanOptions

if TYPE_CHECKING:
    from merging.output.hub_upload import Push

DEFAULTS = {"omega": "0.4", "numerics": "float32", "device": "auto", "max_shard_size": "5GB"}
NOT_IN_FILES = ("config", "from_lock", "dry_run", "json", "quiet", "debug", "help")


def make_parser() -> Parser:
    """Return the parser; the original's flags keep their names."""
    parser = Parser(
        prog="performAIM.py",
        usage="performAIM.py --merged_model MODEL --pretrained_model_name BASE --save_path OUT [flags]",
        description=__doc__,
    )
    group = parser.add_argument_group("models")
    group.add_argument("--merged_model", metavar="MODEL", help="the merged checkpoint: a folder or hub id (required)")
    group.add_argument("--pretrained_model_name", metavar="BASE", help="its base: a folder or hub id (required)")
    group.add_argument("--config", type=user_path, metavar="FILE", help="YAML with the flags as keys; flags win")
    group = parser.add_argument_group("computation")
    group.add_argument("--device", help=f"auto, cpu, cuda or cuda:N (default: {DEFAULTS['device']})")
    group.add_argument("--dtype", choices=DTYPES, help="dtype of the output (default: the merged model's or adapter's)")
    group.add_argument(
        "--numerics",
        choices=("float32", "reference"),
        help="reference: the original's bf16 arithmetic, batch 1, tied embeddings relaxed "
        f"(default: {DEFAULTS['numerics']})",
    )
    add_aim_flags(parser, seed="seed", omega=DEFAULTS["omega"])
    add_scaling_flags(parser)
    add_plan_flags(parser)
    add_run_flags(parser)
    add_look_flags(parser, "repeat the relaxation of a merge.lock.json to the same bytes")
    add_output_flags(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Parse, relax (or only plan), report where; on all ranks that a launcher started."""
    with init_distributed() as process_group:
        return relax(argv, process_group)


def relax(argv: Sequence[str], process_group: ProcessGroup) -> int:
    """Do this process's part of it."""
    parser = make_parser()
    flags = {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}
    flags.pop("quiet")  # read by `common.cli.run`
    dry_run, as_json = flags.pop("dry_run"), flags.pop("json")
    flags.pop("debug")
    if as_json and not dry_run:
        parser.error("--json goes with --dry_run")
    if {"from_lock", "config"} <= flags.keys():
        parser.error("--from_lock repeats a relaxation as it is; leave out --config")
    config = config_values(parser, read_config(flags.pop("config")), NOT_IN_FILES) if "config" in flags else {}
    from merging.output.hub_upload import take_push

    push = take_push(flags, config, dry_run)
    if "from_lock" in flags:
        return repeat_lock(flags, dry_run, as_json, process_group, push)
    asked = {key: take(key, flags, config) for key in OUTPUT_KEYS}
    given: dict[str, Any] = {**DEFAULTS, **config, **flags}
    missing = [key for key in ("merged_model", "pretrained_model_name") if given.get(key) is None]
    if missing or (asked["save_path"] is None and not dry_run):
        parser.error(f"--{(missing or ['save_path'])[0]} is missing")
    aim = aim_of(given, reference=given["numerics"] == "reference", resume=bool(asked["resume"]), seed="seed")
    from aim.pipeline import perform, planned_relaxation
    from merging.output.records.next_steps import finish

    options = PlanOptions(**{key: given[key] for key in PLAN_KEYS if key in given})
    defaults = {key: DEFAULTS[key] for key in ("device", "max_shard_size")}
    wanted = {**defaults, **{key: value for key, value in asked.items() if value is not None}}
    output = Output(**{"save_path": Path(), **wanted}, process_group=process_group)
    models = str(given["merged_model"]), str(given["pretrained_model_name"])
    if dry_run:
        from merging.lora.either import shown

        planned = planned_relaxation(*models, aim, output, given.get("dtype"), headers_only=True, options=options)
        print(shown(planned, output, as_json))
        return 0
    folder = perform(*models, aim, output, given.get("dtype"), options)
    omegas = ", ".join(f"{omega:g}" for omega in aim.omegas)
    logger.info(f"Relaxed {models[0]} with omega {omegas} into {folder}.")
    finish(folder, output, push)
    return 0


def repeat_lock(
    flags: dict[str, Any], dry_run: bool, as_json: bool, process_group: ProcessGroup, push: Push | None
) -> int:
    """Repeat the relaxation of a lock; --merged_model and --pretrained_model_name say where its inputs lie now."""
    from aim.replay import repeat

    names = {"merged_model": "models_to_merge", "pretrained_model_name": "base_model"}
    flags = {names.get(key, key): value for key, value in flags.items()}
    return repeat(flags, dry_run, as_json, process_group, program="performAIM.py", push=push)


if __name__ == "__main__":
    sys.exit(run(main))
