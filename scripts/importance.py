"""Measure (or load) the importance of a base, print its summary, plot it, push it to the hub."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aim.config import add_aim_flags, rule_of, settings_of
from common.cli import Parser, add_output_flags, run
from common.distributed import ProcessGroup, init_distributed
from common.errors import UsageError
from common.figures import check_figure_file
from common.files.json_values import JsonObject
from common.files.paths import user_path
from common.logging import logger

if TYPE_CHECKING:
    from aim.importance import Importance
    from aim.measure import Settings
    from aim.report.summary import Summary


ABOUT = ("base", "calibration", "versions", "numerics", "statistic")


def make_parser() -> Parser:
    """Return the parser."""
    parser = Parser(prog="scripts/importance.py", description=__doc__)
    parser.add_argument(
        "base", nargs="?", metavar="BASE", help="base model: a folder or hub id; optional where --importance exists"
    )
    add_aim_flags(parser, seed="seed", title="tensors of the summary")
    group = parser.add_argument_group("computation")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument(
        "--numerics",
        choices=("float32", "reference"),
        default="float32",
        help="reference: the original's bf16 arithmetic",
    )
    group.add_argument("--resume", action="store_true", help="resume an interrupted calibration")
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print the summary as JSON")
    group.add_argument("--plot", type=user_path, metavar="FILE.png", help="draw the summary (.png, .svg or .pdf)")
    group.add_argument("--push_to_hub", metavar="ORG/NAME", help="upload the file with a card")
    group.add_argument("--private", action="store_true", help="with --push_to_hub: into a private repository")
    add_output_flags(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Load or measure, then print, plot and push as asked; all ranks measure, and rank 0 does the rest."""
    with init_distributed() as process_group:
        return measure_and_show(argv, process_group)


def measure_and_show(argv: Sequence[str], process_group: ProcessGroup) -> int:
    """Do this process's part of it."""
    args = make_parser().parse_args(argv)
    reference = args.numerics == "reference"
    settings = settings_of(vars(args), reference=reference, resume=args.resume, seed="seed")
    rule = rule_of(vars(args), reference)
    check(args)
    importance = loaded_or_measured(args, settings, process_group)
    if not process_group.is_main:
        return 0
    from aim.report.summary import summarise
    from aim.report.text import as_text

    summary = summarise(importance, rule)
    print(json.dumps(as_record(importance, summary), indent=2) if args.json else as_text(importance, summary))
    if args.plot:
        draw(importance, summary, args.plot)
        logger.info(f"Plot written to {args.plot}.")
    if args.push_to_hub:
        from aim.report.hub_upload import card, push

        text = card(importance, summary, args.push_to_hub, args.importance.name)
        url = push(args.importance, text, args.push_to_hub, args.private)
        logger.info(f"Pushed to {url}.")
    return 0


def check(args: Namespace) -> None:
    """Raise UsageError for flags that do not go together."""
    if args.importance is None:
        raise UsageError("--importance FILE is missing: the file to read, or to write what is measured.")
    if args.base is None and not args.importance.exists():
        raise UsageError(f"--importance {args.importance} does not exist: give the BASE to measure.")
    check_figure_file(args.plot, "--plot")
    if args.private and not args.push_to_hub:
        raise UsageError("--private goes with --push_to_hub.")
    if args.push_to_hub:
        from merging.output.hub_upload import check_push

        check_push(args.push_to_hub)


def loaded_or_measured(args: Namespace, settings: Settings, process_group: ProcessGroup) -> Importance:
    """The file's importance, held against the base where one is given; else the base's, measured and saved."""
    from aim.importance import Importance

    if args.base is None:
        return Importance.load(args.importance)
    from aim.measure import importance_of
    from aim.pipeline import state_file
    from common.device import resolve_device
    from merging.checkpoints.checkpoint import open_all

    with process_group.main_process_first():
        (base,) = open_all([args.base])
    state, device = state_file(args.importance, settings), resolve_device(args.device, process_group)
    return importance_of(base, settings, device, state, process_group)


def as_record(importance: Importance, summary: Summary) -> JsonObject:
    """Everything but the activations, in JSON's types."""
    return {key: getattr(importance, key) for key in ABOUT} | summary.as_json()


def draw(importance: Importance, summary: Summary, file: Path) -> None:
    """Write the figure."""
    from aim.report.plot import plot_summary
    from common.figures import write_figure
    from merging.output.records.card import public_name

    write_figure(plot_summary(summary, f"Importance of {public_name(importance.base['name'])}"), file)


if __name__ == "__main__":
    sys.exit(run(main))
