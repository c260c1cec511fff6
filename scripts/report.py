"""Make one HTML page of all results: tables, comparisons, Pareto fronts, omega curves, and every item with its answers.

python scripts/report.py results --names ./merges/code=Code,./merges/math=Math
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import Parser, add_output_flags, run
from common.errors import UsageError
from common.files.paths import write_whole
from common.logging import logger
from eval.report.page import make_page
from eval.report.table_flags import add_report_flags, report_of
from eval.results.rows import model_key
from eval.results.samples import answers_of, sample_files


def parser() -> Parser:
    p = Parser(prog="scripts/report.py", description=(__doc__ or "").splitlines()[0])
    add_report_flags(p)
    g = p.add_argument_group("output")
    g.add_argument("--out", type=Path, default=Path("results/report.html"), metavar="FILE", help="HTML file to write")
    g.add_argument("--title", default="Merges and their relaxations", help="title of the page")
    g.add_argument("--max_items", type=int, metavar="N", help="items of a benchmark to show at most (default: all)")
    add_output_flags(p)
    return p


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    warn = logger.info
    if args.max_items is not None and args.max_items < 1:
        raise UsageError(f"--max_items {args.max_items}: at least 1, or leave it out for all.")
    models, report = report_of(args, warn)
    files = sample_files(args.results)
    answers = {
        row.key: answers_of(row.result, files.get(model_key(row.model), []), warn)
        for row in models.rows
        if not row.published
    }
    page = make_page(models, report, answers, args.title, args.max_items).encode("utf-8", "replace")
    write_whole(args.out, page)
    warn(f"The page is {args.out} ({len(page) / 1e6:.1f} MB); it needs nothing else.")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
