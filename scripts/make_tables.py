"""Print the paper's tables (scores, relative change, HV gain, significance) from results files, and write them.

python scripts/make_tables.py results/ --names ./merges/code=Code,./merges/math=Math
python scripts/make_tables.py results/ --with_paper --intervals --latex tables.tex
python scripts/make_tables.py configs/paper_results.json --population paper
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import Parser, add_output_flags, run
from common.files.paths import user_path, write_whole
from common.logging import logger
from eval.report.card import update_card
from eval.report.latex import to_latex
from eval.report.report import ranking
from eval.report.table_flags import add_report_flags, report_of
from eval.report.tables import to_csv, to_markdown, to_ranking
from eval.results.answer_facts import answers_table


def parser() -> Parser:
    p = Parser(prog="scripts/make_tables.py", description=(__doc__ or "").splitlines()[0])
    add_report_flags(p)
    g = p.add_argument_group("output")
    g.add_argument("--intervals", action="store_true", help="print the 95 %% interval of each number")
    g.add_argument("--answers", action="store_true", help="also print length, cut and empty answers by benchmark")
    g.add_argument("--rank", metavar="COLUMN", help='also print a ranking by a benchmark or by "HV Gain"')
    g.add_argument("--csv", type=Path, default=Path("results/tables.csv"), metavar="FILE", help="also write this CSV")
    g.add_argument("--latex", type=Path, metavar="FILE", help="also write LaTeX: compiles as it is, or by \\input")
    g.add_argument(
        "--update_card",
        type=user_path,
        metavar="CARD",
        help="also write the results of one model into its card (a checkpoint's folder, or its README.md)",
    )
    g.add_argument(
        "--card_model",
        metavar="MODEL",
        help="model whose results go into the card (default: that of the card's folder)",
    )
    add_output_flags(p)
    return p


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    warn = logger.info
    models, report = report_of(args, warn)
    ranked = ranking(report, args.rank) if args.rank else []
    card = update_card(args.update_card, args.card_model, report, args.intervals) if args.update_card else None
    write_whole(args.csv, to_csv(report).encode("utf-8"))
    if args.latex:
        write_whole(args.latex, to_latex(report, args.intervals).encode("utf-8"))
    print(to_markdown(report, args.intervals), end="", flush=True)
    if args.answers:
        measured = [row.result for row in models.rows if not row.published]
        print(f"\n## Answers\n\n{answers_table(measured)}", flush=True)
    if args.rank:
        print("\n" + to_ranking(report, ranked, args.rank, args.intervals), end="", flush=True)
    warn(f"The same rows are in {args.csv}{f' and {args.latex}' if args.latex else ''}.")
    if card:
        warn(f"The results of {card.model} are in {card.path}.")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
