"""The whole pipeline on a family of tiny models, in one process: train, merge, relax, evaluate, table, plot."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts: spinning threads starve the neighbours

from common.cli import Parser, add_output_flags, run
from common.errors import UsageError
from common.files.paths import write_whole
from common.logging import logger, message_level

METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "widen")
FAST_METHODS = ("task_arithmetic", "ties")
OMEGA = 0.4
MARK = "made_by_quickstart.json"
NAMES = {"base": "Base", "addition": "Addition", "strings": "Strings", "brackets": "Brackets"}


def parser() -> Parser:
    p = Parser(prog="scripts/quickstart/main.py", description=__doc__)
    p.add_argument("--save_path", type=Path, default=Path("quickstart_out"), help="folder of all outputs, made anew")
    p.add_argument("--fast", action="store_true", help="smaller models, one combination, two methods: under a minute")
    p.add_argument("--seed", type=int, default=42, help="seed of the family and of DARE's masks")
    add_output_flags(p)
    return p


def fresh(folder: Path) -> None:
    """Empty the folder of an earlier quickstart. Raises UsageError for a folder that holds something else."""
    if folder.is_dir() and (folder / MARK).is_file() and not folder.is_symlink():
        shutil.rmtree(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--save_path {folder} holds something that no quickstart made; give another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("{}\n")


def combinations(models: Sequence[str], fast: bool) -> list[tuple[str, ...]]:
    """Every pair and all three; all three alone for --fast."""
    everything = tuple(models)
    return [everything] if fast else [*itertools.combinations(models, 2), everything]


@contextmanager
def step(what: str, seconds: dict[str, float]) -> Iterator[None]:
    """Say what starts, and keep how long it took."""
    logger.info(f"\n== {what}")
    started = time.perf_counter()
    yield
    seconds[what] = round(time.perf_counter() - started, 1)


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    fresh(args.save_path)
    out, quiet = args.save_path, args.quiet
    seconds: dict[str, float] = {}
    from transformers.utils import logging

    from scripts.quickstart.family import make_family, summary

    logging.disable_progress_bar()  # a bar for each of a hundred tiny checkpoints says nothing

    with step("Train a base and three fine-tuned models", seconds):
        family = make_family(out / "family", seed=args.seed, fast=args.fast, quiet=quiet)
        logger.info(summary(family))
    with step("Merge every combination by every method", seconds):
        merged = merge_all(family, out, args.fast, args.seed, quiet)
    with step(f"Calibrate once, relax every merge with omega {OMEGA:g}", seconds):
        relaxed = relax_all(family, out, merged, quiet)
    with step("Evaluate every model", seconds):
        evaluate_all(family, [family.base, *family.models.values(), *merged, *relaxed], out / "results", quiet)
    report(out)
    (out / MARK).write_text(json.dumps({"seconds": seconds, "fast": args.fast, "seed": args.seed}, indent=1) + "\n")
    logger.info(f"Seconds: {', '.join(f'{what.lower()} {duration:g}' for what, duration in seconds.items())}.")
    return 0


def merge_all(family, out: Path, fast: bool, seed: int, quiet: bool) -> list[Path]:  # type: ignore[no-untyped-def]
    """Merge the fine-tuned models; returns the folders."""
    from tqdm import tqdm

    from merging.pipeline import merge
    from merging.plan.merge_plan import OutputConfig
    from merging.recipe import make_recipe

    jobs = [(m, c) for c in combinations(list(family.models), fast) for m in (FAST_METHODS if fast else METHODS)]
    folders = []
    for method, chosen in tqdm(jobs, desc="merging", unit="merge", disable=True if quiet else None):
        folder = out / "merged" / f"{method}___{'-'.join(chosen)}"
        flags = {
            "method": method,
            "base_model": str(family.base),
            "models_to_merge": [str(family.models[name]) for name in chosen],
            "seed": seed,
        }
        with message_level(quiet=True):
            folders.append(merge(make_recipe(flags, {}), OutputConfig(folder)))
    return folders


def relax_all(family, out: Path, merged: Sequence[Path], quiet: bool) -> list[Path]:  # type: ignore[no-untyped-def]
    """Measure the base's importance once, then relax every merge; returns the folders."""
    from tqdm import tqdm

    from aim.calibration.config import Calibration
    from aim.config import AimConfig
    from aim.measure import Settings
    from aim.pipeline import relax
    from merging.plan.merge_plan import OutputConfig

    calibration = Calibration(str(family.calibration), n_samples=1024, block_size=64)
    aim = AimConfig((OMEGA,), Settings(calibration, importance_file=out / "importance.safetensors"))
    folders = []
    for folder in tqdm(merged, desc="relaxing", unit="merge", disable=True if quiet else None):
        target = OutputConfig(out / "relaxed" / f"{folder.name}___AIM")
        with message_level(quiet=True):
            folders.append(relax(str(folder), str(family.base), aim, target, None))
    return folders


def evaluate_all(family, models: Sequence[Path], results: Path, quiet: bool) -> None:  # type: ignore[no-untyped-def]
    """Score every model on the three skills' test items by lm-eval."""
    from tqdm import tqdm

    from eval.harness.evaluation import evaluate_with_samples
    from eval.results.store import save
    from eval.settings import Settings

    settings = Settings(
        benchmarks=tuple(family.task_names.values()),
        math_benchmarks=(),
        include_path=family.tasks,
        dtype="float32",
        device="cpu",
        batch_size="200",
        quiet=True,
    )
    titles = {task: NAMES[skill] for skill, task in family.task_names.items()}
    for model in tqdm(models, desc="evaluating", unit="model", disable=True if quiet else None):
        result, samples = evaluate_with_samples(str(model), settings)
        scores = {titles[name]: score for name, score in result.scores.items()}
        outcomes = {titles[name]: outcome for name, outcome in result.outcomes.items()}
        save(replace(result, scores=scores, outcomes=outcomes), samples, results)


def report(out: Path) -> None:
    """Print the tables, draw the fronts, and say what AIM did, whatever it is."""
    from eval.report.plots import plot_pareto, save
    from eval.report.report import make_report
    from eval.report.tables import to_csv, to_markdown
    from eval.results.reader import load
    from eval.stats.gains import Measure

    def warn(sentence: str) -> None:
        logger.info(sentence)

    models = load([out / "results"], NAMES, warn)
    table = make_report(models, Measure(), warn)
    write_whole(out / "tables.md", to_markdown(table).encode())
    write_whole(out / "tables.csv", to_csv(table).encode())
    print("\n" + to_markdown(table), end="")
    gains = table.gains.values
    pairs = [(f.unrelaxed, f.relaxed[0]) for f in models.families if f.unrelaxed is not None and f.relaxed]
    changes = [gains[b.key] - gains[a.key] for a, b in pairs if a.key in gains and b.key in gains]
    raised, lowered = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
    print(f"\nAIM with omega {OMEGA:g} raised the HV gain of {raised} of {len(changes)} merges and lowered {lowered}.")
    for column in models.columns:
        differences = [b.scores[column] - a.scores[column] for a, b in pairs]
        mean, least, most = sum(differences) / len(differences), min(differences), max(differences)
        print(f"{column}: {mean:+.2f} points on average ({least:+.2f} to {most:+.2f}).")
    plots = save(plot_pareto(models, list(itertools.combinations(models.columns, 2)), warn), out / "pareto")
    print(f"\nTables: {out / 'tables.md'} and {out / 'tables.csv'}. Plot: {' and '.join(map(str, plots))}.", flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
