"""Merge fine-tuned models into one checkpoint: `python merge.py --method ties --help` shows a method's parameters."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from aim.commands.execution import execute
from aim.commands.merge_command import parse_merge
from common.cli import run


def main(argv: Sequence[str]) -> int:
    """Parse, merge (or only plan), print where the result is."""
    return execute(parse_merge, argv)


if __name__ == "__main__":
    sys.exit(run(main))
