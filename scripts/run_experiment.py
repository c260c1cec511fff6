"""Run an experiment: plan its cells, merge, relax, score, delete what is scored, and write tables and figures.

python scripts/run_experiment.py configs/experiments/quickstart.yaml --dry_run
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts: spinning threads starve the neighbors

from common.cli import Parser, add_output_flags, run
from common.errors import FailureError, UsageError
from common.files.paths import user_path, write_whole
from common.logging import logger
from scripts.experiments.plan import Plan, plan_experiment
from scripts.experiments.schema import read_experiment
from scripts.experiments.state import State

COPY = "experiment.yaml"


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(prog="scripts/run_experiment.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=user_path, metavar="FILE.yaml", help="the experiment (docs/experiments.md)")
    parser.add_argument(
        "--save_path", type=user_path, help="folder of state, models and report (default: experiments/NAME)"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the cells, their disk and time, and run nothing")
    parser.add_argument("--resume", action="store_true", help="go on: run what is not done, and what failed once more")
    parser.add_argument("--only", metavar="PATTERN", help="run the cells with such names (* and ?), and what they need")
    parser.add_argument("--jobs", metavar="N|in_process", help="cells at a time, or all in this process")
    parser.add_argument("--slurm", type=user_path, metavar="FILE", help="write a Slurm array script and run nothing")
    parser.add_argument("--status", action="store_true", help="print the progress and run nothing")
    parser.add_argument(
        "--no_report",
        action="store_true",
        help="write no tables at the end; with --collect, the rows and summary.md alone",
    )
    parser.add_argument("--collect", type=user_path, metavar="FILE.json", help="also write all rows as compact JSON")
    add_output_flags(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Plan, then show, run or report, as the flags say; 1 where a cell failed."""
    args = make_parser().parse_args(argv)
    experiment = read_experiment(args.file)
    folder = args.save_path or Path("experiments") / experiment.name
    plan, state = plan_experiment(experiment, folder), State(folder)
    if args.slurm is not None:
        from scripts.experiments.slurm import slurm_script

        write_whole(args.slurm, slurm_script(plan, args.file, folder).encode())
        logger.info(f"Slurm script written to {args.slurm}: sbatch {args.slurm}.")
        return 0
    if args.dry_run:
        print(described(plan, state))
        return 0
    if args.status:
        print(state.table(plan))
        return 0
    check_folder(folder, args.file, args.resume)
    jobs = jobs_of(args.jobs, plan)
    from scripts.experiments.runner import Runner, matching, visible_gpus

    names = matching(plan, args.only)
    runner = Runner(plan, state, args.quiet)
    for note in plan.notes:
        logger.info(note)
    failed = runner.run(names, jobs, visible_gpus())
    if args.collect is not None or not args.no_report:
        report(plan, state, args.collect, with_tables=not args.no_report)
    if failed:
        raise FailureError(f"{failed} cells failed or were skipped; --status lists them, --resume runs them once more.")
    return 0


def described(plan: Plan, state: State) -> str:
    """Return the plan as text: a command per cell, then numbers, disk and time."""
    from scripts.experiments.estimate import estimate

    lines = [f"# {plan.experiment.title}"]
    lines += [f"{cell.name}\n  {cell.command}" for cell in plan.cells]
    return "\n".join([*lines, "", *plan.notes, *estimate(plan, state).lines()])


def check_folder(folder: Path, file: Path, resume: bool) -> None:
    """Keep a copy of the experiment's file in its folder.

    Raises UsageError for a folder with the state of an earlier run without --resume, or with something else in it.
    """
    copy = folder / COPY
    if folder.exists() and any(folder.iterdir()):
        if not copy.is_file():
            raise UsageError(f"--save_path {folder} holds something that is no experiment; give another folder.")
        if not resume:
            raise UsageError(f"{folder} holds an earlier run: --resume goes on with it, or give another --save_path.")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(copy, file.read_bytes())


def jobs_of(value: str | None, plan: Plan) -> int | str:
    """Return how cells are run: the flag's, else the file's. Raises UsageError for neither a number nor in_process."""
    if value is None:
        return plan.experiment.jobs
    if value != "in_process" and not (value.isdigit() and int(value) > 0):
        raise UsageError(f"--jobs must be in_process or a number of at least 1, found {value!r}.")
    return value if value == "in_process" else int(value)


def report(plan: Plan, state: State, collect: Path | None, with_tables: bool) -> None:
    """Write the CSV of all cells and the differences, with_tables: also tables and figures, and print their paths."""
    from scripts.experiments.results import compact, write_results

    remarks: set[str] = set()

    def remark(sentence: str) -> None:
        if sentence not in remarks:
            logger.info(sentence)
        remarks.add(sentence)

    files, rows = write_results(plan, state, remark, with_tables)
    for file in files:
        print(file)
    if collect is not None:
        parts = compact(plan, rows, collect)
        logger.info(f"{len(rows)} rows in {', '.join(map(str, parts))}.")


if __name__ == "__main__":
    sys.exit(run(main))
