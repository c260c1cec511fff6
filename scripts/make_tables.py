"""Print the paper's tables (scores, relative change, HV gain) from results files, and write them as CSV.

python scripts/make_tables.py results/ --names ./merges/code=Code,./merges/math=Math
python scripts/make_tables.py configs/paper_results.json --population paper
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from console.cli import Parser, add_output_flags, run, say
from console.files import write_whole
from eval.hypervolume import read_rule
from eval.report import make_report, to_csv, to_markdown
from eval.rows import load, parse_names


def parser() -> Parser:
    p = Parser(prog="scripts/make_tables.py", description=(__doc__ or "").splitlines()[0])
    p.add_argument("results", nargs="+", type=Path, help="results files, or folders searched for the newest per model")
    p.add_argument(
        "--population",
        default="merged",
        metavar="RULE",
        help="what HV gain is measured over: merged (the models merged), paper (the published map), or a YAML or JSON "
        "file: row label -> list of model labels",
    )
    p.add_argument("--csv", type=Path, default=Path("results/tables.csv"), metavar="FILE", help="also write this CSV")
    p.add_argument(
        "--names", action="append", default=[], metavar="PATH=LABEL,...", help="what to call models in the tables"
    )
    add_output_flags(p)
    return p


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)

    def remark(sentence: str) -> None:
        say(sentence, args.quiet)

    rule = read_rule(args.population)
    models = load(args.results, parse_names(args.names), remark)
    report = make_report(models, rule, remark)
    write_whole(args.csv, to_csv(report).encode("utf-8"))
    print(to_markdown(report), end="", flush=True)
    remark(f"The same rows are in {args.csv}.")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
