"""The command line of merge.py: a merge, with AIM in the same pass or without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from aim.commands.execution import RunConfig, parse_flags, pop_output, require_save_path
from aim.commands.replay_command import parse_replay
from aim.config import KEYS as AIM_KEYS
from aim.config import SEED, AimConfig, add_aim_flags, add_scaling_flags
from aim.omegas import parse_omegas
from common.cli import Parser, value_flags
from common.distributed import ProcessGroup
from common.errors import UsageError
from common.files.json_values import JsonValue
from merging.checkpoints.hub import local_paths
from merging.plan.merge_plan import MergePlan
from merging.recipe import MergeRecipe, make_recipe, read_config
from merging.recipe.flags import make_method_parser, make_parser
from merging.recipe.mergekit.command_line import translate
from merging.recipe.method_registry import find_method


@dataclass(frozen=True)
class MergeRun(RunConfig):
    """A merge. aim: relaxation in the same pass; None for a merge alone."""

    recipe: MergeRecipe
    aim: AimConfig | None

    @property
    def protected(self) -> Sequence[Path]:
        """The local models, the importance file and the calibration text."""
        return [*local_paths(self.recipe.model_names), *(self.aim.protected if self.aim else ())]

    def plan(self) -> MergePlan:
        """Open the models and return the plan."""
        from merging.planning import plan_merge

        if self.aim is None:
            return plan_merge(self.recipe, self.output, headers_only=self.dry_run)
        from aim.pipeline import relaxation_spec

        relaxation = relaxation_spec(self.aim, self.output, self.recipe)
        return plan_merge(self.recipe, self.output, relaxation, self.dry_run)

    def summary(self, folder: Path) -> str:
        """Return the sentence on method, models and folder."""
        count, kind = len(self.recipe.models), self.output.save_as
        return f"Merged {count} {kind}{'s' if count > 1 else ''} with {self.recipe.method} into {folder}."


def merge_parser(argv: Sequence[str]) -> Parser:
    """Return the parser of merge.py; --help with a --method prints that method's parameters and ends."""
    method_flag = Parser(add_help=False)
    method_flag.add_argument("--method")
    chosen, _ = method_flag.parse_known_args(argv)
    if chosen.method and {"-h", "--help"} & set(argv):
        make_method_parser(find_method(chosen.method)).parse_args(["--help"])
    parser = make_parser()
    add_aim_flags(parser, SEED, prefix="relax_", omega="none: no relaxation")
    add_scaling_flags(parser)
    return parser


def parse_merge(argv: Sequence[str], process_group: ProcessGroup) -> RunConfig:
    """Return the run of merge.py's flags, or of mergekit's command line: a merge or the replay of a lock.

    Args:
        argv: the flags.
        process_group: the ranks of the run.

    Raises:
        UsageError: naming the flag or key.
    """
    parser = merge_parser(argv)
    argv, answers = translate(argv, value_flags(parser))
    flags, run_flags = parse_flags(parser, argv)
    config = read_config(flags.pop("config")) if "config" in flags and "from_lock" not in flags else {}
    from merging.output.hub_upload import take_push

    push = take_push(flags, config, run_flags["dry_run"])
    if "from_lock" in flags:
        return parse_replay(flags, run_flags, process_group, push)
    values = {key: flags.pop(key, config.pop(key, None)) for key in AIM_KEYS}
    output = pop_output(flags, config, {}, process_group)
    aim = _aim_config(values, output.resume)
    recipe = make_recipe(flags, config)
    require_save_path(parser, output, run_flags)
    recipe = replace(recipe, notes=(*answers, *recipe.notes))
    return MergeRun(output, push, **run_flags, recipe=recipe, aim=aim)


def _aim_config(values: Mapping[str, JsonValue], resume: bool) -> AimConfig | None:
    """The configuration of AIM, None where none of its keys is set. Raises UsageError for settings without an omega."""
    keys = [key for key, value in values.items() if value is not None]
    if not keys:
        return None
    if values["omega"] is None:
        raise UsageError(f"--{keys[0]} belongs to AIM in the same pass: give --omega too.")
    parse_omegas(values["omega"])
    if values["importance"] is None and values["calibration"] is None:
        raise UsageError("--omega needs the base's importance: --importance FILE, or --calibration and its text.")
    return AimConfig.from_mapping(values, resume=resume)
