"""Run the hostile programs of tests/eval/sandbox under every combination of identity and layers, and print a table.

Needs root, to become each identity. `python scripts/dev/sandbox_table.py --only "root, bubblewrap"` runs one.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from common.cli import Parser, add_output_flags, run
from common.files.json_values import JsonObject
from tests.eval.sandbox.arena import STALL_SECONDS
from tests.eval.sandbox.combinations import COMBINATIONS, Combination, run_arena
from tests.eval.sandbox.hostile import GOOD


def run_combination(combination: Combination, workers: int) -> list[JsonObject]:
    """Run the arena in a folder of its own and return its lines."""
    with tempfile.TemporaryDirectory(prefix="sandbox-canaries-") as outer:
        os.chmod(outer, 0o711)  # noqa: S103 - the sandbox's user must reach the folder inside
        folder = Path(outer, "canaries")
        folder.mkdir()
        folder.chmod(0o777)
        return run_arena(combination, folder, workers)


def row(combination: Combination, lines: list[JsonObject]) -> str:
    """Return a line of the table: layers, programs, escapes, stalls, damage, slowest program."""
    first, *results, last = lines
    good, results = results[: len(GOOD)], results[len(GOOD) :]
    escaped = [f"{r['family']}: {r['name']}" for r in results if r["status"] == "passed"]
    stalled = [r for r in results if r["seconds"] > STALL_SECONDS]
    escaped += [f"ordinary program failed: {r['name']}" for r in good if r["status"] != "passed"]
    counts = Counter(r["status"] for r in results)
    cells = [combination.identity, first["mode"] + (" (namespaces refused)" if combination.refused else "")]
    cells += [str(len(results)), str(len(escaped)), str(len(stalled)), str(len(last["damage"]))]
    cells += [str(counts["timed out"]), f"{max(r['seconds'] for r in results):.1f} s"]
    return "| " + " | ".join(cells) + " |" + "".join(f"\n  escaped: {name}" for name in escaped)


def main(argv: Sequence[str]) -> int:
    """Print the table; return 1 where a program escaped, stalled the grading or left damage."""
    parser = Parser(prog="scripts/dev/sandbox_table.py", description=__doc__)
    parser.add_argument("--only", metavar="NAME", help="run only this combination (default: all)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="programs at a time")
    add_output_flags(parser)
    arguments = parser.parse_args(argv)
    print("| grader | mode | programs | escaped | stalled | damage | timed out | slowest |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    failed = False
    for combination in COMBINATIONS:
        if arguments.only not in (None, str(combination)):
            continue
        obstacle = combination.obstacle()
        if obstacle:
            print(f"| {combination.identity} | {combination.mode} | not run: {obstacle} | | | | | |", flush=True)
            continue
        lines = run_combination(combination, arguments.workers)
        line = row(combination, lines)
        print(line, flush=True)
        failed |= (
            "escaped:" in line or bool(lines[-1]["damage"]) or any(r["seconds"] > STALL_SECONDS for r in lines[1:-1])
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(run(main))
