"""Relax a merged checkpoint towards its base where the base's activations are large (AIM, arXiv:2502.02421)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from aim.asked import add_aim_flags, aim_of
from console.cli import Parser, add_output_flags, run, say
from console.files import user_path
from merging.flags import OUTPUT_KEYS, add_run_flags
from merging.processes import Processes, together
from merging.recipe import DTYPES
from merging.work import Output


def make_parser() -> Parser:
    """Return the parser; the first four flags are the original's."""
    parser = Parser(prog="performAIM.py", description=__doc__)
    parser.add_argument("--merged_model", required=True, help="the merged checkpoint: a folder or hub id")
    parser.add_argument("--pretrained_model_name", required=True, help="its base: a folder or hub id")
    parser.add_argument(
        "--omega",
        default="0.4",
        metavar="X or X,Y,Z",
        help="relaxation floor: 1 leaves the merge, 0 is strongest; several make a folder each, from one read",
    )
    parser.add_argument("--save_path", required=True, type=user_path, help="folder for the relaxed checkpoint")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, help="of the output (default: the merged model's or adapter's)")
    parser.add_argument(
        "--numerics",
        choices=("float32", "reference"),
        default="float32",
        help="reference: the original's bf16 arithmetic, batch 1, tied embeddings relaxed",
    )
    parser.add_argument("--max_shard_size", default="5GB", help="of one weights file")
    add_aim_flags(parser, seed="seed")
    add_run_flags(parser)
    add_output_flags(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Parse, relax, say where; with the other processes of the run where a launcher started several."""
    with together() as processes:
        return relax(argv, processes)


def relax(argv: Sequence[str], processes: Processes) -> int:
    """Do this process's part of it."""
    args = make_parser().parse_args(argv)
    aim = aim_of(vars(args), reference=args.numerics == "reference", resume=bool(args.resume), seed="seed")
    given = {key: getattr(args, key) for key in OUTPUT_KEYS if getattr(args, key) is not None}
    quiet = args.quiet or not processes.leads
    from aim.run import perform

    output = Output(**given, quiet=quiet, processes=processes)
    folder = perform(args.merged_model, args.pretrained_model_name, aim, output, args.dtype)
    omegas = ", ".join(f"{omega:g}" for omega in aim.omegas)
    say(f"Relaxed {args.merged_model} with omega {omegas} into {folder}.", quiet)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
