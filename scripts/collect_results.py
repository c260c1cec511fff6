"""Put the newest results of several models into one small file, without samples, settings of machines, or paths."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import Parser, add_output_flags, run
from common.files.paths import write_whole
from common.logging import logger
from eval.results.collection import packed
from eval.results.reader import parse_names, read_results


def parser() -> Parser:
    p = Parser(prog="scripts/collect_results.py", description=__doc__)
    p.add_argument("results", nargs="+", type=Path, help="results files, or folders searched for the newest per model")
    p.add_argument("--out", type=Path, required=True, help="the file to write")
    p.add_argument(
        "--names", action="append", default=[], metavar="PATH=LABEL,...", help="labels of models, kept in the file"
    )
    add_output_flags(p)
    return p


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    results = [result for path in args.results for result in read_results(path, lambda text: logger.info(text))[0]]
    write_whole(args.out, packed(results, parse_names(args.names)).encode())
    logger.info(f"{len(results)} results in {args.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
