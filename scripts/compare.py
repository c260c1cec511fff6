"""Compare two evaluated models item by item, with significance tests.

python scripts/compare.py results/ties results/ties_aim
python scripts/compare.py TIES TIES_AIM --results results --format markdown
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import Parser, add_output_flags, run
from common.errors import UsageError, nearest
from common.logging import logger
from eval.report.comparison_text import to_json, to_markdown, to_text
from eval.report.table_flags import add_measure_flags, add_names_flag, measure_of
from eval.results.reader import parse_names, read_all, results_files
from eval.results.result import EvalResult
from eval.results.rows import Warn, assemble, known_names
from eval.stats.comparison import DRAWS, compare
from eval.stats.gain_comparison import compare_gains

FORMATS = {"text": to_text, "markdown": to_markdown, "json": to_json}


def parser() -> Parser:
    p = Parser(prog="scripts/compare.py", description=(__doc__ or "").splitlines()[0])
    p.add_argument("a", metavar="A", help="results file, folder with one model's results, or with --results a model")
    p.add_argument("b", metavar="B", help="the same; differences are B - A")
    g = p.add_argument_group("models")
    g.add_argument(
        "--results",
        action="append",
        default=[],
        type=Path,
        metavar="PATH",
        help="results to find A and B in by name or label, and the population of their HV gains; may be repeated",
    )
    add_names_flag(g)
    add_measure_flags(p)
    g = p.add_argument_group("tests and output")
    g.add_argument("--format", choices=tuple(FORMATS), default="text", help="format of the output")
    g.add_argument("--draws", type=int, default=DRAWS, help="draws of the bootstrap and of the permutation test")
    g.add_argument("--seed", type=int, default=0, help="seed of the bootstrap and of the permutation test")
    add_output_flags(p)
    return p


def one(what: str, flag: str, results: Sequence[EvalResult], names: Mapping[str, str], warn: Warn) -> EvalResult:
    """The result that A or B means: a model of `known` by path, name or label, else a results file or folder.

    Raises UsageError where that is none or several.
    """
    called = {result.model: {result.model, Path(result.model).name} for result in results}
    names = known_names(names, set().union(*called.values())) if results else names
    for spelled in called.values():
        spelled |= {label for model, label in names.items() if model in spelled or Path(model).name in spelled}
    matches = [result for result in results if what in called[result.model]]
    has_results = Path(what).is_file() or bool(results_files(Path(what)))
    if not matches and Path(what).exists() and (has_results or not results):
        matches = read_all([Path(what)], warn)[0]
    if len(matches) > 1:
        listed = ", ".join(result.model for result in matches)
        raise UsageError(f"{flag} {what} means {len(matches)} models ({listed}); give one model's folder or its path.")
    if not matches:
        hint = nearest(what, [name for spelled in called.values() for name in spelled])
        expected = "a results file or folder" + (
            " or a model of --results" if results else ", or a model and --results"
        )
        raise UsageError(f"{flag} {what} is not there: give {expected}.{hint}")
    return matches[0]


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    warn = logger.info
    if args.draws < 100:
        raise UsageError(f"--draws {args.draws}: at least 100 are needed.")
    measure = measure_of(args)
    all_results, labels = read_all(args.results, warn)
    names = {**labels, **parse_names(args.names)}
    a, b = (one(what, flag, all_results, names, warn) for what, flag in ((args.a, "A"), (args.b, "B")))
    comparison = compare(a, b, args.draws, args.seed)
    gain, why = None, list(comparison.remarks)
    if all_results:
        compared = [
            *(r for r in all_results if r.model not in (a.model, b.model)),
            a,
            *([b] if b.model != a.model else []),
        ]
        models = assemble(compared, names, warn)
        gain = compare_gains(models, a.model, b.model, measure, args.seed, why.append)
    comparison = replace(comparison, remarks=tuple(why))
    print(FORMATS[args.format](comparison, gain, args.draws, args.seed), end="", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
