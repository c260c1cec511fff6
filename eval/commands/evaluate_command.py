"""The execution of evaluate_model.py: evaluate models or grade answers again, print the results."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from common.cli import explain
from common.distributed import ProcessGroup, init_distributed
from common.errors import StoppedError
from common.logging import logger
from eval.commands.evaluate_flags import models_of, parser, settings_of
from eval.results.result import EvalResult

Results = list[tuple[EvalResult, Path]]
"""Results with their files."""


def execute(argv: Sequence[str]) -> int:
    """Evaluate, or grade again, on all ranks that a launcher started; print a row per model.

    Args:
        argv: the flags.

    Returns:
        The exit code.

    Raises:
        ProjectError: naming the flag, model or file that cannot be. Of several models that fail, the last one's error;
            the others' are printed on stderr.
    """
    with init_distributed() as process_group:
        args = parser().parse_args(argv)
        if args.rescore is not None:
            if not process_group.is_main:  # nothing is left to share: the answers are known
                return 0
            results, failures = rescore_answers(args)
        else:
            results, failures = evaluate_models(args, process_group)
        if results:
            print_results(results, args.answers)
        for failure in failures[:-1]:
            print("error:", explain(failure)[0], *failure.__notes__, file=sys.stderr)
        if failures:
            raise failures[-1]
        return 0


def evaluate_models(args: argparse.Namespace, process_group: ProcessGroup) -> tuple[Results, list[Exception]]:
    """Evaluate every model, all checked before the first is loaded.

    Returns:
        The results, on rank 0 only, and the errors of models that could not be evaluated. A single model, and one of
        several ranks, which wait for each other, raises its error instead.
    """
    settings, models = settings_of(args), models_of(args)
    from eval.harness.evaluation import evaluate_on_ranks, preflight
    from eval.results.store import save

    checked = [(model, preflight(model, settings, args.save_path)) for model in models]
    results: Results = []
    failures: list[Exception] = []
    for model, benchmarks in checked:
        if len(models) > 1:
            logger.info(f"{model}:")
        try:
            result_and_samples = evaluate_on_ranks(
                model, settings, save_path=args.save_path, benchmarks=benchmarks, process_group=process_group
            )
        except StoppedError as error:
            error.add_note("Answers so far are kept: the same command continues from them.")
            raise
        except Exception as error:  # of the project, or of third-party code that ran the model
            if len(models) == 1 or process_group.world_size > 1:
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the failed model
            error.add_note(f"Model: {model}.")
            failures.append(error)
            continue
        if result_and_samples is not None:
            results.append((result_and_samples[0], save(*result_and_samples, args.save_path)))
    return results, failures


def rescore_answers(args: argparse.Namespace) -> tuple[Results, list[Exception]]:
    """Grade the answers of an earlier result again."""
    from eval.harness.references import label_of
    from eval.harness.rescore import rescore, source_of
    from eval.results.store import save

    source = source_of(args.rescore, label_of(args.model) if args.model else None, args.save_path)
    result, samples = rescore(
        source, args.data_dir, args.include_path, args.allow_code_execution, args.sandbox, args.quiet, args.debug
    )
    return [(result, save(result, samples, args.save_path))], []


def print_results(results: Results, answers: bool = False) -> None:
    """Print the table, on request that of the answers, and what explains the numbers; on stderr where the files are."""
    from eval.results.answer_facts import answers_table
    from eval.results.store import details, table

    print(table([result for result, _ in results]))
    if answers:
        print("\n" + answers_table([result for result, _ in results]) + "\n")
    for result, written in results:
        name = "" if len(results) == 1 else f"{Path(result.model).name}, "
        print(*(f"{name}{sentence}" for sentence in details(result)), sep="\n")
        logger.info(f"Results: {written}")
