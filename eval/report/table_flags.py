"""The flags that several scripts share: which results, what they are called, and how HV gain is measured."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from common.cli import Parser
from common.errors import UsageError
from eval.report.report import Report, make_report
from eval.results.reader import load, parse_names
from eval.results.rows import Models, Warn, only
from eval.stats.gains import Measure
from eval.stats.hypervolume import read_rule


def add_results_flags(p: Parser) -> argparse._ArgumentGroup:
    """Add the results to read, --names and --only."""
    p.add_argument("results", nargs="+", type=Path, help="results files, or folders searched for the newest per model")
    g = p.add_argument_group("models")
    add_names_flag(g)
    g.add_argument("--only", metavar="LABEL", help='only merges of these models, such as "Code + Math", and the models')
    return g


def add_report_flags(p: Parser) -> None:
    """Add the flags of tables: results, --with_paper, --only, the measure of HV gain, --seed."""
    g = add_results_flags(p)
    g.add_argument("--with_paper", action="store_true", help="put the results into the paper's tables, marked by ‡")
    g = add_measure_flags(p)
    g.add_argument("--seed", type=int, default=0, help="seed of the bootstrap and the permutations")


def models_of(args: argparse.Namespace, warn: Warn, with_paper: bool = False) -> Models:
    """Read the results that `add_results_flags` asks for."""
    models = load(args.results, parse_names(args.names), warn, with_paper)
    return only(models, args.only) if args.only else models


def report_of(args: argparse.Namespace, warn: Warn) -> tuple[Models, Report]:
    """Read the results and make the tables that `add_report_flags` ask for."""
    measure = measure_of(args)
    models = models_of(args, warn, args.with_paper)
    return models, make_report(models, measure, warn, args.seed)


def add_names_flag(p: Parser | argparse._ArgumentGroup) -> None:
    """Add --names."""
    p.add_argument("--names", action="append", default=[], metavar="PATH=LABEL,...", help="labels of models")


def add_measure_flags(p: Parser) -> argparse._ArgumentGroup:
    """Add --population, --reference and --root, and return their group."""
    g = p.add_argument_group("HV gain")
    g.add_argument(
        "--population",
        default="merged",
        metavar="RULE",
        help="population of HV gain: merged (the models merged), paper (the published map), or a YAML or JSON "
        "file: row label or checkpoint -> list of labels",
    )
    g.add_argument(
        "--reference",
        default="0",
        metavar="FRACTION",
        help="reference point of volumes: a fraction for all benchmarks, or MMLU=0.25,... and 0 elsewhere",
    )
    g.add_argument(
        "--root", type=float, metavar="K", help="root taken of the volume (default: as many as there are benchmarks)"
    )
    return g


def measure_of(args: argparse.Namespace) -> Measure:
    """Read the flags of `add_measure_flags`. Raises UsageError for numbers that cannot be right."""
    if args.root is not None and not (math.isfinite(args.root) and args.root > 0):
        raise UsageError(f"--root must be a positive number, not {args.root:g}.")
    return Measure(read_rule(args.population), _reference(args.reference), args.root)


def _reference(text: str) -> float | dict[str, float]:
    if "=" not in text:
        return _fraction(text)
    reference: dict[str, float] = {}
    for entry in text.split(","):
        column, _, value = entry.rpartition("=")
        if not column.strip():
            raise UsageError(f"--reference {entry!r}: expected BENCHMARK=FRACTION.")
        reference[column.strip()] = _fraction(value)
    return reference


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not -1.0 <= value < 1.0:
        raise UsageError(f"--reference {text.strip()}: expected a fraction below 1, such as 0.25 for 25 %.")
    return value
