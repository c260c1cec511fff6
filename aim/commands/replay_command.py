"""The replay of a lock, as --from_lock of both scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aim.commands.execution import RunConfig
from common.distributed import ProcessGroup
from common.errors import UsageError
from common.files.json_values import JsonObject, JsonValue
from merging.plan.merge_plan import MergePlan, OutputConfig
from merging.recipe.flags import OUTPUT_KEYS

if TYPE_CHECKING:
    from merging.output.hub_upload import Push


@dataclass(frozen=True)
class ReplayRun(RunConfig):
    """The run of a lock again. models, base_model: present names of its inputs, where they have moved."""

    lock: Mapping[str, JsonValue]
    models: Sequence[str]
    base_model: str | None

    def plan(self) -> MergePlan:
        """Plan from the lock, and refuse inputs that cannot repeat it."""
        from aim.replay import plan_from_lock
        from merging.replay import check_lock_plan

        plan = plan_from_lock(self.lock, self.output, self.models, self.base_model)
        check_lock_plan(plan, self.lock)
        return plan

    def summary(self, folder: Path) -> str:
        """Return the sentence on the digests."""
        return f"{folder} repeats the lock: every tensor has its digest."


def parse_replay(
    flags: JsonObject,
    run_flags: Mapping[str, bool],
    process_group: ProcessGroup,
    push: Push | None,
    program: str | None = None,
) -> ReplayRun:
    """Return the replay of --from_lock.

    Args:
        flags: from_lock, those of the output, and base_model and models_to_merge for inputs that have moved.
        run_flags: dry_run and as_json.
        process_group: the ranks of the run.
        push: repository for the upload, None for none.
        program: the script whose locks alone are repeated; None for any.

    Raises:
        UsageError: for flags that would change the result, a missing --save_path, or another script's lock.
    """
    from merging.output.records.lock import read_lock

    lock = read_lock(flags.pop("from_lock"))
    if program is not None and lock["program"] != program:
        raise UsageError(f"The lock is of {lock['program']}; repeat it by `python merge.py --from_lock`.")
    settings = {key: flags.pop(key) for key in OUTPUT_KEYS if key in flags and key != "save_as"}
    models, base = flags.pop("models_to_merge", ""), flags.pop("base_model", None)
    if flags:
        raise UsageError(f"--from_lock repeats a recipe as it is; leave out --{next(iter(flags))}.")
    if "save_path" not in settings and not run_flags["dry_run"]:
        raise UsageError("--save_path is missing: the folder for the repeated checkpoint.")
    defaults = {"save_path": Path(), "max_shard_size": lock["max_shard_size"], "device": lock["device"]}
    output = OutputConfig(
        **{**defaults, **settings, **({"load_check": False} if run_flags["dry_run"] else {})},
        save_as=lock["recipe"].get("save_as", "model"),
        expected=lock,
        process_group=process_group,
    )
    names = models.split(",") if models else ()
    return ReplayRun(output, push, **run_flags, lock=lock, models=names, base_model=base)
