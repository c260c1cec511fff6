"""Draw Pareto fronts with and without AIM, two benchmarks at a time, or curves over omega, as PNG, SVG or PDF.

python scripts/plot_pareto.py results/ --out results/pareto
python scripts/plot_pareto.py configs/paper_results.json --x GSM8K --y MBPP --only "Code + Math"
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.cli import Parser, add_output_flags, run
from common.errors import UsageError, nearest
from common.logging import logger
from eval.report.plots import curved, plot_omega_curves, plot_pareto, save
from eval.report.table_flags import add_measure_flags, add_results_flags, measure_of, models_of
from eval.stats.gains import all_gains
from eval.stats.uncertainty import uncertainty


def parser() -> Parser:
    p = Parser(prog="scripts/plot_pareto.py", description=(__doc__ or "").splitlines()[0])
    add_results_flags(p)
    g = p.add_argument_group("plot")
    g.add_argument(
        "--out",
        type=Path,
        metavar="STEM|FILE",
        help="write STEM.png and STEM.svg, or one file where it ends in .png, .svg or .pdf (default: results/pareto or "
        "results/omega)",
    )
    g.add_argument(
        "--x", metavar="BENCHMARK", help="benchmark of the horizontal axis (default: every pair, one panel each)"
    )
    g.add_argument(
        "--y", metavar="BENCHMARK", help="benchmark of the vertical axis (default: every pair, one panel each)"
    )
    g.add_argument("--omega_curves", action="store_true", help="draw scores and HV gain against omega instead")
    add_measure_flags(p)
    add_output_flags(p)
    return p


def chosen_pairs(columns: Sequence[str], x: str | None, y: str | None) -> list[tuple[str, str]]:
    """Return the pairs of benchmarks to draw: one, all with a given one, or all."""
    for name in (x, y):
        if name is not None and name not in columns:
            raise UsageError(
                f"No result has the benchmark {name!r}; there are {', '.join(columns)}.{nearest(name, columns)}"
            )
    if x is not None and x == y:
        raise UsageError(f"--x and --y are both {x}; a front needs two benchmarks.")
    if len(columns) < 2:
        raise UsageError("A Pareto front needs results of at least two benchmarks.")
    if x is not None or y is not None:
        return [(a, b) for a in ([x] if x else columns) for b in ([y] if y else columns) if a != b]
    return list(itertools.combinations(columns, 2))


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    warn = logger.info
    models = models_of(args, warn)
    if args.omega_curves:
        if not curved(models):
            raise UsageError("Omega curves need AIM results of one merge at two omegas or more; none has them.")
        gains = all_gains(models, measure_of(args), warn)
        noise = uncertainty(models, gains, measure_of(args), warn, 0)
        figure = plot_omega_curves(models, gains.values, noise.intervals)
    else:
        figure = plot_pareto(models, chosen_pairs(models.columns, args.x, args.y), warn)
    stem = args.out or Path("results") / ("omega" if args.omega_curves else "pareto")
    for path in save(figure, stem):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
