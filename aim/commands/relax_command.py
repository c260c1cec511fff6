"""The command line of performAIM.py: the relaxation of a merged checkpoint or adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aim.commands.execution import RunConfig, parse_flags, pop_output, require_save_path
from aim.commands.replay_command import parse_replay
from aim.config import AimConfig, add_aim_flags, add_scaling_flags
from common.cli import Parser, add_output_flags, config_values
from common.distributed import ProcessGroup
from common.files.json_values import JsonObject
from common.files.paths import user_path
from merging.checkpoints.hub import local_paths
from merging.plan.merge_plan import MergePlan
from merging.recipe import DTYPES, read_config
from merging.recipe.flags import add_look_flags, add_plan_flags, add_run_flags
from merging.recipe.merge_recipe import PLAN_KEYS, PlanOptions

ABOUT = "Relax a merged checkpoint towards its base where the base's activations are large (AIM, arXiv:2502.02421)."
DEFAULTS = {"omega": "0.4", "numerics": "float32"}
OUTPUT_DEFAULTS = {"device": "auto", "max_shard_size": "5GB"}
NOT_IN_FILES = ("config", "from_lock", "dry_run", "json", "quiet", "debug", "help")


@dataclass(frozen=True)
class RelaxRun(RunConfig):
    """A relaxation. dtype: of the result, None keeps that of the merged model or adapter."""

    merged_model: str
    base_model: str
    aim: AimConfig
    dtype: str | None
    options: PlanOptions

    @property
    def protected(self) -> Sequence[Path]:
        """The local models, the importance file and the calibration text."""
        return [*local_paths([self.merged_model, self.base_model]), *self.aim.protected]

    def plan(self) -> MergePlan:
        """Open merged model and base and return the plan."""
        from aim.pipeline import plan_relaxation

        return plan_relaxation(
            self.merged_model, self.base_model, self.aim, self.output, self.dtype, self.options, self.dry_run
        )

    def summary(self, folder: Path) -> str:
        """Return the sentence on model, omegas and folder."""
        omegas = ", ".join(f"{omega:g}" for omega in self.aim.omegas)
        return f"Relaxed {self.merged_model} with omega {omegas} into {folder}."


def relax_parser() -> Parser:
    """Return the parser of performAIM.py; the original's flags keep their names."""
    parser = Parser(
        prog="performAIM.py",
        usage="performAIM.py --merged_model MODEL --pretrained_model_name BASE --save_path OUT [flags]",
        description=ABOUT,
    )
    group = parser.add_argument_group("models")
    group.add_argument("--merged_model", metavar="MODEL", help="the merged checkpoint: a folder or hub id (required)")
    group.add_argument("--pretrained_model_name", metavar="BASE", help="its base: a folder or hub id (required)")
    group.add_argument("--config", type=user_path, metavar="FILE", help="YAML with the flags as keys; flags win")
    group = parser.add_argument_group("computation")
    group.add_argument("--device", help=f"auto, cpu, cuda or cuda:N (default: {OUTPUT_DEFAULTS['device']})")
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


def parse_relax(argv: Sequence[str], process_group: ProcessGroup) -> RunConfig:
    """Return the run of performAIM.py's flags: a relaxation or the replay of a lock.

    Args:
        argv: the flags.
        process_group: the ranks of the run.

    Raises:
        UsageError: naming the flag or key.
    """
    parser = relax_parser()
    flags, run_flags = parse_flags(parser, argv)
    if {"from_lock", "config"} <= flags.keys():
        parser.error("--from_lock repeats a relaxation as it is; leave out --config")
    config = config_values(parser, read_config(flags.pop("config")), NOT_IN_FILES) if "config" in flags else {}
    from merging.output.hub_upload import take_push

    push = take_push(flags, config, run_flags["dry_run"])
    if "from_lock" in flags:
        names = {"merged_model": "models_to_merge", "pretrained_model_name": "base_model"}
        flags = {names.get(key, key): value for key, value in flags.items()}
        return parse_replay(flags, run_flags, process_group, push, program="performAIM.py")
    for key in ("merged_model", "pretrained_model_name"):
        if flags.get(key, config.get(key)) is None:
            parser.error(f"--{key} is missing")
    output = pop_output(flags, config, OUTPUT_DEFAULTS, process_group)
    require_save_path(parser, output, run_flags)
    values: JsonObject = {**DEFAULTS, **config, **flags}
    return RelaxRun(
        output,
        push,
        **run_flags,
        merged_model=str(values["merged_model"]),
        base_model=str(values["pretrained_model_name"]),
        aim=AimConfig.from_mapping(
            values, reference=values["numerics"] == "reference", resume=output.resume, seed="seed"
        ),
        dtype=values.get("dtype"),
        options=PlanOptions(**{key: values[key] for key in PLAN_KEYS if key in values}),
    )
