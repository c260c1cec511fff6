"""A Slurm script for an experiment: an array with one task for each chain of cells."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from scripts.experiments.commands import ROOT
from scripts.experiments.plan import Plan


def chains(plan: Plan) -> list[str]:
    """Return patterns for --only that share no weights: each merge with all that is made from it, and each source."""
    patterns = [cell.name.removesuffix("__merge") for cell in plan.cells if cell.section == "merge"]
    sources = [cell.name for cell in plan.cells if cell.section == "evaluate" and not plan.is_of_merge(cell)]
    return [*sources, *patterns]


def slurm_script(plan: Plan, file: Path, folder: Path) -> str:
    """Return the text of a script for sbatch.

    A cell that several tasks need (a trained family, an importance file) is run by the first, and the others wait.
    """
    patterns = chains(plan)
    quoted = "\n".join(f"  {shlex.quote(pattern)}" for pattern in patterns)
    runner = shlex.join([sys.executable, str(ROOT / "scripts" / "run_experiment.py"), str(file.resolve())])
    return f"""#!/bin/bash
# {plan.experiment.title}: {len(plan.cells)} cells in {len(patterns)} tasks.
# sbatch {plan.experiment.name}.sbatch; then, when the array has ended:
#   {runner} --save_path {shlex.quote(str(folder.resolve()))} --resume
# which runs what failed once more and writes the tables.
#SBATCH --job-name={plan.experiment.name}
#SBATCH --array=0-{len(patterns) - 1}
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output={folder.resolve()}/slurm-%A_%a.out
set -euo pipefail
cd {shlex.quote(str(Path.cwd()))}
PATTERNS=(
{quoted}
)
exec {runner} --save_path {shlex.quote(str(folder.resolve()))} --resume --quiet --no_report \\
  --only "${{PATTERNS[$SLURM_ARRAY_TASK_ID]}}"
"""
