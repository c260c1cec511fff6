"""A run as a command line gives it, and its execution: plan, report or write, say where, upload."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import Parser
from common.distributed import ProcessGroup, init_distributed
from common.files.json_values import JsonObject, JsonValue
from common.logging import logger
from merging.plan.merge_plan import MergePlan, OutputConfig
from merging.recipe.flags import OUTPUT_KEYS, take

if TYPE_CHECKING:
    from merging.output.hub_upload import Push


@dataclass(frozen=True)
class RunConfig(ABC):
    """One run: its output, what follows it, and by its kind what is planned.

    push: repository for the upload, None for none. dry_run: print the plan and stop; as_json: as JSON.
    """

    output: OutputConfig
    push: Push | None
    dry_run: bool
    as_json: bool

    @property
    def protected(self) -> Sequence[Path]:
        """Paths that the output must not touch, as far as they are known before the inputs are opened."""
        return ()

    @abstractmethod
    def plan(self) -> MergePlan:
        """Open the inputs (for a dry run their headers alone) and return the plan."""

    @abstractmethod
    def summary(self, folder: Path) -> str:
        """Return the closing sentence on the result."""


def execute(parse: Callable[[Sequence[str], ProcessGroup], RunConfig], argv: Sequence[str]) -> int:
    """Parse a command line and do its run, with the other ranks where a launcher started several.

    Args:
        parse: from flags to a run.
        argv: the flags.

    Returns:
        The exit code.

    Raises:
        ProjectError: naming the flag, file or tensor that cannot be.
    """
    with init_distributed() as process_group:
        config = parse(argv, process_group)
        from merging.output.records.next_steps import finish
        from merging.pipeline import report, run

        if config.dry_run:
            with process_group.main_process_first():
                plan = config.plan()
            print(report(plan, config.output, config.as_json))
            return 0
        folder = run(config.plan, config.output, config.protected)
        logger.info(config.summary(folder))
        finish(folder, config.output, config.push)
        return 0


def parse_flags(parser: Parser, argv: Sequence[str]) -> tuple[JsonObject, dict[str, bool]]:
    """Return the flags that were given, without those about printing, and dry_run and as_json.

    Raises:
        UsageError: for unknown flags and for --json alone.
    """
    flags = {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}
    dry_run, as_json = flags.pop("dry_run"), flags.pop("json")
    for key in ("quiet", "debug"):  # read by `common.cli.run`
        flags.pop(key)
    if as_json and not dry_run:
        parser.error("--json goes with --dry_run")
    return flags, {"dry_run": dry_run, "as_json": as_json}


def pop_output(
    flags: JsonObject,
    config: JsonObject,
    defaults: Mapping[str, JsonValue],
    process_group: ProcessGroup,
) -> OutputConfig:
    """Remove the keys about the output from flags and YAML and return it; without --save_path its path is empty.

    Args:
        flags: those that were given.
        config: the YAML's keys, which the flags override.
        defaults: of keys that neither has.
        process_group: the ranks of the run.

    Raises:
        UsageError: for a value of another type.
    """
    values = {key: take(key, flags, config) for key in OUTPUT_KEYS}
    settings = {**defaults, **{key: value for key, value in values.items() if value is not None}}
    return OutputConfig(**{"save_path": Path(), **settings}, process_group=process_group)


def require_save_path(parser: Parser, output: OutputConfig, run_flags: Mapping[str, bool]) -> None:
    """Raise UsageError for a run without --save_path, which only a dry run may lack."""
    if output.save_path == Path() and not run_flags["dry_run"]:
        parser.error("--save_path is missing: the folder for the result")
