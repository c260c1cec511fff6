"""Relax a merged checkpoint towards its base where the base's activations are large (AIM, arXiv:2502.02421)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from aim.commands.execution import execute
from aim.commands.relax_command import parse_relax
from common.cli import run


def main(argv: Sequence[str]) -> int:
    """Parse, relax (or only plan), print where the result is."""
    return execute(parse_relax, argv)


if __name__ == "__main__":
    sys.exit(run(main))
