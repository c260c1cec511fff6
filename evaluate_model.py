"""Evaluate checkpoints on the paper's benchmarks or any lm-eval task; results as JSON and a table."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from common.cli import run
from eval.commands.evaluate_command import execute


def main(argv: Sequence[str]) -> int:
    """Parse, evaluate (or grade again), print a table and where the results are."""
    return execute(argv)


if __name__ == "__main__":
    sys.exit(run(main))
